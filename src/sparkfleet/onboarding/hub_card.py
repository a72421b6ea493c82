"""A model card made from what the Hub, or a folder, states of a model: config.json, quantisation, sizes, licence.

The packed client asks the Hub (`fetch_model --about`), in a process of its own; whatever comes is bounded. A card that
a run makes by itself (`sparkfleet_model: ORG/NAME`) is stored with the controller's state, is reused, and stays at the
commit that it was made of: a newer commit on the Hub is reported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import fnmatch
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sparkfleet_host import bounded, cache
from sparkfleet_host.bounded import MIB, BoundsError, printable

from sparkfleet import SparkfleetError
from sparkfleet.documents import run_cache, yaml_text
from sparkfleet.fleet import model_files
from sparkfleet.fleet.model_files import Answer, Way
from sparkfleet.onboarding.prompts import report_line
from sparkfleet.planning import card_draft, catalog, model_config
from sparkfleet.planning.card_draft import Draft, Facts
from sparkfleet.planning.catalog import Card

#: For list and small files of one model.
SECONDS = 60.0
#: Of the client's answer: two files of 4 MiB in JSON's escapes, and the list.
LIMIT = 64 * MIB
TEXT_BYTES = 4 * MIB
INDEX_BYTES = 16 * MIB
MOST_FILES = 20_000
DEPTH = 16
TOKEN_BYTES = 4096
TEMPLATES = ("chat_template.jinja", "chat_template.json")
Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class About:
    """What is known of a model: `where` in words; `files` {name: bytes} that are fetched; `texts` of small files;
    `tensor_bytes` of the index, 0 where there is none; `left_out` files that were too large to be read."""

    where: str
    repo: str
    revision: str
    revision_origin: str
    files: dict[str, int]
    texts: dict[str, str]
    tensor_bytes: int = 0
    gated: bool | None = None
    licence: str = ""
    licence_origin: str = ""
    left_out: tuple[str, ...] = ()


# -- the Hub ---------------------------------------------------------------------------------------------------------


def way() -> Way:
    """How this user reaches the Hub: HF_ENDPOINT, and the token of HF_TOKEN or of `hf auth login`. Raises
    SparkfleetError."""
    endpoint = os.environ.get("HF_ENDPOINT", "").strip() or Way.endpoint
    if not re.fullmatch(r"https?://[!-~]{1,500}", endpoint):
        raise SparkfleetError(
            f"HF_ENDPOINT: must be the address of a Hub, https://..., not '{printable(endpoint, 80)}'"
        )
    return Way(endpoint=endpoint, token=_token())


def _token() -> str:
    if token := os.environ.get("HF_TOKEN", "").strip():
        return token
    home = os.environ.get("HF_HOME") or str(Path.home() / ".cache" / "huggingface")
    place = os.environ.get("HF_TOKEN_PATH") or f"{home}/token"
    try:
        return bounded.read_file(place, TOKEN_BYTES).decode("ascii").strip()
    except (OSError, ValueError):
        return ""


def ask(repo: str, revision: str, hub: Way) -> About:
    """What the Hub states of a model. Raises SparkfleetError with the reason if it does not, and what to do."""
    if os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in ("1", "ON", "YES", "TRUE"):
        here = Answer(reason="HF_HUB_OFFLINE is set, so the Hub is not asked", failure="hub-unreachable")
        raise SparkfleetError(f"no card for {repo}@{revision}: {here.reason}{_remedy(repo, here)}")
    words = ["--about", f"--seconds={SECONDS - 5:g}"]
    output = model_files.run_client(repo, revision, hub, words, SECONDS)
    problem = output if isinstance(output, Answer) else None
    stated: Mapping[str, Any] = {}
    if problem is None:
        assert isinstance(output, bytes)
        stated, problem = _understood(output, hub.endpoint)
    if problem is not None:
        reason = problem.reason.replace(hub.token, "***") if hub.token else problem.reason
        raise SparkfleetError(f"no card for {repo}@{revision}: {printable(reason, 400)}{_remedy(repo, problem)}")
    try:
        return _about(stated, repo, revision, hub)
    except BoundsError as error:
        raise SparkfleetError(f"no card for {repo}@{revision}: {hub.endpoint} answers oddly: {error}") from None


def _understood(output: bytes, endpoint: str) -> tuple[Mapping[str, Any], Answer | None]:
    """The client's last line, or why there is none."""
    try:
        lines = output.splitlines() or [b"{}"]
        stated = bounded.as_dict(bounded.parse_json(lines[-1], "the Hub's client", LIMIT, quote=False), "its client")
        if "error" in stated:
            error = bounded.as_dict(stated["error"], "its client: error")
            return {}, Answer(reason=str(error.get("message"))[:400], failure=str(error.get("id")))
        return bounded.as_dict(stated.get("about"), "its client: about"), None
    except BoundsError as error:
        return {}, Answer(reason=f"{endpoint}: {error}", failure="hub-answer-odd")


