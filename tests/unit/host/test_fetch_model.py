"""The download itself: the client that is packed for a Spark, run as there, against a Hub in this process."""

from __future__ import annotations

import errno
import gzip
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import share
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.cache import (
    MOST_FILES,
    manifest_path,
    mark_suspect,
    model_state,
)
from sparkfleet_host import fetch_model

from tests.unit.fakes.clock import set_time
from tests.unit.fakes.fake_hub import Hub, serve

SHARD = random.Random(1).randbytes(3_000_000)  # noqa: S311


@pytest.fixture
def hub() -> Iterator[Hub]:
    files = {
        "config.json": b'{"a": 1}',
        "sub/notes.txt": b"hello",
        "model-1.safetensors": SHARD,
        "model-2.safetensors": SHARD[::-1],
        "original/weights.pth": b"x" * 1000,
    }
    with serve(Hub(files=files, large=("model-1.safetensors", "model-2.safetensors"))) as served:
        yield served


def start(
    client: Path, hub: Hub, cache: Path, *more: str, token: Path | None = None, **constants: float
) -> subprocess.Popen[str]:
    """The client; with `constants`, other ones of the module."""
    environment = {"HF_ENDPOINT": hub.url, "HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    environment["HF_TOKEN_PATH"] = str(token or cache / "none")
    given = {"--repo": hub.repo, "--revision": "main", "--cache-dir": str(cache)}
    flags = ("--remote-code", "--list", "--without-weights", "--lock", "--pickle")  # those without a value
    code = [word for word in more if word in flags]
    more = tuple(word for word in more if word not in code)
    given.update(zip(more[::2], more[1::2], strict=True))
    program = [str(client)]
    if constants:
        lines = ["import sys", f"sys.path.insert(0, {str(client)!r})", "from sparkfleet_host import fetch_model as it"]
        program = [
            "-c",
            "\n".join([*lines, *(f"it.{name} = {value}" for name, value in constants.items()), "it.run()"]),
        ]
    argv = [sys.executable, "-I", "-B", "-S", *program, *(word for pair in given.items() for word in pair), *code]
    return subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def fetch(
    client: Path, hub: Hub, cache: Path, *more: str, token: Path | None = None, **constants: float
) -> list[dict[str, Any]]:
    process = start(client, hub, cache, *more, token=token, **constants)
    out, err = process.communicate(timeout=60)
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines, err
    assert process.returncode == (0 if "result" in lines[-1] else 1)
    return lines


def test_downloads_checks_and_writes_the_manifest(client: Path, hub: Hub, tmp_path: Path) -> None:
    lines = fetch(client, hub, tmp_path)
    size = sum(len(content) for name, content in hub.files.items() if name != "original/weights.pth")
    assert lines[-1]["result"] == {
        "commit": hub.commit,
        "path": str(tmp_path / "models--acme--tiny/snapshots" / hub.commit),
        "files": 4,
        "bytes": size,
        "downloaded": size,
        "model_bytes": size,
    }
    progress = [line["progress"] for line in lines[:-1]]
    assert {"phase": "downloading", "done": size, "total": size} in progress
    assert progress[-1] == {"phase": "checking", "done": size, "total": size}
    state = model_state(tmp_path, hub.repo, "main")
    assert (state["complete"], state["commit"], state["bytes"], state["missing"]) == (True, hub.commit, size, [])
    snapshot = Path(state["path"])
    assert (snapshot / "model-1.safetensors").read_bytes() == SHARD
    assert (snapshot / "model-1.safetensors").is_symlink()
    assert not (snapshot / "original").exists()
    assert json.loads(manifest_path(tmp_path, hub.repo, hub.commit).read_text())["files"]["config.json"] == {
        "size": 8,
        "sha1": hub.hash("config.json"),
    }


def test_without_safetensors_nothing_is_ignored(client: Path, hub: Hub, tmp_path: Path) -> None:
    hub.files = {"config.json": b"{}", "original/weights.pth": b"x" * 1000}
    assert fetch(client, hub, tmp_path, "--pickle")[-1]["result"]["files"] == 2


def test_patterns_are_obeyed(client: Path, hub: Hub, tmp_path: Path) -> None:
    result = fetch(client, hub, tmp_path, "--allow", "*.json", "--ignore", "sub/*")[-1]["result"]
    assert result["files"] == 1


def test_without_weights_a_model_is_not_complete_and_a_download_of_all_takes_what_is_there(
    client: Path, hub: Hub, tmp_path: Path
) -> None:
    result = fetch(client, hub, tmp_path, "--without-weights")[-1]["result"]
    small = len(hub.files["config.json"]) + len(hub.files["sub/notes.txt"])
    assert (result["files"], result["bytes"], result["downloaded"]) == (2, small, small)
    assert result["model_bytes"] == small + 2 * len(SHARD)
    state = model_state(tmp_path, hub.repo, "main")
    assert (state["complete"], state["config"], state["commit"]) == (False, True, hub.commit)
    assert not model_state(tmp_path, hub.repo, "main", remote_code=True)["config"]
    assert not manifest_path(tmp_path, hub.repo, hub.commit).with_name("fetching.json").exists()
    (tmp_path / "models--acme--tiny" / "snapshots" / hub.commit / "config.json").unlink()
    assert not model_state(tmp_path, hub.repo, "main")["config"]
    fetch(client, hub, tmp_path, "--without-weights")
    asked = len(hub.gets("config.json"))
    result = fetch(client, hub, tmp_path)[-1]["result"]
    assert result["downloaded"] == 2 * len(SHARD) and len(hub.gets("config.json")) == asked
    state = model_state(tmp_path, hub.repo, "main")
    assert state["complete"] and state["config"]
    assert [path.name for path in manifest_path(tmp_path, hub.repo, hub.commit).parent.iterdir()] == [
        f"{hub.commit}.json"
    ]


def test_killed_half_way_resumes_where_it_was(client: Path, hub: Hub, tmp_path: Path) -> None:
    hub.rate = 2_000_000
    process = start(client, hub, tmp_path)
    partial = tmp_path / "models--acme--tiny/blobs" / f"{hub.hash('model-1.safetensors')}.incomplete"
    deadline = time.monotonic() + 20
    while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    had = partial.stat().st_size
    assert 0 < had < len(SHARD)
    hub.rate = 0
    hub.asked.clear()
    result = fetch(client, hub, tmp_path)[-1]["result"]
    assert hub.gets("model-1.safetensors") == [f"bytes={had}-"]
    assert result["downloaded"] <= result["bytes"] - had
    assert (Path(result["path"]) / "model-1.safetensors").read_bytes() == SHARD


def test_partial_file_of_an_interrupted_hf_download_is_used(client: Path, hub: Hub, tmp_path: Path) -> None:
    blobs = tmp_path / "models--acme--tiny/blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hub.hash('model-1.safetensors')}.0badcafe.incomplete").write_bytes(SHARD[:1_000_000])
    (blobs / "other.incomplete").write_bytes(b"another model's")
    fetch(client, hub, tmp_path)
    assert hub.gets("model-1.safetensors") == ["bytes=1000000-"]
    assert sorted(path.name for path in blobs.glob("*.incomplete")) == ["other.incomplete"]


