"""A registry that is not trusted: names, sizes, time, credentials, and how Docker would reach it."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import registry as registries
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.bounded import DIGEST, BoundsError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.job import JobError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.registry import (
    Layout,
    Registry,
    RegistryError,
    bypasses,
    digest_of,
    insecure,
    layer_sizes,
    parse_manifest,
    reference,
    resolve,
)
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.fakes.fake_registry import FakeRegistry, certificate, digest, image_manifest, reply, serving

Handler = BaseHTTPRequestHandler
EVIL = "sha256:../../../../../etc/cron.d/evil"


@pytest.fixture
def upstream() -> Iterator[FakeRegistry]:
    with serving(FakeRegistry()) as made:
        yield made


def client(upstream: FakeRegistry, auth: dict[str, str] | None = None, **info: Any) -> Registry:
    return Registry(reference(f"{upstream.address}/nvidia/vllm:1"), info, auth, timeout=5)


@pytest.fixture
def layout(upstream: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    monkeypatch.setattr(registries, "TRIES", 1)
    made = Layout(tmp_path / "store")
    made.add("the/image:1", client(upstream), "arm64")
    return made


def blob_path(digest: str) -> str:
    return f"/v2/nvidia/vllm/blobs/{digest}"


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "registry", "path", "familiar"),
    [
        ("docker.io/debian:12", "docker.io", "library/debian", "debian"),
        ("index.docker.io/vllm/vllm-openai:v1", "docker.io", "vllm/vllm-openai", "vllm/vllm-openai"),
        ("vllm/vllm-openai:v1", "docker.io", "vllm/vllm-openai", "vllm/vllm-openai"),
        ("localhost/a:1", "localhost", "a", "localhost/a"),
        ("Upper/a:1", "Upper", "a", "Upper/a"),
        ("reg.test:5000/a/b__c:x@sha256:" + "1" * 64, "reg.test:5000", "a/b__c", "reg.test:5000/a/b__c"),
    ],
)
def test_a_reference_is_understood_as_docker_does(image: str, registry: str, path: str, familiar: str) -> None:
    found = reference(image)
    assert (found.registry, found.path, found.familiar) == (registry, path, familiar)


@pytest.mark.parametrize(
    "image",
    [
        "nvcr.io/../../etc:1",
        "../a:1",
        "nvcr.io/nvidia/vLLM:1",
        "nvcr.io//a:1",
        "reg.test:99999999/a:1",
        "nvcr.io/a:1\n",
        "nvcr.io/ä:1",
        "nvcr.io/a:" + "x" * 129,
        "nvcr.io/a@sha256:" + "g" * 64,
        "nvcr.io/a:1@",
        "a" * 600 + ":1",
        "-x/a:1",
        "nvcr.io/a:1@sha256:" + "1" * 64 + "\n",
    ],
)
def test_a_reference_that_docker_would_refuse_is_refused(image: str) -> None:
    with pytest.raises(JobError, match="NAME:TAG") as refused:
        reference(image)
    assert refused.value.id == "bad-input"
    assert "\n" not in str(refused.value)


@given(st.text(max_size=80) | st.from_regex(r"[a-z.:/@A-Z0-9_-]{0,60}", fullmatch=True))
def test_any_text_is_a_reference_or_refused(text: str) -> None:
    try:
        found = reference(text)
    except JobError:
        return
    assert found.name + (f":{found.tag}" if found.tag else "") + (f"@{found.digest}" if found.digest else "") == text
    assert ".." not in found.path and not found.path.startswith("/")
    again = reference(found.local)
    assert (again.registry, again.path) == (found.registry, found.path)


@pytest.mark.parametrize(
    "config",
    [
        "[]",
        '{"auths": []}',
        '{"auths": {"r": 5}}',
        '{"auths": {"r": {"auth": 5}}}',
        '{"auths": {"r": {"auth": "!"}}}',
        "",
    ],
)
def test_a_damaged_login_is_none(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    assert registries.credentials(tmp_path / "config.json", "r") is None


def test_docker_hub_has_a_name_of_its_own_in_the_logins(tmp_path: Path) -> None:
    auth = base64.b64encode(b"u:p\0").decode()
    (tmp_path / "config.json").write_text(json.dumps({"auths": {"https://index.docker.io/v1/": {"auth": auth}}}))
    found = registries.credentials(tmp_path / "config.json", "docker.io")
    assert found == {"username": "u", "password": "p", "serveraddress": "https://index.docker.io/v1/"}


# -- proxies, registries without TLS ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "port", "no_proxy", "expected"),
    [
        ("registry.corp", 443, "", False),
        ("registry.corp", 443, "corp", True),
        ("registry.corp", 443, ".corp", True),
        ("corp", 443, ".corp", False),
        ("registry.corp", 443, "*.corp", True),
        ("corp", 443, "*.corp", False),
        ("registry.corp", 443, "a, REGISTRY.CORP ,b", True),
        ("xregistry.corp", 443, "registry.corp", False),
        ("registry.corp.", 443, "registry.corp", True),
        ("registry.corp", 5000, "registry.corp:5000", True),
        ("registry.corp", 443, "registry.corp:5000", False),
        ("10.1.2.3", 443, "10.0.0.0/8", True),
        ("11.1.2.3", 443, "10.0.0.0/8", False),
        ("registry.corp", 443, "10.0.0.0/8", False),
        ("10.1.2.3", 443, "10.0.0.0/33", False),  # no network
        ("10.1.2.3", 443, "10.1.2.3", True),
        ("10.1.2.30", 443, "10.1.2.3", False),
        ("10.1.2.3", 80, "10.1.2.3:443", False),
        ("fd00::1", 443, "fd00::/8", True),
        ("[fd00::1]", 443, "[fd00::1]:443", True),
        ("fd00::1", 443, "fd00::1", True),
        ("anything", 1, "*", True),
        ("localhost", 1, "", True),
        ("127.0.0.9", 1, "", True),
        ("::1", 1, "", True),
        ("x", 1, ",, /,:,[,*.", False),
    ],
)
def test_exceptions_of_the_proxy(host: str, port: int, no_proxy: str, expected: bool) -> None:
    assert bypasses(host, port, no_proxy) is expected


@given(st.text(max_size=20), st.integers(1, 65535), st.text(max_size=40))
def test_no_exception_raises(host: str, port: int, no_proxy: str) -> None:
    assert bypasses(host, port, no_proxy) in (True, False)


@pytest.mark.parametrize(
    ("registry", "config", "expected"),
    [
        ("nvcr.io", {}, False),
        ("reg.test:5000", {"IndexConfigs": {"reg.test:5000": {"Secure": False}}}, True),
        ("reg.test:5000", {"IndexConfigs": {"reg.test": {"Secure": False}}}, False),
        ("nvcr.io", {"IndexConfigs": {"nvcr.io": {"Secure": True}}}, False),
        ("127.0.0.1:5000", {}, True),
        ("127.0.0.1:5000", {"IndexConfigs": {"127.0.0.1:5000": {"Secure": True}}}, False),
        ("localhost:5000", {}, True),
        ("localhost.evil.example", {}, False),
        ("127.0.0.1.evil.example", {}, False),
        ("10.1.1.1:5000", {"InsecureRegistryCIDRs": ["127.0.0.0/8", "10.0.0.0/8"]}, True),
        ("11.1.1.1:5000", {"InsecureRegistryCIDRs": ["x", 5, "10.0.0.0/8"]}, False),
        ("10.1.1.1", {"InsecureRegistryCIDRs": 7, "IndexConfigs": []}, False),
    ],
)
def test_registries_without_tls_are_those_that_docker_has(
    registry: str, config: dict[str, Any], expected: bool
) -> None:
    assert insecure(registry, {"RegistryConfig": config}) is expected


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every host name below .test is this machine."""
    real = socket.create_connection

    def connect(address: tuple[str, int], *args: Any, **kwargs: Any) -> socket.socket:
        return real(("127.0.0.1" if address[0].endswith(".test") else address[0], address[1]), *args, **kwargs)

    monkeypatch.setattr(socket, "create_connection", connect)


