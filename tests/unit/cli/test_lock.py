"""`sparkfleet lock` against a registry and a Hub: what it writes, what it says has changed, when it writes nothing."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sparkfleet import SparkfleetError
from sparkfleet.cli import main
from sparkfleet.packaging import signature
from sparkfleet.planning import catalog, lock
from sparkfleet.planning.lock import File, Image, Lock, Model
from sparkfleet.planning.target import Settings, Target
from tests.unit import ROOT
from tests.unit.fakes.fake_hub import Hub, serve
from tests.unit.fakes.fake_registry import FakeRegistry, digest, image_manifest, serving
from tests.unit.packaging import test_signature
from tests.unit.planning.test_model_config import FOLDER

IMAGE = "nvcr.io/nvidia/vllm:1"
FILES = {
    "config.json": (FOLDER / "Qwen--Qwen3-8B.json").read_bytes(),
    "model.safetensors": b"w" * 5000,
    "LICENSE.txt": b"Be kind.",
    "modeling.py": b"code",
    "weights.bin": b"pickle",
}


class World:
    """An inventory with one Spark and its folder, a Hub and a registry."""

    def __init__(self, folder: Path, hub: Hub, registry: FakeRegistry) -> None:
        self.folder, self.hub, self.registry = folder, hub, registry
        card = (
            (ROOT / "models" / "llama31-8b-fp8.yml").read_text().replace(catalog.load("llama31-8b-fp8").repo, hub.repo)
        )
        self.card = folder / "card.yml"
        self.card.write_text(card)
        self.more: dict[str, Any] = {}
        self.inventory(sparkfleet_model=str(self.card), sparkfleet_image=IMAGE)

    def inventory(self, **values: Any) -> None:
        self.more |= values
        shared = {
            "sparkfleet_hub_endpoint": self.hub.url,
            "sparkfleet_controller_registries": {"nvcr.io": self.registry.address},
            **self.more,
        }
        hosts = {"sparks": {"hosts": {"spark-1": {}}, "vars": shared}}
        (self.folder / "hosts.yml").write_text(json.dumps(hosts))

    @property
    def path(self) -> Path:
        return self.folder / lock.NAME

    def run(self, *words: str) -> int:
        return main.main(["lock", "-i", str(self.folder / "hosts.yml"), *words])

    def read(self) -> Lock:
        return Lock.read(self.path)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(catalog, "STATE", tmp_path / "state")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "SSL_CERT_FILE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "mine"
    folder.mkdir()
    hub = Hub(files=dict(FILES), large=("model.safetensors",), licence="kind-1.0")
    with serve(hub), serving(FakeRegistry()) as registry:
        yield World(folder, hub, registry)


Captured = pytest.CaptureFixture[str]


def test_a_lock_of_all_that_is_deployed(world: World, capsys: Captured) -> None:
    assert world.run() == 0
    said = capsys.readouterr().out
    made = world.read()
    image = made.images[IMAGE]
    assert (image.digest, image.manifest) == (digest(world.registry.index), digest(world.registry.manifest))
    assert image.platform.endswith("/arm64") and image.size == 305_025
    (model,) = made.models.values()
    assert list(made.models) == ["acme/tiny@main"]
    assert (model.commit, model.licence, model.code) == (world.hub.commit, "kind-1.0", False)
    assert sorted(model.files) == ["LICENSE.txt", "config.json", "model.safetensors"]  # what a Spark would fetch
    for name, file in model.files.items():
        content = FILES[name]
        assert (file.size, f"sha256:{file.sha256}") == (len(content), digest(content))
        assert file.git == ("" if name == "model.safetensors" else world.hub.hash(name))
    assert made.cards == {"llama31-8b-fp8": catalog.load(str(world.card)).digest}
    assert world.hub.gets("model.safetensors") == []  # the Hub names its sha256
    assert f"image {IMAGE}: new, {image.digest[:19]}" in said and f"{world.path}: written" in said
    text = world.path.read_text()
    assert world.run() == 0
    assert capsys.readouterr().out == f"{world.path}: unchanged\n" and world.path.read_text() == text


def test_what_is_locked_is_not_asked_for_again(world: World) -> None:
    world.run()
    asked, seen, before = len(world.hub.asked), len(world.registry.seen), world.path.read_text()
    world.registry.serve_tag(image_manifest([b"other"]))
    world.hub.files["config.json"] = b"{}"
    assert world.run() == 0
    assert (len(world.hub.asked), len(world.registry.seen)) == (asked, seen)
    assert world.path.read_text() == before


def moved(world: World) -> list[str]:
    """Everything moves; what is to be said of it."""
    old = world.read()
    world.registry.serve_tag(manifest := image_manifest([b"a" * 1000]))
    world.hub.files |= {"model.safetensors": b"v" * 6000, "LICENSE.txt": b"Pay.", "new.json": b"[]"}
    del world.hub.files["config.json"]
    world.hub.licence = "pay-2.0"
    world.card.write_text(world.card.read_text().replace("max_num_seqs: ", "max_num_seqs: 1"))
    model = old.models["acme/tiny@main"]
    return [
        f"image {IMAGE}: tag moved, {old.images[IMAGE].digest[:19]} → {digest(manifest)[:19]} (305.02 kB → 1.02 kB)",
        f"model acme/tiny@main: revision moved, {model.commit[:12]} → {world.hub.commit[:12]} (",
        "model acme/tiny@main: licence kind-1.0 → pay-2.0",
        "model acme/tiny@main: licence text LICENSE.txt changed (sha256:",
        "model acme/tiny@main: file config.json removed (",
        "model acme/tiny@main: file model.safetensors changed (sha256:",
        "model acme/tiny@main: file new.json added (2 bytes)",
        "card llama31-8b-fp8: changed",
    ]


def test_check_says_what_differs_and_writes_nothing(world: World, capsys: Captured) -> None:
    world.run()
    assert world.run("--check") == 0
    lines, before = moved(world), world.path.read_text()
    capsys.readouterr()
    assert world.run("--check") == 4
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"{world.path}: differs" and len(said) == len(lines) + 1
    for line, start in zip(said[:-1], lines, strict=True):
        assert line.startswith(start)
    assert world.path.read_text() == before
    assert world.run("--check", "--json") == 4
    told = json.loads(capsys.readouterr().out)
    assert (told["changes"], told["written"]) == (said[:-1], False)


def test_check_says_what_the_lock_does_not_have(world: World, capsys: Captured) -> None:
    world.run()
    world.inventory(sparkfleet_revision=world.hub.commit)
    capsys.readouterr()
    assert world.run("--check") == 4
    assert capsys.readouterr().out.startswith(f"model acme/tiny@{world.hub.commit}: new, commit ")


@pytest.mark.parametrize(("answer", "taken"), [("yes", True), ("no", False), (None, False)])
def test_update_takes_it_only_when_it_was_agreed_to(
    world: World, capsys: Captured, monkeypatch: pytest.MonkeyPatch, answer: str | None, taken: bool
) -> None:
    world.run()
    lines, before = moved(world), world.path.read_text()
    capsys.readouterr()

    def answered(question: str) -> str:
        assert question == "Take this into the lock? [yes/no] "
        assert lines[0] in capsys.readouterr().err  # it was said before
        if answer is None:
            raise EOFError
        return answer

    monkeypatch.setattr("builtins.input", answered)
    assert world.run("--update") == (0 if taken else 2)
    assert (world.path.read_text() != before) == taken
    if taken:
        assert world.read().models["acme/tiny@main"].commit == world.hub.commit
        assert world.run("--check") == 0


def test_update_of_one_model_leaves_the_others(world: World, capsys: Captured) -> None:
    world.run()
    world.inventory(sparkfleet_revision=world.hub.commit)
    world.run()
    moved(world)
    assert world.run("--update", "llama31-8b-nvfp4", "--yes") == 2
    assert (
        "llama31-8b-nvfp4: not a model of this inventory, which has acme/tiny, llama31-8b-fp8"
        in capsys.readouterr().err
    )
    world.inventory(sparkfleet_revision="main")
    assert world.run("--update", "acme/tiny", "--yes") == 0
    assert len(world.read().models) == 2  # what no host uses stays until all is renewed
    assert world.run("--update", "--yes") == 0
    assert "removed, no host of the inventory uses it" in capsys.readouterr().out
    assert list(world.read().models) == ["acme/tiny@main"]


def test_a_lock_that_was_changed_by_hand(world: World, capsys: Captured) -> None:
    world.run()
    good = world.read().images[IMAGE].digest
    world.path.write_text(world.path.read_text().replace(good, "sha256:" + "0" * 64))
    for words in ([], ["--check"]):
        assert world.run(*words) == 2
        assert "the lock was changed after `sparkfleet lock` had written it" in capsys.readouterr().err
    assert world.run("--update", "--yes") == 0  # says what it was changed to
    assert f"image {IMAGE}: tag moved, sha256:000000000000 → {good[:19]}" in capsys.readouterr().out
    assert world.read().images[IMAGE].digest == good


def test_files_that_change_under_a_commit_are_said(world: World, capsys: Captured) -> None:
    """A Hub (or a mirror of one) that has other content for the same commit."""
    world.run()
    commit = world.hub.commit
    capsys.readouterr()
    hub = world.hub
    hub.files["model.safetensors"] = b"x" * 5000
    type(hub).commit = property(lambda self: commit)  # type: ignore[method-assign,assignment]
    try:
        assert world.run("--check") == 4
    finally:
        type(hub).commit = COMMIT  # type: ignore[method-assign]
    (line, _) = capsys.readouterr().out.splitlines()
    assert line.endswith("same size), although the commit is the same")


COMMIT = Hub.commit


def gone(world: World) -> str:
    world.inventory(sparkfleet_hub_endpoint="http://127.0.0.1:9")
    return "acme/tiny@main: the Hub does not say what it is: "


def without_image(world: World) -> str:
    world.registry.things.pop("1")
    return f"{IMAGE}: its registry does not say what it is: "


def a_small_file_that_differs(world: World) -> str:
    world.hub.corrupt["config.json"] = 5
    return "config.json of acme/tiny arrived with a content other than the Hub names"


def refused(world: World) -> str:
    world.hub.gated = True
    return "hub-token-missing"


def of_another_config(world: World) -> str:
    world.registry.things[digest(b'{"architecture": "arm64"}')] = b"[]"
    return "its configuration arrived with different content"


@pytest.mark.parametrize("fault", [gone, without_image, a_small_file_that_differs, refused, of_another_config])
def test_what_cannot_be_asked_writes_nothing(world: World, capsys: Captured, fault: Callable[[World], str]) -> None:
    words = fault(world)
    assert world.run() == 7
    assert words in capsys.readouterr().err
    assert list(world.folder.glob(".*")) == []


def test_the_token_is_used_and_not_said(world: World, capsys: Captured) -> None:
    world.hub.gated = True
    world.hub.tokens["hf_canary"] = True
    world.inventory(sparkfleet_hf_token="hf_canary")
    assert world.run() == 0
    world.hub.tokens["hf_canary"] = False
    assert world.run("--check") == 7
    said = capsys.readouterr()
    assert "hf_canary" not in said.out + said.err + world.path.read_text()


def test_a_model_of_the_hub_gets_its_card_on_the_way(world: World) -> None:
    world.inventory(sparkfleet_model="acme/tiny")
    assert world.run() == 0
    made = world.read()
    assert (list(made.models), made.cards) == (["acme/tiny@main"], {})
    commit = made.models["acme/tiny@main"].commit
    assert catalog.load(f"acme/tiny@{commit}").revision == commit


def test_code_of_the_repository_is_locked_where_the_engine_runs_it(world: World, capsys: Captured) -> None:
    world.run()
    commit = world.hub.commit
    world.inventory(sparkfleet_vllm_trust_remote_code=True)
    assert world.run() == 0
    model = world.read().models["acme/tiny@main"]
    assert model.code and model.commit == commit and "modeling.py" in model.files
    assert "code of the repository: now part of it" in capsys.readouterr().out


def test_a_model_that_drafts_is_asked_for_as_well(world: World, capsys: Captured) -> None:
    given = {"model": "acme/draft", "num_speculative_tokens": 2}
    world.inventory(sparkfleet_vllm_speculative_config=given)
    assert world.run() == 7
    assert "acme/draft@main: the Hub does not say what it is" in capsys.readouterr().err
    world.hub.repo = "acme/draft"
    known = Lock(models={"acme/tiny@main": Model("1" * 40, {"config.json": File(1, "1" * 64)})}, path=world.path)
    known.write()
    assert world.run() == 0 and sorted(world.read().models) == ["acme/draft@main", "acme/tiny@main"]


def test_another_place_by_a_variable(world: World, tmp_path: Path) -> None:
    world.inventory(sparkfleet_lock_file=str(tmp_path / "other.yml"))
    assert world.run() == 0
    assert (tmp_path / "other.yml").is_file() and not world.path.exists()


def test_a_lock_is_signed_and_what_was_changed_is_not_signed_again(
    world: World, capsys: Captured, tmp_path: Path
) -> None:
    key = test_signature.make(tmp_path, "alice")
    world.inventory(sparkfleet_lock_signers=test_signature.signers(tmp_path, key))
    assert world.run("-e", f"sparkfleet_lock_key={key}") == 0
    made = signature.beside(world.path)
    assert f"{made}: written" in capsys.readouterr().out
    assert world.run() == 0  # nothing is new: the signature stays
    settings = Settings(
        model=str(world.card), image=IMAGE, lock_file=str(world.path), lock_signers=str(tmp_path / "signers")
    )
    assert settings.lock() == world.read()
    forged = dataclasses.replace(
        world.read(), images={IMAGE: Image("sha256:" + "6" * 64, "linux/arm64", "sha256:" + "6" * 64, 1)}
    )
    forged.write()  # with a seal that is right
    capsys.readouterr()
    for words in ([], ["-e", f"sparkfleet_lock_key={key}"], ["--check"]):
        assert world.run(*words) == 2
        assert f"the lock {world.path} is not signed by anyone in" in capsys.readouterr().err
    with pytest.raises(SparkfleetError, match="is not signed by anyone in"):
        Target.of(settings)
    assert world.run("--update", "--yes") == 0  # what it does not have any more is asked for
    assert f"{made}: removed, as it is of the lock before" in capsys.readouterr().out and not made.exists()
    with pytest.raises(SparkfleetError, match="is not signed, and sparkfleet_lock_signers wants a signature"):
        Target.of(settings)
    assert world.run("--update", "--yes", "-e", f"sparkfleet_lock_key={key}") == 0
    assert Target.of(settings).lock == world.read()
    world.path.unlink()  # nor is the lock left out by removing it
    with pytest.raises(SparkfleetError, match="sparkfleet_lock_signers wants a signed lock, and there is none"):
        Target.of(dataclasses.replace(settings, lock_file=""))


PACKAGES = {"ubuntu noble aarch64": {"docker.io": "27.5.1-0ubuntu3", "runc": "1.1.12-0ubuntu3"}}


@pytest.mark.parametrize("signed", [True, False])
def test_packages_of_a_lock_that_was_changed_are_not_signed_again(
    world: World, capsys: Captured, tmp_path: Path, signed: bool
) -> None:
    """Registry and Hub know nothing of them, so what a forger wrote would be taken as it is."""
    key = test_signature.make(tmp_path, "alice")
    more = ["-e", f"sparkfleet_lock_key={key}"] if signed else []
    if signed:
        world.inventory(sparkfleet_lock_signers=test_signature.signers(tmp_path, key))
    assert world.run(*more) == 0
    own = dataclasses.replace(world.read(), packages=PACKAGES)
    own.write()
    if signed:
        signature.sign(world.path, str(key), signature.LOCK)
    assert world.run("--update", "--yes", *more) == 0 and world.read().packages == PACKAGES
    text = world.path.read_text(encoding="utf-8")
    world.path.write_text(text.replace("27.5.1-0ubuntu3", "20.10.0-evil1"), encoding="utf-8")
    capsys.readouterr()
    assert world.run("--update", "--yes", *more) == 0
    said = "packages of ubuntu noble aarch64: removed, as the lock was changed by hand or is not signed"
    assert said in capsys.readouterr().out and world.read().packages == {}


def test_a_package_that_is_not_ours_is_refused(world: World, capsys: Captured) -> None:
    assert world.run() == 0
    dataclasses.replace(world.read(), packages=PACKAGES).write()
    text = world.path.read_text(encoding="utf-8")
    world.path.write_text(text.replace("runc:", "openssl:"), encoding="utf-8")
    assert world.run("--update", "--yes") == 2
    assert "openssl: not a package that Sparkfleet installs" in capsys.readouterr().err


def test_a_key_that_does_not_sign_changes_nothing(world: World, capsys: Captured, tmp_path: Path) -> None:
    key, locked = test_signature.make(tmp_path, "alice"), test_signature.make(tmp_path, "bob", "a passphrase")
    for bad in ("/nope/key", str(locked)):
        assert world.run("-e", f"sparkfleet_lock_key={bad}") == 2
        assert "sparkfleet_lock_key: " in capsys.readouterr().err and not world.path.exists()
    assert world.run("-e", f"sparkfleet_lock_key={key}") == 0
    made = signature.beside(world.path).read_bytes()
    assert world.run("-e", f"sparkfleet_lock_key={locked}") == 2
    assert signature.beside(world.path).read_bytes() == made
    allowed = test_signature.signers(tmp_path, key)
    assert Lock.read(world.path, signers=allowed) == world.read()


def test_a_lock_that_is_there_is_signed_as_the_message_says(world: World, capsys: Captured, tmp_path: Path) -> None:
    assert world.run() == 0
    key = test_signature.make(tmp_path, "alice")
    world.inventory(sparkfleet_lock_signers=test_signature.signers(tmp_path, key))
    capsys.readouterr()
    assert world.run("-e", f"sparkfleet_lock_key={key}") == 2
    said = " ".join(capsys.readouterr().err.split())
    command = said[said.index("ssh-keygen") :].replace("KEY", str(key)).replace("FILE", str(world.path))
    subprocess.run(shlex.split(command), check=True, capture_output=True, timeout=30)
    assert world.run("-e", f"sparkfleet_lock_key={key}") == 0


@pytest.mark.parametrize(
    ("values", "words", "problem"),
    [
        ({"sparkfleet_model_source": "hub"}, [], "spark-1: sparkfleet_model_source: with hub"),
        ({"sparkfleet_lock_file": "relative.yml"}, [], "sparkfleet_lock_file: must be an absolute path"),
        ({}, ["--check"], "there is no lock"),
        ({}, ["--update", "x"], "there is no lock"),
        ({"sparkfleet_imag": "x"}, [], "sparkfleet_imag: unknown variable"),
    ],
)
def test_bad_input(world: World, capsys: Captured, values: dict[str, Any], words: list[str], problem: str) -> None:
    world.inventory(**values)
    assert world.run(*words) == 2
    assert problem in capsys.readouterr().err
    assert world.hub.asked == []


def test_two_cards_of_one_name_are_refused(world: World, capsys: Captured) -> None:
    other = world.folder / "other.yml"
    shutil.copy(world.card, other)
    other.write_text(other.read_text().replace("max_num_seqs: ", "max_num_seqs: 1"))
    hosts = json.loads((world.folder / "hosts.yml").read_text())
    hosts["sparks"]["hosts"]["spark-2"] = {"sparkfleet_model": str(other)}
    (world.folder / "hosts.yml").write_text(json.dumps(hosts))
    assert world.run() == 2
    assert "two different model cards are called llama31-8b-fp8" in capsys.readouterr().err


def test_a_dry_rollout_takes_the_lock(world: World, capsys: Captured) -> None:
    inventory = str(world.folder / "hosts.yml")
    world.run()
    capsys.readouterr()
    assert main.main(["rollout", "--dry", "--json", "-i", inventory]) in (0, 3)
    assert f"{IMAGE}@{world.read().images[IMAGE].digest}" in capsys.readouterr().out
    assert main.main(["rollout", "--dry", "-i", inventory, "-e", "sparkfleet_revision=v2"]) == 2
    assert "the model acme/tiny@v2 is not in the lock" in capsys.readouterr().err