def test_connection_cut_is_resumed_within_a_run(client: Path, hub: Hub, tmp_path: Path) -> None:
    hub.cut_at["model-2.safetensors"] = 1_500_000
    assert "result" in fetch(client, hub, tmp_path)[-1]


def test_downloaded_by_hand_is_checked_and_recorded_without_download(client: Path, hub: Hub, tmp_path: Path) -> None:
    fetch(client, hub, tmp_path)
    manifest_path(tmp_path, hub.repo, hub.commit).unlink()
    assert model_state(tmp_path, hub.repo, "main")["complete"] is False
    hub.asked.clear()
    assert fetch(client, hub, tmp_path)[-1]["result"]["downloaded"] == 0
    assert not [path for method, path, _ in hub.asked if method == "GET" and "/resolve/" in path]
    assert model_state(tmp_path, hub.repo, "main")["complete"] is True


@pytest.mark.parametrize("name", ["model-1.safetensors", "config.json"])
def test_damaged_file_is_fetched_again(client: Path, hub: Hub, tmp_path: Path, name: str) -> None:
    path = Path(fetch(client, hub, tmp_path)[-1]["result"]["path"]) / name
    manifest_path(tmp_path, hub.repo, hub.commit).unlink()
    path.write_bytes(bytes(len(hub.files[name])))
    hub.asked.clear()
    assert fetch(client, hub, tmp_path)[-1]["result"]["downloaded"] == len(hub.files[name])
    assert path.read_bytes() == hub.files[name]
    assert hub.gets(name) == [""]
    assert not [other for other in hub.files if other != name and hub.gets(other)]