def _remedy(repo: str, problem: Answer) -> str:
    if problem.failure == "hub-unreachable":
        return (
            "; if this machine cannot reach the Hub, download the model elsewhere, copy its folder here, and run "
            f"`sparkfleet card FOLDER --repo {repo}`"
        )
    if problem.failure in ("hub-token-missing", "hub-no-access"):
        return "; here the token is that of HF_TOKEN or of `hf auth login`"
    return ""


def _about(stated: Mapping[str, Any], repo: str, revision: str, hub: Way) -> About:
    listing = cache.check_listing(stated.get("listing"), "list")
    commit = bounded.matched(bounded.COMMIT, listing.get("commit"), "commit")
    texts = {
        name: bounded.as_str(text, name, TEXT_BYTES)
        for name, text in bounded.as_dict(stated.get("texts"), "texts").items()
    }
    gated = stated.get("gated")
    host = hub.endpoint.partition("://")[2].rstrip("/")
    licence = bounded.as_str(stated.get("licence", ""), "licence", 100)
    return About(
        where=f"the Hub ({host})",
        repo=repo,
        revision=commit,
        revision_origin=f"what {revision} is on the Hub" if revision != commit else "the requested commit",
        files={name: entry["size"] for name, entry in listing["files"].items()},
        texts=texts,
        tensor_bytes=bounded.as_int(stated.get("tensor_bytes", 0), "tensor_bytes"),
        gated=gated if isinstance(gated, bool) else None,
        licence=licence,
        licence_origin="the Hub",
        left_out=tuple(bounded.as_dict(stated.get("left_out", {}), "left_out")),
    )


# -- a folder --------------------------------------------------------------------------------------------------------


def inspect_folder(folder: Path, name: str = "") -> About:
    """What a folder with a model's files holds; `name` is ORG/NAME[@REVISION], where it is not known from the folder's
    place in a Hub cache. Raises SparkfleetError."""
    folder = folder.absolute()
    repo, revision, origin = _named(folder, name)
    try:
        files = dict(_fetched(_walk(folder)))
        texts, left_out = {}, []
        for file in (*TEMPLATES, model_config.CONFIG, "hf_quant_config.json", "tokenizer_config.json"):
            if file in files and files[file] <= TEXT_BYTES:
                texts[file] = bounded.read_file(folder / file, TEXT_BYTES).decode("utf-8", "replace")
            elif file in files:
                left_out.append(file)
        tensors = _index(folder) if "model.safetensors.index.json" in files else 0
    except (OSError, BoundsError) as error:
        raise SparkfleetError(f"folder {folder} cannot be read: {printable(str(error), 300)}") from None
    licence = _licence(folder)
    return About(
        where=f"the folder {printable(str(folder), 200)}",
        repo=repo,
        revision=revision,
        revision_origin=origin,
        files=files,
        texts=texts,
        tensor_bytes=tensors,
        licence=licence,
        licence_origin="README.md",
        left_out=tuple(left_out),
    )