@pytest.mark.parametrize(("no_proxy", "through"), [("", True), ("other", True), ("reg.test", False)])
def test_no_proxy_is_heeded(names: None, upstream: FakeRegistry, no_proxy: str, through: bool) -> None:
    registry = f"reg.test:{upstream.port}"
    with serving(FakeRegistry()) as proxy:
        proxy.answers[f"http://{registry}/v2/nvidia/vllm/manifests/1"] = lambda h: reply(h, proxy.index)
        info = {
            "HttpProxy": f"http://127.0.0.1:{proxy.port}",
            "NoProxy": no_proxy,
            "RegistryConfig": {"IndexConfigs": {registry: {"Secure": False}}},
        }
        digest_of(Registry(reference(f"{registry}/nvidia/vllm:1"), info, None, timeout=5), "1")
        assert bool(proxy.seen) is through
        assert bool(upstream.seen) is not through


def secure(port: int, certificates: Path | str = "/none", **info: Any) -> Registry:
    ref = reference(f"reg.test:{port}/nvidia/vllm:1")
    return Registry(ref, info, None, timeout=5, certificates=certificates)


def test_tls_is_verified_with_the_authority_of_the_registry(names: None, tmp_path: Path) -> None:
    pair = certificate(tmp_path, "reg.test")
    with serving(FakeRegistry(), pair) as upstream:
        with pytest.raises(OSError, match="certificate verify failed"):
            digest_of(secure(upstream.port), "1")
        folder = tmp_path / "certs.d" / f"reg.test:{upstream.port}"
        folder.mkdir(parents=True)
        (folder / "ca.crt").write_bytes(pair.read_bytes())
        assert digest_of(secure(upstream.port, folder.parent), "1") == digest(upstream.index)
        upstream.answers["/v2/"] = lambda handler: reply(handler, b"", 401, {"WWW-Authenticate": upstream.challenge})
        assert secure(upstream.port, folder.parent).ping() == 401
        assert "/token" not in "".join(upstream.paths())
        upstream.answers["/v2/"] = lambda handler: reply(handler, b"{}")
        assert secure(upstream.port, folder.parent).ping() == 200


def test_of_an_insecure_registry_tls_is_not_verified_but_that_of_its_token_service_is(
    names: None, tmp_path: Path
) -> None:
    with (
        serving(FakeRegistry(token="t"), certificate(tmp_path, "other")) as upstream,
        serving(FakeRegistry(token="t"), certificate(tmp_path, "token.test")) as tokens,
    ):
        configured = {"IndexConfigs": {f"reg.test:{upstream.port}": {"Secure": False}}}
        upstream.challenge = f'Bearer realm="https://reg.test:{upstream.port}/token"'
        assert digest_of(secure(upstream.port, RegistryConfig=configured), "1") == digest(upstream.index)
        upstream.challenge = f'Bearer realm="https://token.test:{tokens.port}/token"'
        with pytest.raises(OSError, match="certificate verify failed"):
            digest_of(secure(upstream.port, RegistryConfig=configured), "1")


# -- credentials and tokens ------------------------------------------------------------------------------------------

AUTH = {"username": "u", "password": "secret", "serveraddress": "x"}
BASIC = "Basic " + base64.b64encode(b"u:secret").decode()