@pytest.mark.parametrize("name", ["model-1.safetensors", "config.json"])
def test_wrong_content_once_is_cured(client: Path, hub: Hub, tmp_path: Path, name: str) -> None:
    hub.corrupt[name] = 1
    result = fetch(client, hub, tmp_path)[-1]["result"]
    assert (Path(result["path"]) / name).read_bytes() == hub.files[name]


def test_wrong_content_twice_is_an_error(client: Path, hub: Hub, tmp_path: Path) -> None:
    hub.corrupt["model-1.safetensors"] = 2
    error = fetch(client, hub, tmp_path)[-1]["error"]
    assert error["id"] == "checksum"
    assert "model-1.safetensors" in error["message"]
    assert model_state(tmp_path, hub.repo, hub.commit)["complete"] is False


def test_gated(client: Path, hub: Hub, tmp_path: Path) -> None:
    hub.gated, hub.tokens = True, {"hf_alice": True, "hf_bob": False}
    token = tmp_path / "token"
    assert fetch(client, hub, tmp_path)[-1]["error"]["id"] == "hub-token-missing"
    token.write_text("hf_bob\n")
    error = fetch(client, hub, tmp_path, token=token)[-1]["error"]
    assert error["id"] == "hub-no-access"
    assert f"{hub.url}/{hub.repo}" in error["message"]
    assert "hf_bob" not in json.dumps(error)
    token.write_text("hf_wrong")
    error = fetch(client, hub, tmp_path, token=token)[-1]["error"]
    assert (error["id"], "not accept the token" in error["message"]) == ("hub-token-missing", True)
    token.write_text("hf_alice\n")
    assert "result" in fetch(client, hub, tmp_path, token=token)[-1]


def test_unknown_repository_and_revision(client: Path, hub: Hub, tmp_path: Path) -> None:
    error = fetch(client, hub, tmp_path, "--repo", "acme/nothing")[-1]["error"]
    assert (error["id"], "acme/nothing" in error["message"]) == ("hub-repo-unknown", True)
    error = fetch(client, hub, tmp_path, "--revision", "v9")[-1]["error"]
    assert (error["id"], "v9" in error["message"]) == ("hub-revision-unknown", True)


def test_unreachable(client: Path, tmp_path: Path) -> None:
    error = fetch(client, Hub(url="http://127.0.0.1:9"), tmp_path)[-1]["error"]
    assert error["id"] == "hub-unreachable"
    assert "http://127.0.0.1:9" in error["message"]


# -- a Hub that lies -------------------------------------------------------------------------------------------------


def entry(**change: Any) -> dict[str, Any]:
    return {"type": "file", "path": "x", "size": 1, "oid": "0" * 40, **change}


@pytest.mark.parametrize(
    "more",
    [
        entry(path="../../x"),
        entry(path="/etc/cron.d/x"),
        entry(path=".git/config"),
        entry(path="a\nb"),
        entry(path="a/../../b"),
        entry(oid="../../../etc/x"),
        entry(oid=""),
        entry(size=-1),
        entry(size=1 << 60),
        entry(lfs={"oid": "../../x", "size": 1, "pointerSize": 130}),
    ],
)
def test_a_name_size_or_hash_that_cannot_be_is_refused(
    client: Path, hub: Hub, tmp_path: Path, more: dict[str, Any]
) -> None:
    hub.more = [more]
    (tmp_path / "hf").mkdir()
    error = fetch(client, hub, tmp_path / "hf")[-1]["error"]
    assert error["id"] == "hub-answer-odd", error
    assert list(tmp_path.rglob("*")) == [tmp_path / "hf"]
    assert not hub.gets("model-1.safetensors")