def _named(folder: Path, name: str) -> tuple[str, str, str]:
    if name:
        found = catalog.hub_name(name)
        if found is None:
            raise SparkfleetError(f"--repo {printable(name, 200)!r}: write ORG/NAME or ORG/NAME@REVISION")
        return *found, "as you gave it" if "@" in name else "not known of a folder; the branch main"
    snapshots = folder.parent
    if snapshots.name == "snapshots" and bounded.COMMIT.fullmatch(folder.name):
        repo = cache.repo_of(snapshots.parent.name)
        if repo and "/" in repo:
            return repo, folder.name, "the folder's name in the Hub cache"
    raise SparkfleetError(
        f"folder {printable(str(folder), 200)} does not show which model of the Hub it holds: add --repo ORG/NAME, or "
        "ORG/NAME@COMMIT"
    )


def _walk(folder: Path) -> Iterator[tuple[str, int]]:
    """Names and sizes of the files below, hidden ones left out. Raises BoundsError for too many."""
    waiting, number = [(folder, "", 0)], 0
    while waiting:
        place, prefix, depth = waiting.pop()
        with os.scandir(place) as entries:
            for entry in entries:
                number += 1
                if number > MOST_FILES:
                    raise BoundsError(f"more than {MOST_FILES} files")
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    if depth < DEPTH:
                        waiting.append((Path(entry.path), f"{prefix}{entry.name}/", depth + 1))
                elif entry.is_file():  # in a Hub cache they are links
                    yield f"{prefix}{entry.name}", entry.stat().st_size


