"""The controller asks what a tag stands for, once a run; no Spark is believed."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from sparkfleet_host import registry

from sparkfleet import SparkfleetError
from sparkfleet.fleet import image_digest
from tests.unit.fakes.authority import Authority
from tests.unit.fakes.fake_registry import FakeRegistry, digest, reply, serving

IMAGE = "nvcr.io/nvidia/vllm:1"


@pytest.fixture
def upstream() -> Iterator[FakeRegistry]:
    with serving(FakeRegistry()) as made:
        yield made


def test_the_registry_says_it(upstream: FakeRegistry) -> None:
    found = image_digest.resolve(f"{upstream.address}/nvidia/vllm:1", {})
    assert found == image_digest.Answer(digest(upstream.index))


def test_a_registry_with_a_private_ca(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Docker does not verify registries on loopback.
    monkeypatch.setattr(registry, "insecure", lambda *_: False)
    authority = Authority(tmp_path)
    with serving(FakeRegistry(), authority.server) as upstream:
        image = f"{upstream.address}/nvidia/vllm:1"
        assert "CERTIFICATE_VERIFY_FAILED" in image_digest.resolve(image, {}).reason
        assert image_digest.resolve(image, {}, ca=authority.pem) == image_digest.Answer(digest(upstream.index))
        asked = (tmp_path, image, {}, "", "", None)
        assert image_digest.of_run(*asked, authority.pem)[0] == image_digest.Answer(digest(upstream.index))


def test_another_registry_with_the_same_repositories_is_asked(upstream: FakeRegistry, tmp_path: Path) -> None:
    assert image_digest.resolve(IMAGE, {"nvcr.io": upstream.address}).digest == digest(upstream.index)
    assert upstream.paths() == ["/v2/nvidia/vllm/manifests/1"]
    upstream.token, upstream.challenge = "x", "Basic realm=x"
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"auths": {upstream.address: {"auth": base64.b64encode(b"u:p").decode()}}}))
    found = image_digest.resolve(IMAGE, {"nvcr.io": upstream.address}, config=str(config))
    assert "401" in found.reason
    assert upstream.seen[-1][1]["Authorization"].startswith("Basic ")


def basic(registry: FakeRegistry, login: str) -> None:
    """Let a registry answer only this login."""
    wanted = f"Basic {base64.b64encode(login.encode()).decode()}"

    def answer(handler: BaseHTTPRequestHandler) -> None:
        if handler.headers.get("Authorization") == wanted:
            reply(handler, registry.index)
        else:
            reply(handler, b"", 401, {"WWW-Authenticate": 'Basic realm="private"'})

    registry.answers["/v2/nvidia/vllm/manifests/1"] = answer


def test_a_registry_with_a_login_of_the_inventory(upstream: FakeRegistry, tmp_path: Path) -> None:
    basic(upstream, "$oauthtoken:pass:word")
    ours = {"username": "$oauthtoken", "password": "pass:word"}
    none, image = str(tmp_path / "none"), f"{upstream.address}/nvidia/vllm:1"

    def ask(image: str, logins: dict[str, dict[str, str]], config: str = none, **where: str) -> image_digest.Answer:
        return image_digest.resolve(image, where, config=config, logins=logins)

    assert "requires a login" in ask(image, {}).reason
    assert "requires a login" in ask(image, {"other": ours}).reason
    assert "401" in ask(image, {upstream.address: {**ours, "password": "wrong"}}).reason
    right = image_digest.Answer(digest(upstream.index))
    assert ask(image, {upstream.address: ours}) == right
    # A registry with the same content is asked with the login of the one that it stands for.
    assert image_digest.resolve(IMAGE, {"nvcr.io": upstream.address}, config=none, logins={"nvcr.io": ours}) == right
    # The user's own login comes after it.
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"auths": {upstream.address: {"auth": base64.b64encode(b"u:p").decode()}}}))
    assert ask(image, {upstream.address: ours}, str(config)) == right


def test_a_digest_is_itself_and_asks_nobody() -> None:
    wanted = "sha256:" + "1" * 64
    assert image_digest.resolve(f"{IMAGE}@{wanted}", {"nvcr.io": "127.0.0.1:9"}) == image_digest.Answer(wanted)


def test_a_registry_that_is_not_reached_is_a_reason(upstream: FakeRegistry) -> None:
    found = image_digest.resolve(IMAGE, {"nvcr.io": "127.0.0.1:9"})
    assert found.digest == "" and "127.0.0.1:9" in found.reason
    assert "404" in image_digest.resolve(f"{upstream.address}/other:2", {}).reason


def test_a_registry_that_has_always_something_to_say_is_not_listened_to(upstream: FakeRegistry) -> None:
    """Each answer is in time, and there are too many of them; or one has no end."""

    def another(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.3)
        reply(handler, b"", 307, {"Location": f"{handler.path}x"})

    def endless(handler: BaseHTTPRequestHandler) -> None:
        with contextlib.suppress(OSError):
            for byte in b"HTTP/1.1 200 OK\r\n" + b"X-A: 1\r\n" * 20:
                handler.wfile.write(bytes([byte]))
                time.sleep(0.05)

    path = "/v2/nvidia/vllm/manifests/1"
    upstream.answers = {path + "x" * n: another for n in range(5)}
    for _ in range(2):
        began = time.monotonic()
        found = image_digest.resolve(f"{upstream.address}/nvidia/vllm:1", {}, seconds=0.4)
        assert (found.digest, "no answer within 0.4 s" in found.reason) == ("", True)
        assert time.monotonic() - began < 2
        upstream.answers = {path: endless}


def test_a_name_server_without_an_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(10) and [])
    found = image_digest.resolve("registry.example/a:1", {}, seconds=0.2)
    assert "no answer within 0.2 s" in found.reason
    over.set()


@pytest.mark.parametrize("host", ["http://x", "x/y", "a b", "x:99999999", "x:y"])
def test_a_registry_that_is_no_host_is_refused(host: str) -> None:
    with pytest.raises(SparkfleetError, match=r"sparkfleet_controller_registries: nvcr\.io"):
        image_digest.resolve(IMAGE, {"nvcr.io": host})
    with pytest.raises(SparkfleetError, match="NAME:TAG"):
        image_digest.resolve("a b", {})


def test_a_run_asks_once(upstream: FakeRegistry, tmp_path: Path) -> None:
    ways = {"nvcr.io": upstream.address}
    first = digest(upstream.index)
    assert image_digest.of_run(tmp_path, IMAGE, ways) == (image_digest.Answer(first), True)
    upstream.serve_tag(upstream.manifest)  # the tag moves
    assert image_digest.of_run(tmp_path, IMAGE, ways) == (image_digest.Answer(first), False)
    assert len(upstream.seen) == 1
    assert image_digest.of_run(tmp_path, "nvcr.io/other:1", ways)[1]
    assert image_digest.of_run(tmp_path, IMAGE, ways)[0].digest == first


@pytest.mark.parametrize("no_proxy", ["", "registry.example"])
def test_the_inventorys_proxy(monkeypatch: pytest.MonkeyPatch, no_proxy: str) -> None:
    for name in ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    seen: list[object] = []
    monkeypatch.setattr(
        image_digest, "digest_of", lambda registry, tag: seen.append((registry.host, tag)) or "sha256:x"
    )
    made: list[dict[str, object]] = []
    real = image_digest.Registry
    monkeypatch.setattr(
        image_digest, "Registry", lambda ref, info, *rest, **more: made.append(info) or real(ref, info, *rest, **more)
    )
    image_digest.resolve("registry.example/a:1", {}, "http://proxy:3128", no_proxy)
    assert made == [{"HttpProxy": "http://proxy:3128", "HttpsProxy": "http://proxy:3128", "NoProxy": no_proxy}]
    monkeypatch.setenv("HTTPS_PROXY", "http://mine:1")
    image_digest.resolve("registry.example/a:1", {}, "http://proxy:3128", no_proxy)
    assert made[1]["HttpsProxy"] == "http://mine:1"
    assert seen == [("registry.example", "1")] * 2