def test_names_that_are_odd_but_can_be_are_fetched(client: Path, hub: Hub, tmp_path: Path) -> None:
    hub.files |= {".gitattributes": b"a", "a/b/c.json": b"{}"}
    snapshot = Path(fetch(client, hub, tmp_path)[-1]["result"]["path"])
    assert (snapshot / ".gitattributes").read_bytes() == b"a" and (snapshot / "a/b/c.json").is_symlink()


@pytest.mark.parametrize("verb", ["revision", "tree"])
@pytest.mark.parametrize("body", [b"", b"[", b"5", b'{"sha": 5}', b'[{"type": "file"}]', b"null", b"[" * 100_000])
def test_an_odd_answer_is_one_failure(client: Path, hub: Hub, tmp_path: Path, verb: str, body: bytes) -> None:
    hub.answer[verb] = body
    error = fetch(client, hub, tmp_path)[-1]["error"]
    assert error["id"] in ("hub-answer-odd", "hub-revision-unknown"), error


def test_an_answer_without_end_is_not_read_to_its_end(client: Path, hub: Hub, tmp_path: Path) -> None:
    hub.answer["tree"] = b" " * (17 << 20)
    error = fetch(client, hub, tmp_path)[-1]["error"]
    assert (error["id"], "more than 16777216 bytes" in error["message"]) == ("hub-answer-odd", True)


@pytest.mark.parametrize("verb", ["revision", "tree"])
@pytest.mark.parametrize("kind", [" ", "[],"])
def test_an_answer_is_bounded_wherever_it_was_redirected_to(
    client: Path, hub: Hub, tmp_path: Path, verb: str, kind: str
) -> None:
    body = {"revision": {"id": hub.repo, "sha": hub.commit}, "tree": hub.tree()}[verb]
    filler = 17 << 20 if kind == " " else 1 << 20
    hub.files["list"] = f"[{kind * filler}{json.dumps(body)}]".encode()
    hub.redirect[verb] = f"/{hub.repo}/resolve/{hub.commit}/list"
    error = fetch(client, hub, tmp_path, "--list")[-1]["error"]
    what = "more than 16777216 bytes" if kind == " " else "more than 400000 values"
    assert error["id"] == "hub-answer-odd" and what in error["message"], error
    assert hub.gets("list") == [""]


@pytest.mark.parametrize("name", ["model-1.safetensors", "sub/notes.txt"])
def test_the_body_of_a_files_redirect_is_no_file(client: Path, hub: Hub, tmp_path: Path, name: str) -> None:
    hub.redirect[name] = f"/{hub.repo}/resolve/{hub.commit}/config.json"
    hub.redirect_body = bytes(2 << 20)
    error = fetch(client, hub, tmp_path)[-1]["error"]
    assert error["id"] == "hub-answer-odd" and "more than 1048576 bytes" in error["message"], error


def test_a_file_is_not_bounded_as_an_answer_is(client: Path, hub: Hub, tmp_path: Path) -> None:
    hub.files["tokenizer.json"] = b"[0" + b",0" * (9 << 20) + b"]"
    assert len(hub.files["tokenizer.json"]) > fetch_model.ANSWER
    result = fetch(client, hub, tmp_path)[-1]["result"]
    assert (Path(result["path"]) / "tokenizer.json").read_bytes() == hub.files["tokenizer.json"]


@pytest.mark.parametrize("name", ["revision", "tree", "model-1.safetensors", "config.json"])
def test_nothing_compressed_is_read(client: Path, hub: Hub, tmp_path: Path, name: str) -> None:
    """Whether or not it would be what it should be once it is unpacked."""
    hub.encoding[name] = "gzip"
    if name == "tree":
        hub.answer["tree"] = gzip.compress(json.dumps(hub.tree()).encode())
    error = fetch(client, hub, tmp_path)[-1]["error"]
    assert error["id"] == "hub-answer-odd" and "compressed" in error["message"], error
    assert name not in hub.files or not (tmp_path / "models--acme--tiny/blobs" / hub.hash(name)).exists()


def test_the_longest_list_of_a_peer_is_within_the_limits() -> None:
    hash = "1" * 64
    files = {f"folder/model-{n:05}-of-20000.safetensors": {"size": 1 << 33, "sha256": hash} for n in range(MOST_FILES)}
    body = json.dumps(share.tree({"commit": "0" * 40, "files": files})).encode()
    assert len(body) < fetch_model.ANSWER / 2
    assert sum(body.count(mark) for mark in b"[{,") < fetch_model.VALUES * 0.6


