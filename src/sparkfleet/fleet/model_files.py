"""Resolves a model revision to its commit and files, on the controller: commit, files, sizes and hashes. No Spark is
believed about what others shall load.

The packed client of the Sparks asks (`fetch_model --list`), as a process of its own: what it may read and how long is
bounded, its settings are not those of the user, and the token is in a file that is gone when it ends.
"""

from __future__ import annotations

import dataclasses
import os
import re
import ssl
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparkfleet_host import bounded, cache
from sparkfleet_host.bounded import COMMIT, BoundsError

from sparkfleet import SparkfleetError
from sparkfleet.documents import run_cache
from sparkfleet.packaging import hub_client
from sparkfleet.packaging.bundle import Bundle
from sparkfleet.paths import CACHE
from sparkfleet.planning.lock import Lock

#: A controller without a way to the Hub keeps a run waiting no longer than this.
SECONDS = 10.0
LIMIT = 32 << 20  # bytes of a list
#: Where distributions keep the certificates that they trust in one file.
BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


@dataclasses.dataclass(frozen=True)
class Answer:
    """`commit` and `files` {name: {"size", "sha256" | "sha1"}}, or none of both, the `reason` why the controller cannot
    know them, and the `failure` of the table. `locked`: it is a lock's."""

    commit: str = ""
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    reason: str = ""
    failure: str = ""
    locked: bool = False

    @property
    def expected(self) -> dict[str, Any]:
        """As model_download takes it."""
        found = {"commit": self.commit, "files": self.files, **({"locked": True} if self.locked else {})}
        return found if self.commit else {}


@dataclasses.dataclass(frozen=True)
class Way:
    """How to the Hub. The proxy of the environment comes before `proxy`; `ca`: authorities in PEM to trust besides this
    controller's."""

    endpoint: str = "https://huggingface.co"
    token: str = dataclasses.field(default="", repr=False)
    proxy: str = ""
    no_proxy: str = ""
    ca: str = ""


def resolve(repo: str, revision: str, way: Way, remote_code: bool = False, pickle: bool = False) -> Answer:
    """Ask the Hub; `remote_code`: for the repository's code too, `pickle`: for weights that are pickles, as the host
    fetches it. Raises SparkfleetError for what is no model or revision."""
    output = run_client(repo, revision, way, ["--list", *kinds(remote_code, pickle)], SECONDS)
    answer = output if isinstance(output, Answer) else understand(output, revision, way.endpoint)
    if way.token:
        answer = dataclasses.replace(answer, reason=answer.reason.replace(way.token, "***"))
    return answer


def kinds(remote_code: bool, pickle: bool) -> list[str]:
    """Words of the client for what a model's engine may run."""
    return [*(["--remote-code"] if remote_code else []), *(["--pickle"] if pickle else [])]