def test_the_token_is_asked_with_the_login_for_this_repository_alone(upstream: FakeRegistry) -> None:
    upstream.token = "t0"
    upstream.challenge = upstream.challenge + ',scope="repository:victim:push,pull"'
    assert digest_of(client(upstream, AUTH), "1") == digest(upstream.index)
    asked = [(path, headers.get("Authorization", "")) for path, headers in upstream.seen]
    assert asked == [
        ("/v2/nvidia/vllm/manifests/1", ""),
        ("/token?service=s&scope=repository%3Anvidia%2Fvllm%3Apull", BASIC),
        ("/v2/nvidia/vllm/manifests/1", "Bearer t0"),
    ]


def test_a_basic_login(upstream: FakeRegistry) -> None:
    upstream.token, upstream.challenge = "never", 'Basic realm="x"'
    with pytest.raises(RegistryError) as refused:
        digest_of(client(upstream), "1")
    assert refused.value.id == "image-denied"
    with pytest.raises(RegistryError, match="401"):
        digest_of(client(upstream, AUTH), "1")
    assert [headers.get("Authorization") for _, headers in upstream.seen] == [None, None, BASIC]


@pytest.mark.parametrize(
    "realm",
    [
        "http://token.test:{other}/token",
        "http://127.0.0.2:{other}/token",
        "ftp://127.0.0.1/token",
        "",
        "https://",
        "file:///etc/passwd",
        "http://127.0.0.1:{other}@evil.test/token",
        "http://[/token",
        "javascript:1",
    ],
)
def test_no_login_goes_to_another_host_over_http(names: None, upstream: FakeRegistry, realm: str) -> None:
    upstream.token = "t0"
    with serving(FakeRegistry(token="t0")) as other:
        upstream.challenge = f'Bearer realm="{realm.format(other=other.port)}"'
        with pytest.raises(RegistryError, match="token service"):
            digest_of(client(upstream, AUTH), "1")
        assert other.seen == []