def test_a_list_without_end_is_not_followed(client: Path, hub: Hub, tmp_path: Path) -> None:
    hub.more = [entry(path=f"f{number}", oid=f"{number:040x}") for number in range(9_000)]
    hub.next_page = f"{hub.url}/api/models/{hub.repo}/tree/{hub.commit}"
    error = fetch(client, hub, tmp_path)[-1]["error"]
    assert error["id"] == "hub-answer-odd" and "more than 20000 files" in error["message"]


def test_empty_pages_without_end_are_not_followed(client: Path, hub: Hub, tmp_path: Path) -> None:
    hub.files = {"config.json": b"{}"}
    hub.answer["tree"] = b"[]"
    hub.next_page = f"{hub.url}/api/models/{hub.repo}/tree/{hub.commit}"
    error = fetch(client, hub, tmp_path)[-1]["error"]
    assert error["id"] == "hub-answer-odd" and "more than 400 pages" in error["message"]
    assert len([path for _, path, _ in hub.asked if "/tree/" in path]) == 400


@pytest.mark.parametrize("more", [("--list",), ()])
def test_a_list_that_comes_byte_by_byte_is_given_up(
    client: Path, hub: Hub, tmp_path: Path, more: tuple[str, ...]
) -> None:
    hub.pause = 0.2  # minutes for the whole list
    error = fetch(client, hub, tmp_path, *more, "--seconds", "0.7")[-1]["error"]
    assert error["id"] == "hub-unreachable" and "within 0.7 s" in error["message"]
    assert not list((tmp_path / "models--acme--tiny").rglob("*"))


@pytest.mark.parametrize("part", ["rest", "redirect"])
def test_a_file_that_comes_byte_by_byte_is_given_up(client: Path, hub: Hub, tmp_path: Path, part: str) -> None:
    hub.drip["model-1.safetensors"] = part
    error = fetch(client, hub, tmp_path, WINDOW=0.5)[-1]["error"]
    assert error["id"] == "hub-unreachable" and "sends model-1.safetensors too slowly" in error["message"], error
    assert len(hub.gets("model-1.safetensors")) == fetch_model.SLOW_ANSWERS
    if part == "rest":  # and the received part is kept for resuming
        partial = tmp_path / "models--acme--tiny/blobs" / f"{hub.hash('model-1.safetensors')}.incomplete"
        assert partial.stat().st_size >= 2 << 20


def test_a_file_whose_head_comes_byte_by_byte_is_given_up(client: Path, hub: Hub, tmp_path: Path) -> None:
    hub.drip["model-1.safetensors"] = "head"
    error = fetch(client, hub, tmp_path, LONGEST=0.5)[-1]["error"]
    assert error["id"] == "hub-unreachable" and "sends model-1.safetensors too slowly" in error["message"], error


def test_a_file_that_becomes_slow_is_resumed(client: Path, hub: Hub, tmp_path: Path) -> None:
    hub.drip["model-1.safetensors"], hub.drips = "rest", 1
    result = fetch(client, hub, tmp_path, WINDOW=0.5)[-1]["result"]
    assert hub.gets("model-1.safetensors") == ["", f"bytes={2 << 20}-"]
    assert (Path(result["path"]) / "model-1.safetensors").read_bytes() == SHARD


def test_a_file_may_take_long_as_long_as_it_comes(client: Path, hub: Hub, tmp_path: Path) -> None:
    hub.rate = 2_000_000
    assert "result" in fetch(client, hub, tmp_path, WINDOW=0.2, LONGEST=0.5)[-1]
    assert hub.gets("model-1.safetensors") == [""]


@pytest.mark.parametrize("name", ["model-1.safetensors", "config.json"])
def test_a_file_is_never_longer_than_its_list_says(client: Path, hub: Hub, tmp_path: Path, name: str) -> None:
    hub.longer[name] = bytes(8 << 20)
    error = fetch(client, hub, tmp_path)[-1]["error"]
    assert error["id"] == "checksum" and f"{name} is longer than" in error["message"]
    assert sum(path.stat().st_size for path in (tmp_path / "models--acme--tiny").rglob("*") if path.is_file()) < 7 << 20


