"""Whether an image carries its publisher's signature, in the form that `cosign sign --key` gives it.

Such a signature is an image of its own under the tag `sha256-HEX.sig` of the same repository: each layer is a text that
names the digest, and an annotation of the layer has the signature of that text. The key is the operator's; signatures
without a key (Fulcio, Rekor) are not read.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from sparkfleet_host import bounded
from sparkfleet_host.bounded import BoundsError, printable
from sparkfleet_host.registry import Reference, Registry, RegistryError

from sparkfleet import SparkfleetError
from sparkfleet.documents import run_cache
from sparkfleet.fleet import image_digest
from sparkfleet.user_paths import expanded

VARIABLE = "sparkfleet_image_keys"
ANNOTATION = "dev.cosignproject.cosign/signature"
LARGEST = 64 << 10  # of a key, a list of signatures, and a signed text, bytes
MOST = 32  # signatures of an image
PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey


def key_file(ref: Reference, keys: Mapping[str, Any]) -> str:
    """The file with the key of an image's publisher: that of the longest name in `keys` (REGISTRY, REGISTRY/PATH) that
    the image's own name is, or is below; "" for none."""
    name = _normal(f"{ref.registry}/{ref.path}")
    files = {_normal(prefix): str(file) for prefix, file in keys.items()}
    fitting = [prefix for prefix in files if name == prefix or name.startswith(f"{prefix}/")]
    return files[max(fitting, key=len)] if fitting else ""


def _normal(name: str) -> str:
    """One of the ways to write the same place: registries are known by name whatever its case, and by TLS's port."""
    host, slash, path = name.rstrip("/").partition("/")
    return f"{host.lower().removesuffix(':443')}{slash}{path}"


def public_key(file: str) -> PublicKey:
    """A public key in PEM. Raises SparkfleetError."""
    path = expanded(VARIABLE, file)
    try:
        key = serialization.load_pem_public_key(bounded.read_file(path, LARGEST))
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise SparkfleetError(
            f"{VARIABLE}: {path} is not a public key in PEM ({printable(str(error), 120)}); `cosign public-key` and "
            "`openssl pkey -pubout` write one"
        ) from None
    if not isinstance(key, PublicKey):
        raise SparkfleetError(f"{VARIABLE}: {path} is a {type(key).__name__}: ECDSA, Ed25519 and RSA keys are read")
    return key


def verify(registry: Registry, digest: str, key: PublicKey) -> None:
    """Raise SparkfleetError unless one of the image's signatures is by this key and of this digest; OSError where the
    registry does not answer."""
    try:
        body, _ = registry.manifest(f"{digest.replace(':', '-')}.sig")
    except RegistryError as error:
        if error.status == 404:
            raise SparkfleetError("the registry has no signature of it") from None
        raise
    reasons = []
    try:
        known = bounded.as_dict(bounded.parse_json(body, "list of signatures", LARGEST), "list of signatures")
        for entry in bounded.as_list(known.get("layers"), "list of signatures", MOST):
            reason = _problem(registry, bounded.as_dict(entry, "a signature"), digest, key)
            if not reason:
                return
            reasons.append(reason)
    except BoundsError as error:
        reasons.append(str(error))
    raise SparkfleetError("; ".join(dict.fromkeys(reasons)) or "its list of signatures is empty")


def _problem(registry: Registry, layer: Mapping[str, Any], digest: str, key: PublicKey) -> str:
    """What is wrong with a signature; "" for nothing. Raises BoundsError and OSError."""
    what = "a signed text"
    blob = bounded.as_str(layer.get("digest"), what)
    with registry.blob(blob) as answer:
        text = bounded.read_all(answer.read1, what, LARGEST)
    if f"sha256:{hashlib.sha256(text).hexdigest()}" != blob:
        return "a signed text is not what the registry lists"
    try:
        annotations = bounded.as_dict(layer.get("annotations"), what)
        signature = base64.b64decode(bounded.as_str(annotations.get(ANNOTATION), what), validate=True)
        _check(key, signature, text)
    except (InvalidSignature, binascii.Error):
        return "it is signed with another key"
    critical = bounded.as_dict(bounded.as_dict(bounded.parse_json(text, what, LARGEST), what).get("critical"), what)
    signed = bounded.as_dict(critical.get("image"), what).get("docker-manifest-digest")
    # The text may be of another image: whoever writes to the registry can put it under any tag.
    return "" if signed == digest else f"the signature is of {printable(str(signed), 80)}"


def _check(key: PublicKey, signature: bytes, text: bytes) -> None:
    """Raises InvalidSignature."""
    if isinstance(key, ec.EllipticCurvePublicKey):
        key.verify(signature, text, ec.ECDSA(hashes.SHA256()))
    elif isinstance(key, rsa.RSAPublicKey):
        key.verify(signature, text, padding.PKCS1v15(), hashes.SHA256())
    else:
        key.verify(signature, text)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`problem`: why an image is refused, "" for one that is signed."""

    problem: str = ""


def require(
    folder: Path,
    image: str,
    answer: image_digest.Answer,
    keys: Mapping[str, Any],
    registries: Mapping[str, str],
    proxy: str = "",
    no_proxy: str = "",
    logins: Mapping[str, Mapping[str, str]] | None = None,
    ca: str = "",
) -> str:
    """Check an image whose publisher has a key in `keys`, once a run (kept in `folder`); the key's file, "" where the
    publisher has none. `answer`: what its tag stands for. Raises SparkfleetError for one that is not signed, or where
    that cannot be known."""
    ref = image_digest.checked(image)
    file = key_file(ref, keys)
    if not file:
        return ""
    key = public_key(file)
    if not answer.digest:
        raise _refused(image, file, f"this controller cannot ask what it stands for: {answer.reason}")

    def ask() -> dict[str, Any]:
        try:
            registry = image_digest.registry_of(ref, registries, proxy, no_proxy, logins=logins, ca=ca)
            bounded.in_time(lambda: verify(registry, answer.digest, key), image_digest.IN_ALL)
        except SparkfleetError as error:
            return dataclasses.asdict(Verdict(str(error)))
        except OSError as error:
            return dataclasses.asdict(Verdict(f"its registry does not answer: {printable(str(error), 200)}"))
        return dataclasses.asdict(Verdict())

    known, _ = run_cache.ask(folder / "sparkfleet-signatures.json", f"{image} {answer.digest} {file}", ask)
    if known["problem"]:
        raise _refused(f"{image} ({answer.digest})", file, known["problem"])
    return file


def _refused(image: str, file: str, why: str) -> SparkfleetError:
    return SparkfleetError(f"{image} is not accepted without a signature by {file} ({VARIABLE}): {why}")