def test_no_login_leaves_https_for_http(names: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = certificate(tmp_path, "reg.test")
    monkeypatch.setenv("SSL_CERT_FILE", str(pair))
    with serving(FakeRegistry(token="t"), pair) as upstream, serving(FakeRegistry(token="t")) as plain:
        upstream.challenge = f'Bearer realm="http://reg.test:{plain.port}/token"'
        with pytest.raises(RegistryError, match="token service"):
            digest_of(secure(upstream.port), "1")
        assert plain.seen == []


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"{",
        b"5",
        b'{"token": 5}',
        b'{"token": ""}',
        b'{"token": []}',
        b"{}",
        b'{"token": "a\\r\\nX-Evil: 1"}',
        b'{"token": "two words"}',
        b'{"token": "' + b"x" * (2 << 20) + b'"}',
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_a_token_that_is_none_is_a_typed_failure(upstream: FakeRegistry, body: bytes) -> None:
    upstream.token = "t0"
    upstream.answers["/token"] = lambda handler: reply(handler, body)
    with pytest.raises(RegistryError):
        digest_of(client(upstream), "1")


def test_a_token_that_no_header_can_carry_is_named(upstream: FakeRegistry) -> None:
    upstream.token = "two words"
    upstream.answers["/token"] = lambda handler: reply(handler, b'{"token": "two words"}')
    with pytest.raises(RegistryError, match="returned an invalid token"):
        digest_of(client(upstream), "1")


@pytest.mark.parametrize(
    ("url", "no_proxy", "direct"),
    [
        ("https://registry.test/v2/", "registry.test:443", True),
        ("http://registry.test/v2/", "registry.test:80", True),
        ("http://registry.test:8080/v2/", "registry.test:8080", True),
        ("https://registry.test/v2/", "registry.test:80", False),
        ("http://registry.test:8080/v2/", "registry.test:80", False),
    ],
)
def test_an_exception_with_a_port_is_that_of_the_scheme_unless_told(
    url: str, no_proxy: str, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urllib.request.ProxyHandler, "proxy_open", lambda *_: "through the proxy")
    proxies = registries._Proxies({}, no_proxy)
    request = urllib.request.Request(url)  # noqa: S310 - it is not sent
    opened = proxies.proxy_open(request, "http://proxy.test", url.partition(":")[0])
    assert opened == (None if direct else "through the proxy")


def test_access_token_is_its_other_name(upstream: FakeRegistry) -> None:
    upstream.token = "t0"
    upstream.answers["/token"] = lambda handler: reply(handler, b'{"access_token": "t0"}')
    assert digest_of(client(upstream), "1") == digest(upstream.index)


def redirect(to: str) -> Callable[[Handler], None]:
    return lambda handler: reply(handler, b"", 307, {"Location": to})


def test_a_redirect_carries_no_login_and_no_password_of_the_proxy(names: None, upstream: FakeRegistry) -> None:
    upstream.token = "t0"
    blob = digest(upstream.layers[1])
    with serving(FakeRegistry()) as store:
        target = f"http://store.test:{store.port}/blob"
        store.answers["/blob"] = lambda handler: reply(handler, upstream.layers[1])
        upstream.answers[blob_path(blob)] = redirect(target)
        got = client(upstream, AUTH)
        got.manifest("1")
        with got.blob(blob) as answer:
            assert answer.read() == upstream.layers[1]
        assert "Authorization" not in store.seen[0][1]
        # Through a proxy with a password to the registry, past it to the store.
        registry = f"reg.test:{upstream.port}"
        with serving(FakeRegistry()) as proxy:
            proxy.answers[f"http://{registry}{blob_path(blob)}"] = redirect(target)
            info = {
                "HttpProxy": f"http://me:hidden@127.0.0.1:{proxy.port}",
                "NoProxy": "store.test",
                "RegistryConfig": {"IndexConfigs": {registry: {"Secure": False}}},
            }
            Registry(reference(f"{registry}/nvidia/vllm:1"), info, None, timeout=5).blob(blob).close()
            assert "Proxy-authorization" in proxy.seen[0][1] or "Proxy-Authorization" in proxy.seen[0][1]
        assert not any(key.lower() == "proxy-authorization" for key in store.seen[-1][1])


@pytest.mark.parametrize("target", ["http://store.test:1/blob", "ftp://store.test/blob", "file:///etc/passwd"])
def test_https_is_not_left_by_a_redirect(
    names: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    pair = certificate(tmp_path, "reg.test")
    monkeypatch.setenv("SSL_CERT_FILE", str(pair))
    with serving(FakeRegistry(), pair) as upstream:
        upstream.answers["/v2/nvidia/vllm/manifests/1"] = redirect(target)
        with pytest.raises(OSError, match=r"redirected|not allowed"):
            digest_of(secure(upstream.port), "1")


def test_the_body_of_a_redirect_is_not_read(upstream: FakeRegistry) -> None:
    sent: list[int] = []

    def send(handler: Handler) -> None:
        handler.send_response(307)
        handler.send_header("Location", "/v2/nvidia/vllm/manifests/2")
        handler.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(200):
                handler.wfile.write(b" " * (1 << 20))
                sent.append(1)
        handler.close_connection = True

    upstream.answers["/v2/nvidia/vllm/manifests/1"] = send
    upstream.things["2"] = upstream.things["1"]
    assert digest_of(client(upstream), "1") == digest_of(client(upstream), "2")
    assert len(sent) < 64


def test_a_challenge_of_the_store_is_not_answered(names: None, upstream: FakeRegistry) -> None:
    with serving(FakeRegistry(token="x")) as store:
        upstream.answers["/v2/nvidia/vllm/manifests/1"] = redirect(f"http://store.test:{store.port}/v2/x/manifests/1")
        with pytest.raises(RegistryError, match="401"):
            digest_of(client(upstream, AUTH), "1")
        assert "/token" not in "".join(store.paths() + upstream.paths())


def test_redirects_in_a_circle_end(upstream: FakeRegistry) -> None:
    upstream.answers["/v2/nvidia/vllm/manifests/1"] = redirect("/v2/nvidia/vllm/manifests/1")
    with pytest.raises(OSError):
        digest_of(client(upstream), "1")
    assert len(upstream.seen) < 10


@pytest.mark.parametrize(
    ("status", "id"),
    [
        (401, "image-denied"),
        (403, "image-denied"),
        (404, "image-unknown"),
        (429, "registry-limit"),
        (500, "registry-unreachable"),
    ],
)
def test_what_a_status_means(upstream: FakeRegistry, status: int, id: str) -> None:
    upstream.answers["/v2/nvidia/vllm/manifests/1"] = lambda handler: reply(handler, b"", status)
    with pytest.raises(RegistryError) as failed:
        digest_of(client(upstream), "1")
    assert (failed.value.id, failed.value.status) == (id, status)
    assert client(upstream).ping() == 404  # an answer as well


# -- manifests -------------------------------------------------------------------------------------------------------


def test_of_an_index_the_manifest_of_this_architecture(upstream: FakeRegistry) -> None:
    found = resolve(client(upstream), "1", "arm64")
    assert [name for name, *_ in found] == [digest(upstream.index), digest(upstream.manifest)]
    assert [media_type for _, media_type, _ in found] == [registries.INDEXES[0], registries.MANIFESTS[2]]
    with pytest.raises(RegistryError, match="not for linux/riscv64") as failed:
        resolve(client(upstream), "1", "riscv64")
    assert failed.value.id == "image-platform"


def index(*children: str, **more: Any) -> bytes:
    platform = {"os": "linux", "architecture": "arm64"}
    return json.dumps({"manifests": [{"digest": name, "platform": platform} for name in children], **more}).encode()


def test_of_an_index_the_first_of_a_platform_alone_is_asked_for(upstream: FakeRegistry) -> None:
    inner = [index(number=number) for number in range(20)]
    upstream.things.update({digest(body): body for body in inner})
    upstream.serve_tag(index(*map(digest, inner), digest(upstream.manifest)))
    with pytest.raises(RegistryError, match="is an index again"):
        resolve(client(upstream), "1", "arm64")
    assert upstream.paths() == [f"/v2/nvidia/vllm/manifests/{name}" for name in ("1", digest(inner[0]))]
    upstream.serve_tag(index(digest(upstream.manifest), *map(digest, inner)))
    assert resolve(client(upstream), "1", "arm64")[-1][2] == upstream.manifest


def test_a_child_that_is_named_often_is_one() -> None:
    assert parse_manifest(index(*[digest(b"x")] * 1000)).children == ((digest(b"x"), "linux/arm64"),)


def test_a_manifest_of_too_many_values_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    body = image_manifest([b"a"], filler=[[]] * 400_001)
    assert len(body) < registries.MANIFEST_BYTES
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(BoundsError, match="more than 400000 values"):
        parse_manifest(body)


def test_a_manifest_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed, parse = [], registries.bounded.parse_json
    monkeypatch.setattr(
        registries.bounded, "parse_json", lambda body, *more, **named: parsed.append(body) or parse(body, *more)
    )
    assert parse_manifest(image_manifest([b"a"])).media_type == registries.MANIFESTS[2]
    assert len(parsed) == 1


def test_a_manifest_without_an_index(upstream: FakeRegistry) -> None:
    upstream.serve_tag(upstream.manifest)
    assert [name for name, *_ in resolve(client(upstream), "1", "any")] == [digest(upstream.manifest)]
    assert digest_of(client(upstream), "1") == digest(upstream.manifest)


def test_bytes_with_another_digest_are_refused(upstream: FakeRegistry) -> None:
    upstream.things[digest(upstream.index)] = upstream.index + b" "
    with pytest.raises(RegistryError, match="asked for"):
        digest_of(client(upstream), digest(upstream.index))
    upstream.things[digest(upstream.manifest)] = image_manifest([b"other"])
    with pytest.raises(RegistryError, match="asked for"):
        resolve(client(upstream), "1", "arm64")


def test_sizes_of_layers(upstream: FakeRegistry) -> None:
    ref = reference(f"{upstream.address}/nvidia/vllm:1")
    short = {digest(layer)[7:19]: len(layer) for layer in upstream.layers}
    assert layer_sizes(ref, "arm64", {}, None) == short
    assert layer_sizes(ref, "riscv64", {}, None) == {}
    assert layer_sizes(reference("127.0.0.1:9/a:1"), "arm64", {}, None) == {}


def descriptor(**changes: Any) -> dict[str, Any]:
    return {"digest": digest(b"x"), "size": 1, **changes}


BAD_MANIFESTS = [
    b"",
    b"[]",
    b"5",
    b"{}",
    b"[" * 3_000_000,
    b'{"manifests": 5}',
    b'{"manifests": [5]}',
    json.dumps({"manifests": [descriptor(digest=EVIL, platform={"os": "linux", "architecture": "arm64"})]}).encode(),
    json.dumps({"manifests": [{"digest": 5, "platform": 5}]}).encode(),
    json.dumps({"config": descriptor(), "layers": [descriptor(digest=EVIL)]}).encode(),
    json.dumps({"config": descriptor(digest=EVIL), "layers": []}).encode(),
    json.dumps({"config": descriptor(), "layers": [descriptor(digest=digest(b"x") + "\n")]}).encode(),
    json.dumps({"config": descriptor(), "layers": [descriptor(size=-1)]}).encode(),
    json.dumps({"config": descriptor(), "layers": [descriptor(size=1 << 60)]}).encode(),
    json.dumps({"config": descriptor(), "layers": [descriptor(size="1")]}).encode(),
    json.dumps({"config": descriptor(), "layers": [descriptor(size=True)]}).encode(),
    json.dumps({"config": descriptor(), "layers": [descriptor()] * 2000}).encode(),
    json.dumps({"config": 5, "layers": []}).encode(),
    json.dumps({"layers": []}).encode(),
    json.dumps({"config": descriptor(), "layers": {}}).encode(),
    b'{"config": 1e400}',
    b" " * (5 << 20) + b"{}",
]


@pytest.mark.parametrize("body", BAD_MANIFESTS, ids=lambda body: str(body[:60]))
def test_a_bad_manifest_is_a_typed_failure_and_leaves_nothing(
    upstream: FakeRegistry, tmp_path: Path, body: bytes
) -> None:
    upstream.serve_tag(body)
    layout = Layout(tmp_path / "deep" / "below" / "store")
    with pytest.raises(RegistryError):
        layout.add("the/image:1", client(upstream), "arm64")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_manifest_without_an_end_is_not_read_to_it(upstream: FakeRegistry) -> None:
    sent = endless(upstream, "/v2/nvidia/vllm/manifests/1")
    with pytest.raises(RegistryError, match="more than 4194304 bytes"):
        digest_of(client(upstream), "1")
    assert sum(sent) < 64 << 20


def test_a_manifest_that_is_cut(upstream: FakeRegistry) -> None:
    def cut(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(upstream.index) + 5))
        handler.end_headers()
        handler.wfile.write(upstream.index)
        handler.close_connection = True

    upstream.answers["/v2/nvidia/vllm/manifests/1"] = cut
    with pytest.raises(RegistryError, match="cut short"):
        digest_of(client(upstream), "1")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(digest(b"x")) | st.just(EVIL),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["manifests", "layers", "config", "digest", "size", "platform", "mediaType", "os"]), inner
        )
    ),
    max_leaves=20,
)