# -- the token -------------------------------------------------------------------------------------------------------


def test_the_token_goes_to_the_hub_alone(client: Path, hub: Hub, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("hf_alice")
    (tmp_path / "hf").mkdir()
    with serve(Hub(files=hub.files, large=hub.large)) as other:
        hub.elsewhere = other.url.replace("127.0.0.1", "localhost")
        hub.next_page = f"{hub.elsewhere}/api/models/{hub.repo}/tree/{hub.commit}"
        result = fetch(client, hub, tmp_path / "hf", token=token)[-1]["result"]
        assert result["files"] == 4  # the other page names the same ones again
        # The client itself asks for that list without a token.
        seen = {token for path, token in hub.tokens_seen if path != "/api/agent-harnesses"}
        assert seen == {"Bearer hf_alice"}
        assert other.tokens_seen and {token for path, token in other.tokens_seen} == {""}


def test_the_token_is_not_sent_in_clear(client: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("hf_alice")
    there = Hub(url="http://192.0.2.1:9")
    error = fetch(client, there, tmp_path, token=token)[-1]["error"]
    assert error["id"] == "hub-token-in-clear" and "https://" in error["message"]


# -- what is left from before ----------------------------------------------------------------------------------------


def test_of_several_partial_files_the_longest_is_used(client: Path, hub: Hub, tmp_path: Path) -> None:
    blobs = tmp_path / "models--acme--tiny/blobs"
    blobs.mkdir(parents=True)
    name = hub.hash("model-1.safetensors")
    for suffix, size in ((".0bad.incomplete", 10), (".incomplete", 2_000_000), (".cafe.incomplete", 999_999)):
        (blobs / f"{name}{suffix}").write_bytes(SHARD[:size])
    result = fetch(client, hub, tmp_path)[-1]["result"]
    assert hub.gets("model-1.safetensors") == ["bytes=2000000-"]
    assert result["downloaded"] == result["bytes"] - 2_000_000
    assert not list(blobs.glob("*.incomplete"))


def test_a_partial_file_that_is_too_long_is_begun_again(client: Path, hub: Hub, tmp_path: Path) -> None:
    blobs = tmp_path / "models--acme--tiny/blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hub.hash('model-1.safetensors')}.incomplete").write_bytes(SHARD + b"more")
    result = fetch(client, hub, tmp_path)[-1]["result"]
    assert hub.gets("model-1.safetensors") == [""]
    assert (Path(result["path"]) / "model-1.safetensors").read_bytes() == SHARD


def test_other_copies_of_the_weights_are_left_out(client: Path, hub: Hub, tmp_path: Path) -> None:
    hub.files |= {"pytorch_model.bin": b"pickle", "sub/x.pt": b"pickle", "model.onnx": b"x", "modeling.py": b"code"}
    snapshot = Path(fetch(client, hub, tmp_path)[-1]["result"]["path"])
    assert sorted(path.name for path in snapshot.iterdir()) == [
        *("config.json", "model-1.safetensors", "model-2.safetensors", "sub"),
    ]
    assert [path.name for path in (snapshot / "sub").iterdir()] == ["notes.txt"]


def test_code_is_fetched_only_where_the_engine_runs_it(client: Path, hub: Hub, tmp_path: Path) -> None:
    """A model that is there without it is complete for one engine and not for the other."""
    hub.files |= {"modeling.py": b"code", "sub/layers.py": b"more"}
    snapshot = Path(fetch(client, hub, tmp_path)[-1]["result"]["path"])
    assert not list(snapshot.rglob("*.py"))
    without, with_code = (model_state(tmp_path, hub.repo, "main", code)["complete"] for code in (False, True))
    assert (without, with_code) == (True, False)
    hub.asked.clear()
    assert fetch(client, hub, tmp_path, "--remote-code")[-1]["result"]["downloaded"] == len(b"code" + b"more")
    assert sorted(path.name for path in snapshot.rglob("*.py")) == ["layers.py", "modeling.py"]
    assert model_state(tmp_path, hub.repo, "main", True)["complete"] is True
    # A list of an earlier version says nothing, and has the code.
    place = manifest_path(tmp_path, hub.repo, hub.commit)
    listing = json.loads(place.read_text())
    del listing["remote_code"]
    place.write_text(json.dumps(listing))
    assert all(model_state(tmp_path, hub.repo, "main", code)["complete"] for code in (False, True))
    # An older list that a bundle or another Spark has is no other model.
    expected = tmp_path / "expected.json"
    expected.write_text(json.dumps({"commit": hub.commit, "files": listing["files"]}))
    result = fetch(client, hub, tmp_path, "--expected", str(expected))[-1]["result"]
    assert result["commit"] == hub.commit and result["files"] == len(listing["files"]) - 2


def test_a_mark_goes_once_all_files_were_hashed(client: Path, hub: Hub, tmp_path: Path) -> None:
    path = Path(fetch(client, hub, tmp_path)[-1]["result"]["path"]) / "model-1.safetensors"
    content = bytearray(SHARD)
    content[5] ^= 1
    path.resolve().write_bytes(content)
    assert model_state(tmp_path, hub.repo, "main")["complete"] is True  # its size is right
    assert mark_suspect(tmp_path, hub.repo, hub.commit, "nonsense")
    hub.asked.clear()
    assert fetch(client, hub, tmp_path, "--revision", hub.commit)[-1]["result"]["downloaded"] == len(SHARD)
    assert path.read_bytes() == SHARD and not hub.gets("model-2.safetensors")
    assert model_state(tmp_path, hub.repo, "main")["complete"] is True


# -- in this process -------------------------------------------------------------------------------------------------


def test_space_is_the_sum_of_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    download = fetch_model.Fetch(fetch_model.Request("acme/tiny", "main", tmp_path))
    download.files = [fetch_model.RemoteFile(f"f{n}", 40, f"{n:064x}", True) for n in range(3)]
    monkeypatch.setattr(fetch_model.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(fetch_model.FetchError) as caught:
        download._check_space(0)
    assert caught.value.id == "disk-full"
    download._check_space(20)  # of 120 bytes 20 are here
    blobs = download.request.folder / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{1:064x}.incomplete").write_bytes(b"x" * 30)
    (blobs / f"{2:064x}").write_bytes(b"x" * 40)
    assert download._on_disk() == 70


def test_what_the_disk_takes_does_not_count_as_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(httpx2.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            for _ in range(4):
                now[0] += 50
                yield b"x" * 600_000

    now = [0.0]
    set_time(monkeypatch, fetch_model, monotonic=lambda: now[0])
    pace = fetch_model.Pace("f")
    for _ in fetch_model.Paced(Stream(), pace):
        now[0] += 1000  # it is written
    assert (pace.bytes, pace.slow_answers) == (2_400_000, 0)
    monkeypatch.setattr(fetch_model, "SLOWEST", 12_001)
    with pytest.raises(httpx2.ReadTimeout, match="1800000 bytes in 150 s"):
        list(fetch_model.Paced(Stream(), pace))


def test_a_cache_that_is_read_only_is_named(tmp_path: Path) -> None:
    failure = fetch_model.explain(OSError(errno.EROFS, "x"), fetch_model.Request("acme/tiny", "main", tmp_path))
    assert failure.id == "cache-read-only" and "findmnt" in str(failure)


def test_weights_that_may_run_code_are_refused_unless_they_are_asked_for(
    client: Path, hub: Hub, tmp_path: Path
) -> None:
    """A repository with safetensors has them ignored; one without must not bring them unasked."""
    hub.files = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    hub.large = ("pytorch_model.bin",)
    for words in ([], ["--list"], ["--lock"]):
        error = fetch(client, hub, tmp_path / "hf", *words)[-1]["error"]
        assert error["id"] == "weights-pickle" and "pytorch_model.bin is a pickle" in error["message"]
    assert hub.gets("pytorch_model.bin") == []
    assert fetch(client, hub, tmp_path / "hf", "--pickle")[-1]["result"]["files"] == 2
    hub.files["model.safetensors"] = b"w" * 100
    assert fetch(client, hub, tmp_path / "other")[-1]["result"]["files"] == 2
    assert not list((tmp_path / "other").rglob("pytorch_model.bin"))