def _fetched(files: Iterator[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """Those that a Spark would fetch, by the patterns of the fetch."""
    from sparkfleet_host.fetch_model import IGNORE  # noqa: PLC0415 - brings the Hub's client with it

    found = list(files)
    ignored = (*IGNORE, f"*{cache.CODE}") if any(name.endswith(".safetensors") for name, _ in found) else ()
    for name, size in found:
        if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored):
            yield name, size


def _index(folder: Path) -> int:
    """Bytes of all tensors, 0 where the index does not give them."""
    path = folder / "model.safetensors.index.json"
    with contextlib.suppress(OSError, BoundsError):
        metadata = bounded.as_dict(bounded.read_json(path, INDEX_BYTES).get("metadata"), "metadata")
        return bounded.as_int(metadata.get("total_size"), "total_size")
    return 0


def _licence(folder: Path) -> str:
    """The licence in the front matter of README.md, or ""."""
    try:
        text = bounded.read_file(folder / "README.md", MIB).decode("utf-8", "replace")
        head = re.match(r"---\r?\n(.{0,65536}?)\r?\n---", text, re.DOTALL)
        data = yaml_text.load(head[1]) if head else None
    except (OSError, BoundsError, yaml_text.YamlError):
        return ""
    names = [data.get(key) for key in ("license_name", "license")] if isinstance(data, Mapping) else []
    return next((printable(name, 100) for name in names if isinstance(name, str) and name.strip()), "")


# -- the card --------------------------------------------------------------------------------------------------------


def draft(about: About, image: str = "") -> Draft:
    """The card of what is known, checked as any card is. Raises SparkfleetError."""
    what = f"{about.repo}: {model_config.CONFIG}"
    config = _json(about, model_config.CONFIG)
    if config is None:
        why = "is too large to be read" if model_config.CONFIG in about.left_out else "is missing"
        raise SparkfleetError(
            f"{what} {why} in {about.where}; without it a model's shape is not known. Is it a model of transformers' "
            "format (not GGUF, not an adapter)?"
        )
    try:
        model = model_config.describe(config)
        quantisation = model_config.quantisation(config, _json(about, "hf_quant_config.json"))
    except SparkfleetError as error:
        raise SparkfleetError(f"{about.repo}: {error}") from None
    made = card_draft.draft(model, quantisation, _facts(about), image)
    made.unknown += [f"the content of {name}: it is too large to be read" for name in about.left_out]
    made.head = f"Made by `sparkfleet card` from {about.where}"
    check(made, about.repo)
    return made


def check(made: Draft, what: str) -> Card:
    """The draft as a card. Raises SparkfleetError for one that the schema refuses."""
    return catalog.of_text(Path(f"(card of {printable(what, 120)})"), made.text())


def _json(about: About, name: str) -> dict[str, Any] | None:
    """The object in a small file, None if it is not there. Raises SparkfleetError."""
    if name not in about.texts:
        return None
    what = f"{about.repo}: {name}"
    try:
        return bounded.as_dict(bounded.parse_json(about.texts[name], what, TEXT_BYTES, constants=True), what)
    except BoundsError as error:
        raise SparkfleetError(f"{error} (in {about.where})") from None


def _facts(about: About) -> Facts:
    weights = {name: size for name, size in about.files.items() if name.endswith(".safetensors")}
    if not weights:
        formats = sorted({name.rpartition(".")[2] for name in about.files if "." in name})[:8]
        raise SparkfleetError(
            f"{about.repo}: there are no safetensors in {about.where} (there are {', '.join(formats) or 'no files'}); "
            "other forms of weights are not served here"
        )
    origin = f"{about.where}: sizes of the safetensors"
    if about.tensor_bytes:
        origin = f"{about.where}: total_size of the safetensors' index"
    chat, thinks = _template(about)
    return Facts(
        repo=about.repo,
        revision=about.revision,
        where=about.where,
        revision_origin=about.revision_origin,
        download_bytes=sum(about.files.values()),
        weight_bytes=about.tensor_bytes or sum(weights.values()),
        weight_origin=origin,
        licence=about.licence,
        licence_origin=about.licence_origin,
        gated=about.gated,
        chat=chat,
        embeds="modules.json" in about.files,  # of sentence-transformers
        thinks=thinks,
    )


def _template(about: About) -> tuple[bool | None, str]:
    """Whether there is a chat template (None: not known), and how it has the model think."""
    texts = [about.texts[name] for name in TEMPLATES if name in about.texts]
    name = "tokenizer_config.json"
    if name in about.texts:
        with contextlib.suppress(BoundsError):
            data = bounded.parse_json(about.texts[name], name, TEXT_BYTES, constants=True, quote=False)
            value = data.get("chat_template") if isinstance(data, Mapping) else None
            texts += [str(value)] if value else []
    if not texts:
        return (None if about.left_out else False), ""
    text = "".join(texts)
    return True, "switch" if "enable_thinking" in text else "always" if "<think>" in text else ""


# -- cards that a run makes by itself --------------------------------------------------------------------------------


def ensure(model: str, hub: Way, report: Report, once: Path | None = None, refresh: bool = False) -> Path | None:
    """The card of a model given as ORG/NAME[@REVISION], made where there is none (`refresh`: in any case); None for
    another kind of model. `report` is called for a new card, and for a Hub that has moved on since one was made;
    with `once`, a folder that lives as long as a run, the Hub is queried once a run. Raises SparkfleetError."""
    named = catalog.hub_name(model)
    if named is None:
        return None
    path = catalog.made_card(*named)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent / ".lock"):
        if refresh or not path.is_file():
            made = draft(ask(*named, hub))
            _write(path, made.text())
            unsure = f"; {len(made.unknown)} things are not known, it lists them" if made.unknown else ""
            report(f"{model}: a card was made from the Hub at {made.data['revision'][:12]}: {path}{unsure}")
            return path
        with contextlib.suppress(SparkfleetError, OSError):
            if moved := _moved(named, catalog.parse(path), hub, once):
                report(
                    f"{model}: {named[1]} on the Hub is {moved[:12]} by now; the card stays at "
                    f"{catalog.parse(path).revision[:12]} until `sparkfleet card {model} --refresh`"
                )
    return path


def _moved(named: tuple[str, str], card: Card, hub: Way, once: Path | None) -> str:
    """The commit that a branch is now, where that is another than the card's; "" if it is not, or without the Hub."""
    if named[1] == card.revision:
        return ""

    def question() -> dict[str, Any]:
        return {"commit": model_files.resolve(*named, hub).commit}

    if once is None:
        commit, new = str(question()["commit"]), True
    else:
        known, new = run_cache.ask(once / "sparkfleet-cards.json", f"{named} {hub.endpoint}", question)
        commit = str(known["commit"])
    return commit if new and commit and commit != card.revision else ""


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle):
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _write(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def ensure_reported(model: str) -> None:
    """`ensure` for the command line."""
    ensure(model, way(), report_line)
