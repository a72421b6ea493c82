"""An image whose publisher has a key is taken with its signature alone."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible.errors import AnsibleActionFail
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from sparkfleet_host.registry import reference

from sparkfleet import SparkfleetError
from sparkfleet.fleet import image_digest, image_signature
from tests.unit.fakes.fake_registry import MANIFEST, FakeRegistry, digest, serving
from tests.unit.plugins.test_fleet_actions import Stage

CURVE, EDWARDS = ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()
RSA = rsa.generate_private_key(65537, 2048)
Private = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey


@pytest.fixture
def upstream() -> Iterator[FakeRegistry]:
    with serving(FakeRegistry()) as made:
        yield made


def signed(key: Private, text: bytes) -> bytes:
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.sign(text, ec.ECDSA(hashes.SHA256()))
    return key.sign(text, padding.PKCS1v15(), hashes.SHA256()) if isinstance(key, rsa.RSAPrivateKey) else key.sign(text)


def publish(registry: FakeRegistry, *keys: Private, of: str = "", **more: Any) -> None:
    """What `cosign sign --key` puts into a registry: an image of signatures of the index, one for each key."""
    wanted, layers = digest(registry.index), []
    for key in keys:
        critical = {
            "identity": {"docker-reference": f"{registry.address}/nvidia/vllm"},
            "image": {"docker-manifest-digest": of or wanted},
            "type": "cosign container image signature",
        }
        text = json.dumps({"critical": critical, "optional": None}, separators=(",", ":")).encode()
        registry.things[digest(text)] = text
        signature = more.get("signature", base64.b64encode(signed(key, text)).decode())
        kind = {"mediaType": "application/vnd.dev.cosign.simplesigning.v1+json", "size": len(text)}
        annotations = {"annotations": {image_signature.ANNOTATION: signature}}
        layers.append({**kind, "digest": digest(text), **annotations})
    body = {"schemaVersion": 2, "mediaType": MANIFEST, "config": {"digest": digest(b"{}"), "size": 2}, "layers": layers}
    registry.things[f"{wanted.replace(':', '-')}.sig"] = json.dumps(body).encode()


def written(folder: Path, key: Private) -> str:
    kind = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    file = folder / f"{type(key).__name__}.pub"
    file.write_bytes(key.public_key().public_bytes(*kind))
    return str(file)


def require(registry: FakeRegistry, folder: Path, keys: dict[str, str]) -> str:
    image = f"{registry.address}/nvidia/vllm:1"
    answer = image_digest.Answer(digest(registry.index))
    for file in folder.glob("sparkfleet-*.json"):
        file.unlink()
    return image_signature.require(folder, image, answer, keys, {})


@pytest.mark.parametrize("key", [CURVE, EDWARDS, RSA], ids=["ecdsa", "ed25519", "rsa"])
def test_a_signature_by_the_key_is_enough(upstream: FakeRegistry, tmp_path: Path, key: Private) -> None:
    file = written(tmp_path, key)
    publish(upstream, ec.generate_private_key(ec.SECP256R1()), key)
    for name in (upstream.address, f"{upstream.address}/nvidia", f"{upstream.address}/nvidia/vllm"):
        assert require(upstream, tmp_path, {name: file}) == file


def test_who_has_no_key_is_not_asked(upstream: FakeRegistry, tmp_path: Path) -> None:
    for keys in ({}, {"nvcr.io": "/nowhere"}, {f"{upstream.address}/nvidia/vll": "/nowhere"}):
        assert require(upstream, tmp_path, keys) == ""
    assert upstream.seen == []


def test_the_longest_name_counts(upstream: FakeRegistry, tmp_path: Path) -> None:
    publish(upstream, CURVE)
    keys = {upstream.address: written(tmp_path, EDWARDS), f"{upstream.address}/nvidia": written(tmp_path, CURVE)}
    assert require(upstream, tmp_path, keys) == keys[f"{upstream.address}/nvidia"]
    with pytest.raises(SparkfleetError, match="signed with another key"):
        require(upstream, tmp_path, {**keys, f"{upstream.address}/nvidia/vllm": keys[upstream.address]})


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (None, "the registry has no signature of it"),
        ({"of": "sha256:" + "0" * 64}, "the signature is of sha256:0000"),
        ({"signature": base64.b64encode(b"x" * 70).decode()}, "it is signed with another key"),
        ({"signature": "no base64"}, "it is signed with another key"),
        ({"signature": 5}, "a signed text"),
        ({"signature": base64.b64encode(signed(CURVE, b"another text")).decode()}, "it is signed with another key"),
    ],
)
def test_what_is_not_signed_is_refused_by_name(
    upstream: FakeRegistry, tmp_path: Path, more: dict[str, Any] | None, words: str
) -> None:
    if more is not None:
        publish(upstream, CURVE, **more)
    with pytest.raises(SparkfleetError, match=words) as refused:
        require(upstream, tmp_path, {upstream.address: written(tmp_path, CURVE)})
    assert f"{upstream.address}/nvidia/vllm:1 (sha256:" in str(refused.value) and str(refused.value).isprintable()


@pytest.mark.parametrize("body", [b"", b"[]", b'{"layers": 5}', b'{"layers": []}', b'{"layers": [{"digest": "x"}]}'])
def test_a_list_of_signatures_that_is_none_is_refused(upstream: FakeRegistry, tmp_path: Path, body: bytes) -> None:
    upstream.things[f"{digest(upstream.index).replace(':', '-')}.sig"] = body or b"{"
    with pytest.raises(SparkfleetError, match="not accepted without a signature"):
        require(upstream, tmp_path, {upstream.address: written(tmp_path, CURVE)})


def test_a_signed_text_that_was_changed_is_refused(upstream: FakeRegistry, tmp_path: Path) -> None:
    publish(upstream, CURVE)
    (name,) = (name for name, body in upstream.things.items() if b"docker-manifest-digest" in body)
    upstream.things[name] += b" "
    with pytest.raises(SparkfleetError, match="is not what the registry lists"):
        require(upstream, tmp_path, {upstream.address: written(tmp_path, CURVE)})


def test_a_registry_that_is_away_is_no_reason_to_go_on(tmp_path: Path) -> None:
    keys = {"127.0.0.1:9": written(tmp_path, CURVE)}
    for answer, words in (
        (image_digest.Answer("sha256:" + "1" * 64), "its registry does not answer"),
        (image_digest.Answer(reason="127.0.0.1:9: refused"), "cannot ask what it stands for"),
    ):
        with pytest.raises(SparkfleetError, match=words):
            image_signature.require(tmp_path, "127.0.0.1:9/nvidia/vllm:1", answer, keys, {})


def test_a_run_asks_once(upstream: FakeRegistry, tmp_path: Path) -> None:
    publish(upstream, CURVE)
    keys, answer = {upstream.address: written(tmp_path, CURVE)}, image_digest.Answer(digest(upstream.index))
    for _ in range(3):
        assert image_signature.require(tmp_path, f"{upstream.address}/nvidia/vllm:1", answer, keys, {})
    assert len(upstream.seen) == 2


@pytest.mark.parametrize("content", [None, b"", b"-----BEGIN PUBLIC KEY-----\nx\n-----END PUBLIC KEY-----\n"])
def test_a_key_that_is_none_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "key.pub"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SparkfleetError, match=r"sparkfleet_image_keys: .*key\.pub is not a public key in PEM"):
        image_signature.public_key(str(file))


def test_the_action_refuses_what_is_not_signed(
    upstream: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(monkeypatch, "image_digest")
    monkeypatch.setattr(stage.action.constants, "DEFAULT_LOCAL_TMP", str(tmp_path))
    image, keys = f"{upstream.address}/nvidia/vllm:1", {upstream.address: written(tmp_path, CURVE)}
    run = {"inventory_hostname": "spark-1"}
    with pytest.raises(AnsibleActionFail, match=r"spark-1: .* is not accepted without a signature") as refused:
        stage.run(run, image=image, keys=keys)
    assert refused.value.result["failure"] == "image-unsigned"
    for file in tmp_path.glob("sparkfleet-*.json"):
        file.unlink()
    publish(upstream, CURVE)
    assert stage.run(run, image=image, keys=keys)["digest"] == digest(upstream.index)
    assert stage.run(run, image=image)["digest"] == digest(upstream.index)


@pytest.mark.parametrize(
    ("image", "publisher"),
    [
        ("Registry.Example/our/x:1", "registry.example/our"),
        ("registry.example/our/x:1", "Registry.Example/our"),
        ("registry.example:443/our/x:1", "registry.example/our/"),
        ("registry.example/our/x:1", "registry.example:443"),
        ("registry.example:5000/our/x:1", "registry.example:5000/our/x"),
        ("vllm/vllm-openai:v0.25.1", "docker.io/vllm"),
    ],
)
def test_a_publisher_may_be_written_in_other_ways(image: str, publisher: str) -> None:
    assert image_signature.key_file(reference(image), {publisher: "/keys/theirs.pub"}) == "/keys/theirs.pub"


@pytest.mark.parametrize("publisher", ["registry.example/ou", "registry.example:5000/our", "example/our"])
def test_another_publisher_is_none(publisher: str) -> None:
    assert image_signature.key_file(reference("registry.example/our/x:1"), {publisher: "/keys/theirs.pub"}) == ""