@given(json_values)
def test_a_manifest_of_any_form_names_digests_or_is_refused(value: Any) -> None:
    try:
        found = parse_manifest(json.dumps(value).encode())
    except BoundsError:
        return
    assert all(DIGEST.fullmatch(name) for name, _ in (*found.children, *found.blobs))
    assert all(size >= 0 for _, size in found.blobs)
    assert found.media_type in registries.MANIFESTS


@given(st.binary(max_size=200))
def test_a_manifest_of_any_bytes(body: bytes) -> None:
    with contextlib.suppress(BoundsError):
        parse_manifest(body)


# -- time ------------------------------------------------------------------------------------------------------------


def drip(handler: Handler, text: bytes) -> None:
    with contextlib.suppress(OSError):
        for byte in text:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            time.sleep(0.05)


def test_a_head_that_comes_byte_by_byte_is_given_up(upstream: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registries, "ANSWER_SECONDS", 0.5)
    upstream.answers["/v2/nvidia/vllm/manifests/1"] = lambda handler: drip(handler, b"HTTP/1.1 200 " + b"x" * 400)
    began = time.monotonic()
    with pytest.raises(OSError):
        digest_of(client(upstream), "1")
    assert time.monotonic() - began < 5


def test_a_manifest_that_comes_byte_by_byte_is_given_up(
    upstream: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registries, "ANSWER_SECONDS", 0.5)
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n"

    def slow(handler: Handler) -> None:
        handler.wfile.write(head)
        drip(handler, b"x" * 400)

    upstream.answers["/v2/nvidia/vllm/manifests/1"] = slow
    began = time.monotonic()
    with pytest.raises(OSError, match="not read completely in time"):
        digest_of(client(upstream), "1")
    assert time.monotonic() - began < 5


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ENDLESS = {
    "headers": b"HTTP/1.1 200 OK\r\n" + b"X-A: 1\r\n" * 90,
    "interim answers": b"HTTP/1.1 100 Continue\r\n\r\n" * 40,
    "size of a chunk": CHUNKED + b"0" * 400,
    "extension of a chunk": CHUNKED + b"1;" + b"x" * 400,
    "small chunks": CHUNKED + b"1\r\n \r\n" * 100,
    "trailers": CHUNKED + b"2\r\n{}\r\n0\r\n" + b"X-A: 1\r\n" * 90,
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_no_part_of_an_answer_is_waited_for_longer(
    upstream: FakeRegistry, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registries, "ANSWER_SECONDS", 0.4)
    head, text = (CHUNKED, ENDLESS[kind][len(CHUNKED) :]) if ENDLESS[kind].startswith(CHUNKED) else (b"", ENDLESS[kind])

    def slow(handler: Handler) -> None:
        handler.wfile.write(head)
        drip(handler, text)

    upstream.answers["/v2/nvidia/vllm/manifests/1"] = slow
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        digest_of(client(upstream), "1")
    assert time.monotonic() - began < 2


def test_over_tls_as_well(names: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registries, "ANSWER_SECONDS", 0.4)
    pair = certificate(tmp_path, "reg.test")
    monkeypatch.setenv("SSL_CERT_FILE", str(pair))
    with serving(FakeRegistry(), pair) as upstream:
        upstream.answers["/v2/nvidia/vllm/manifests/1"] = lambda handler: drip(handler, ENDLESS["headers"])
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            digest_of(secure(upstream.port), "1")
        assert time.monotonic() - began < 2
        upstream.answers.clear()
        assert digest_of(secure(upstream.port), "1") == digest(upstream.index)


def test_the_answer_of_a_proxy_to_connect_is_not_waited_for_longer(
    upstream: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registries, "ANSWER_SECONDS", 0.4)
    with socket.create_server(("127.0.0.1", 0)) as proxy:

        def serve() -> None:
            with contextlib.suppress(OSError):
                connection = proxy.accept()[0]
                for byte in b"HTTP/1.1 200 OK\r\n" + b"X-A: 1\r\n" * 90:
                    connection.sendall(bytes([byte]))
                    time.sleep(0.05)

        threading.Thread(target=serve, daemon=True).start()
        info = {"HttpsProxy": f"http://127.0.0.1:{proxy.getsockname()[1]}"}
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            digest_of(Registry(reference("reg.test/nvidia/vllm:1"), info, None, timeout=5), "1")
        assert time.monotonic() - began < 2


@pytest.mark.parametrize("kind", ["size of a chunk", "extension of a chunk"])
def test_a_blob_whose_chunks_have_no_end_is_given_up(
    upstream: FakeRegistry, layout: Layout, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registries, "SILENCE", 0.4)
    blob = digest(upstream.layers[0])

    def slow(handler: Handler) -> None:
        handler.wfile.write(CHUNKED + b"5\r\naaaaa\r\n")
        drip(handler, ENDLESS[kind][len(CHUNKED) :])

    upstream.answers[blob_path(blob)] = slow
    began = time.monotonic()
    with pytest.raises(OSError, match=r"not there within 0\.4 s"):
        layout.fetch([blob], lambda done: None)
    assert time.monotonic() - began < 4  # one second of which is the pause before another try


def test_a_blob_may_take_longer_than_an_answer(
    upstream: FakeRegistry, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registries, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(registries, "SLOWEST", 1000)
    blob, body = digest(upstream.layers[1]), upstream.layers[1]

    def slow(handler: Handler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
        for at in range(0, len(body), 500):
            handler.wfile.write(body[at : at + 500])
            time.sleep(0.08)

    upstream.answers[blob_path(blob)] = slow
    layout.fetch([blob], lambda done: None)
    assert layout.path(blob).read_bytes() == body


def test_silence_ends_an_answer_before_its_time(upstream: FakeRegistry) -> None:
    upstream.answers["/v2/nvidia/vllm/manifests/1"] = lambda handler: time.sleep(3)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        digest_of(Registry(reference(f"{upstream.address}/nvidia/vllm:1"), {}, None, timeout=0.2), "1")
    assert time.monotonic() - began < 2


def test_a_blob_that_comes_too_slowly_is_given_up(
    upstream: FakeRegistry, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registries, "SILENCE", 0.5)
    blob = digest(upstream.layers[0])

    def slow(handler: Handler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n")
        drip(handler, upstream.layers[0][:400])

    upstream.answers[blob_path(blob)] = slow
    began = time.monotonic()
    with pytest.raises(OSError, match="too slow"):
        layout.fetch([blob], lambda done: None)
    assert time.monotonic() - began < 5


# -- blobs -----------------------------------------------------------------------------------------------------------


def endless(upstream: FakeRegistry, path: str) -> list[int]:
    sent: list[int] = []

    def send(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(300):
                handler.wfile.write(b" " * (1 << 20))
                sent.append(1 << 20)
        handler.close_connection = True

    upstream.answers[path] = send
    return sent


def test_no_more_of_a_blob_is_taken_than_its_size(upstream: FakeRegistry, layout: Layout) -> None:
    blob = digest(upstream.layers[1])
    sent = endless(upstream, blob_path(blob))
    sizes: list[int] = []
    with pytest.raises(OSError, match="different content"):
        layout.fetch([blob], sizes.append)
    assert sum(sent) < 64 << 20
    assert [path for path in layout.blobs.iterdir() if blob[7:] in path.name] == []


def partial(layout: Layout, blob: str, content: bytes) -> Path:
    path = layout.path(blob).with_name(f"{blob[7:]}.incomplete")
    path.write_bytes(content)
    return path


def ranges(upstream: FakeRegistry, blob: str) -> list[str | None]:
    return [headers.get("Range") for path, headers in upstream.seen if path == blob_path(blob)]


def test_what_lacks_of_a_blob_is_asked_for(upstream: FakeRegistry, layout: Layout) -> None:
    body, blob = upstream.layers[0], digest(upstream.layers[0])
    partial(layout, blob, body[:1000])
    layout.fetch([blob], lambda done: None)
    assert layout.path(blob).read_bytes() == body
    assert ranges(upstream, blob) == ["bytes=1000-"]


@pytest.mark.parametrize("chunk", [1 << 10, 4999, 1])
def test_a_blob_is_taken_to_its_last_byte(
    upstream: FakeRegistry, layout: Layout, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registries, "CHUNK", chunk)
    upstream.serve_tag(image_manifest([b"b" * 5_000]))
    upstream.layers.append(b"b" * 5_000)
    upstream.things[digest(b"b" * 5_000)] = b"b" * 5_000
    layout.add("another:1", client(upstream), "arm64")
    layout.fetch([digest(b"b" * 5_000)], lambda done: None)
    assert layout.path(digest(b"b" * 5_000)).read_bytes() == b"b" * 5_000


def test_a_file_that_is_begun_again_is_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registries, "SILENCE", 1)
    path, asked = tmp_path / "blob", []
    path.write_bytes(b"ab")

    def works() -> bool:
        if not asked:
            (tmp_path / "again").write_bytes(b"abcd")
            (tmp_path / "again").replace(path)
        asked.append(path)
        return True

    assert b"".join(registries.TailingBlob(lambda: path.open("rb"), 4, works).read(0, 4)) == b"abcd"
    assert len(asked) == 1


def test_the_writer_may_end_just_after_the_file_was_read(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(b"ab")

    def works() -> bool:
        path.write_bytes(b"abcd")
        return False

    assert b"".join(registries.TailingBlob(lambda: path.open("rb"), 4, works).read(0, 4)) == b"abcd"
    path.unlink()
    with pytest.raises(OSError, match="has ended"):
        list(registries.TailingBlob(lambda: None, 4, lambda: False).read(0, 4))


def test_a_registry_that_sends_the_whole_again(upstream: FakeRegistry, layout: Layout) -> None:
    body, blob = upstream.layers[0], digest(upstream.layers[0])
    partial(layout, blob, body[:1000])

    def whole(handler: Handler) -> None:
        del handler.headers["Range"]
        reply(handler, body)

    upstream.answers[blob_path(blob)] = whole
    layout.fetch([blob], lambda done: None)
    assert layout.path(blob).read_bytes() == body


@pytest.mark.parametrize("reported", ["bytes 0-299999/300000", "bytes 1001-299999/300000", "bytes 1000-300000/300001"])
def test_a_part_that_was_not_asked_for_is_refused(upstream: FakeRegistry, layout: Layout, reported: str) -> None:
    body, blob = upstream.layers[0], digest(upstream.layers[0])
    kept = partial(layout, blob, body[:1000])

    def other(handler: Handler) -> None:
        del handler.headers["Range"]
        reply(handler, body[1000:], 206, {"Content-Range": reported})

    upstream.answers[blob_path(blob)] = other
    with pytest.raises(OSError, match="asked for bytes from 1000 on"):
        layout.fetch([blob], lambda done: None)
    assert kept.read_bytes() == body[:1000]


def test_a_partial_blob_with_another_content_is_removed(upstream: FakeRegistry, layout: Layout) -> None:
    body, blob = upstream.layers[0], digest(upstream.layers[0])
    kept = partial(layout, blob, b"!" * 1000)
    with pytest.raises(OSError, match="different content"):
        layout.fetch([blob], lambda done: None)
    assert not kept.exists() and not layout.path(blob).exists()
    layout.fetch([blob], lambda done: None)
    assert layout.path(blob).read_bytes() == body


@pytest.mark.parametrize("content", [b"", b"short"])
def test_a_blob_that_is_cut_is_named(upstream: FakeRegistry, layout: Layout, content: bytes) -> None:
    blob = digest(upstream.layers[0])
    upstream.answers[blob_path(blob)] = lambda handler: reply(handler, content)
    with pytest.raises(OSError, match=f"ended after {len(content)} of 300000"):
        layout.fetch([blob], lambda done: None)


def test_a_link_in_place_of_a_partial_blob_is_not_written_through(
    upstream: FakeRegistry, layout: Layout, tmp_path: Path
) -> None:
    blob = digest(upstream.layers[0])
    (tmp_path / "victim").write_bytes(b"mine")
    layout.path(blob).with_name(f"{blob[7:]}.incomplete").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError):
        layout.fetch([blob], lambda done: None)
    assert (tmp_path / "victim").read_bytes() == b"mine"


def test_a_blob_that_is_a_link_is_not_read(upstream: FakeRegistry, layout: Layout, tmp_path: Path) -> None:
    blob = digest(upstream.layers[1])
    (tmp_path / "secret").write_bytes(b"x" * 5000)
    layout.path(blob).symlink_to(tmp_path / "secret")
    with pytest.raises(OSError):
        list(layout.open(blob).read(0, 5000))


def test_an_empty_blob(upstream: FakeRegistry, tmp_path: Path) -> None:
    upstream.things[digest(b"")] = b""
    body = image_manifest([b""])
    upstream.serve_tag(body)
    layout = Layout(tmp_path / "store")
    layout.add("the/image:1", client(upstream), "arm64")
    layout.fetch([digest(b"")], lambda done: None)
    assert layout.path(digest(b"")).read_bytes() == b""


# -- the folder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [EVIL, "sha256:" + "1" * 63, "../x", "", "sha256:" + "1" * 64 + "\n", 5, None])
def test_no_path_is_made_of_what_is_not_a_digest(tmp_path: Path, name: Any) -> None:
    with pytest.raises(BoundsError):
        Layout(tmp_path).path(name)


@pytest.mark.parametrize(
    "index",
    [
        "",
        "[]",
        "{}",
        '{"manifests": 5}',
        '{"manifests": [5, {}, {"annotations": 5}]}',
        json.dumps({"manifests": [{"digest": EVIL, "annotations": {registries.NAME: "a:1"}}]}),
        json.dumps({"manifests": [{"digest": digest(b""), "annotations": {registries.NAME: 5}}]}),
    ],
)
def test_an_index_that_is_damaged_names_nothing(tmp_path: Path, index: str) -> None:
    (tmp_path / "index.json").write_text(index)
    assert Layout(tmp_path).names() == {}


def test_images_are_named_beside_each_other(upstream: FakeRegistry, layout: Layout) -> None:
    (layout.folder / "index.json").write_text('{"manifests": [5]}')
    first = layout.add("the/image:1", client(upstream), "arm64")[0]
    upstream.serve_tag(image_manifest([b"b" * 5_000]))
    second = layout.add("another:1", client(upstream), "arm64")[0]
    assert Layout(layout.folder).names() == {"the/image:1": first, "another:1": second}
    third = layout.add("the/image:1", client(upstream), "arm64")[0]
    assert layout.names() == {"the/image:1": third, "another:1": second}


def test_the_index_is_one_of_oci_whatever_a_crash_left(upstream: FakeRegistry, layout: Layout) -> None:
    (layout.folder / ".index.json.new").write_text("{")
    layout.add("the/image:1", client(upstream), "arm64")
    assert json.loads((layout.folder / "index.json").read_text())["schemaVersion"] == 2
    assert json.loads((layout.folder / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    assert list(layout.folder.glob(".*.new")) == []


def test_a_manifest_of_the_largest_size(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    body = b"{" + b" " * 98 + b"}"
    monkeypatch.setattr(registries, "MANIFEST_BYTES", len(body))
    layout.path(digest(body)).write_bytes(body)
    assert layout.body(digest(body)) == body


def test_the_digest_that_is_known_is_asked_for_not_the_tag(upstream: FakeRegistry, tmp_path: Path) -> None:
    wanted = digest(upstream.index)
    upstream.things["1"] = image_manifest([b"moved"])
    assert Layout(tmp_path / "s").add("the/image:1", client(upstream), "arm64", wanted)[0] == wanted


def test_a_manifest_that_was_changed_in_the_folder_is_refused(upstream: FakeRegistry, layout: Layout) -> None:
    name = digest(upstream.index)
    assert layout.know(name) == [
        name,
        digest(upstream.manifest),
        *[n for n, _ in parse_manifest(upstream.manifest).blobs],
    ]
    layout.path(digest(upstream.manifest)).write_bytes(image_manifest([b"other"]))
    with pytest.raises(BoundsError, match="does not match its digest"):
        layout.know(name)
    assert layout.media_type(name) == registries.INDEXES[0]
    assert layout.media_type(digest(upstream.manifest)) == "application/octet-stream"
    assert layout.media_type(digest(b"none")) == "application/octet-stream"


def test_of_an_index_only_what_is_there_is_known(upstream: FakeRegistry, layout: Layout) -> None:
    layout.path(digest(upstream.manifest)).unlink()
    assert layout.know(digest(upstream.index)) == [digest(upstream.index)]


def put(layout: Layout, body: bytes) -> str:
    layout.path(digest(body)).write_bytes(body)
    return digest(body)


def test_a_manifest_that_an_index_names_often_is_read_once(
    upstream: FakeRegistry, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    child, read, body = digest(upstream.manifest), [], layout.body
    platforms = [{"digest": child, "platform": {"os": "linux", "architecture": str(n)}} for n in range(500)]
    top = put(layout, json.dumps({"manifests": [*platforms, *platforms]}).encode())
    monkeypatch.setattr(layout, "body", lambda name: read.append(name) or body(name))
    assert layout.know(top) == [top, child, *[name for name, _ in parse_manifest(upstream.manifest).blobs]]
    assert read == [top, child]


def test_a_chain_of_indexes_is_followed_one_level_deep(upstream: FakeRegistry, layout: Layout) -> None:
    chain = [digest(upstream.manifest)]
    for _ in range(1100):
        chain.append(put(layout, index(chain[-1])))
    assert layout.know(chain[-1]) == [chain[-1], chain[-2]]
    assert layout.sizes[chain[-2]] == len(index(chain[-3]))


def test_a_layer_that_is_there_twice_is_one_blob(upstream: FakeRegistry, layout: Layout) -> None:
    name = put(layout, image_manifest([b"a", b"a"]))
    assert layout.know(name)[-1] == digest(b"a") and len(layout.know(name)) == 3


def test_prune_knows_partial_blobs(layout: Layout) -> None:
    for name in ("f" * 64, "f" * 64 + ".incomplete", "e" * 64 + ".incomplete"):
        (layout.blobs / name).write_bytes(b"x")
    before = {path.name for path in layout.blobs.iterdir()}
    layout.prune([*layout.sizes, "sha256:" + "e" * 64])
    assert before - {path.name for path in layout.blobs.iterdir()} == {"f" * 64, "f" * 64 + ".incomplete"}