def run_client(repo: str, revision: str, way: Way, words: Sequence[str], seconds: float) -> bytes | Answer:
    """What the packed client prints with these words, or the Answer that says why it printed nothing. Raises
    SparkfleetError for what is no model or revision."""
    if not cache.valid_repo(repo) or not cache.valid_revision(revision):
        shown = bounded.printable(repr(f"{repo}@{revision}"), 200)
        raise SparkfleetError(f"{shown} is not ORG/NAME and a branch, tag or commit")
    client = hub_client.build(CACHE)
    with tempfile.TemporaryDirectory(prefix="sparkfleet-hub-") as folder:
        argv = [sys.executable, "-I", "-S", "-B", str(client), f"--repo={repo}", f"--revision={revision}", *words]
        try:
            done = subprocess.run(
                [*argv, f"--cache-dir={folder}/cache"],
                env=environment(way, Path(folder)),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Answer(reason=f"{way.endpoint} has not answered within {seconds:g} s", failure="hub-unreachable")
        except OSError as error:
            return Answer(reason=f"the Hub's client did not start: {error}", failure="internal")
    return done.stdout


def environment(way: Way, folder: Path) -> dict[str, str]:
    """The variables of the client; of the user's own only the way to the internet. The token is a file below `folder`,
    and there is none for a Hub without TLS."""
    found = urllib.request.getproxies()
    no_proxy = ",".join(filter(None, (found.get("no"), way.no_proxy)))
    authorities = _authorities(way.ca, folder)
    variables = {
        "HOME": str(folder),
        "HF_HOME": str(folder / "hf"),
        "HF_ENDPOINT": way.endpoint.rstrip("/"),
        "HF_TOKEN_PATH": str(folder / "token"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "LANG": "C.UTF-8",
        "PATH": "/usr/bin:/bin",
        "HTTP_PROXY": found.get("http") or way.proxy,
        "HTTPS_PROXY": found.get("https") or way.proxy,
        "NO_PROXY": no_proxy,
        "SSL_CERT_FILE": authorities or "",
        "SSL_CERT_DIR": os.environ.get("SSL_CERT_DIR", ""),
    }
    if way.token and _is_private(way.endpoint):
        with os.fdopen(os.open(folder / "token", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(way.token)
    return {name: value for name, value in variables.items() if value}


def _authorities(ca: str, folder: Path) -> str:
    """The file of certificates that the client trusts: this machine's, and with `ca` a copy of that with them."""
    own = os.environ.get("SSL_CERT_FILE") or ssl.get_default_verify_paths().cafile or ""
    if not ca:
        return own
    # With a file named the client reads nothing else; Debian's Python names a folder alone.
    base = own or next((place for place in BUNDLES if Path(place).is_file()), "")
    file = folder / "ca.pem"
    file.write_text((Path(base).read_text(encoding="utf-8", errors="replace") + "\n" if base else "") + ca, "utf-8")
    return str(file)


def _is_private(endpoint: str) -> bool:
    """Whether the connection is safe from eavesdropping."""
    url = urllib.parse.urlsplit(endpoint)
    near = re.fullmatch(r"localhost|127(\.\d{1,3}){3}|::1", url.hostname or "")
    return url.scheme == "https" or bool(near)


def understand(output: bytes, revision: str, endpoint: str = "the Hub") -> Answer:
    """The last answer of the client."""
    try:
        lines = output.splitlines() or [b"{}"]
        answer = bounded.as_dict(bounded.parse_json(lines[-1], "its client", LIMIT), "its client")
        if "error" in answer:
            error = bounded.as_dict(answer["error"], "its client: error")
            return Answer(reason=bounded.printable(str(error["message"]), 300), failure=str(error["id"]))
        listing = cache.check_listing(answer.get("listing"), endpoint)
        commit = bounded.matched(COMMIT, listing.get("commit"), f"{endpoint}: commit")
    except (BoundsError, KeyError) as error:
        return Answer(reason=bounded.printable(f"{endpoint}: {error}", 300), failure="hub-answer-odd")
    if COMMIT.fullmatch(revision) and commit != revision:
        return Answer(reason=f"{endpoint} names commit {commit} for {revision}", failure="hub-answer-odd")
    return Answer(commit, listing["files"])


def of_bundle(folder: str, trust: tuple[str, str], repo: str, revision: str) -> Answer:
    """What a bundle has of it: its list, checked against bundle.json; `trust`: digest and signers. Raises
    SparkfleetError."""
    listing = Bundle.read(folder, *trust).listing(repo, revision)
    # What carries it to the Spark says what is missing.
    return Answer(listing["commit"], listing["files"]) if listing else Answer()


def of_run(
    folder: Path, repo: str, revision: str, way: Way, remote_code: bool = False, pickle: bool = False
) -> tuple[Answer, bool]:
    """`resolve` once a run for all its hosts, kept in a folder that lives as long as the run; whether it was asked just
    now. A branch that moves meanwhile is the same for every host."""
    key = " ".join([f"{repo}@{revision}", way.endpoint, *kinds(remote_code, pickle)])
    file = folder / "sparkfleet-models.json"
    known, new = run_cache.ask(file, key, lambda: dataclasses.asdict(resolve(repo, revision, way, remote_code, pickle)))
    return Answer(**known), new


def of_lock(file: str, repo: str, commit: str, remote_code: bool = False, signers: str = "") -> Answer:
    """What a lock has of it, which must be signed where there are `signers`: it may have been changed since the run was
    planned. Raises SparkfleetError."""
    return Answer(commit, Lock.read(file, signers=signers).at(repo, commit).expected(remote_code)["files"], locked=True)


def refuse(expected: Mapping[str, Any], listing: Mapping[str, Any], host: str, what: str) -> None:
    """Raises SparkfleetError where what a Spark collected (or a list of another form) is not what the Hub, or the lock,
    has."""
    try:
        found = cache.check_listing(listing, host)
        bounded.matched(COMMIT, found.get("commit"), f"{host}: commit")
        wrong = cache.difference(expected, found)
    except BoundsError as error:
        wrong = str(error)
    if wrong and expected.get("locked"):
        raise SparkfleetError(
            f"{host} has a different {what} than the lock: {wrong}. Find out where it comes from, or see with "
            "`sparkfleet lock --update` whether the Hub has changed it"
        )
    if wrong:
        raise SparkfleetError(
            f"{host} has a different {what} than the Hub: {wrong}. Check {host}; if the branch has moved since, "
            "set the commit as the revision, or remove the model from the host"
        )
