"""Signatures of bundles and locks, by ssh-keygen: whoever has an SSH key can sign, and nothing else is needed to check.

`bundle.json` has the sha256 of every file of a bundle, and a lock of everything that is deployed, so a signature next
to such a file (`bundle.json.sig`) is one of everything.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sparkfleet_host import bounded
from sparkfleet_host.bounded import BoundsError, printable

from sparkfleet import SparkfleetError
from sparkfleet.user_paths import expanded

LARGEST = 64 << 10  # of a signature, bytes
SECONDS = 30.0
_PROGRAM = "ssh-keygen"


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is signed. `namespace`: a signature for something else, such as a commit, is none of it; `key`, `signers`:
    the variables with the key that signs and with the file of those who may."""

    namespace: str
    key: str
    signers: str


BUNDLE = Kind("sparkfleet-bundle", "sparkfleet_bundle_key", "sparkfleet_bundle_signers")
LOCK = Kind("sparkfleet-lock", "sparkfleet_lock_key", "sparkfleet_lock_signers")


def beside(file: Path) -> Path:
    """Where the signature of a file is."""
    return file.with_name(f"{file.name}.sig")


def read(file: Path) -> bytes | None:
    """The signature of a file; None where there is none. Raises SparkfleetError."""
    try:
        return bounded.read_file(beside(file), LARGEST)
    except FileNotFoundError:
        return None
    except (OSError, BoundsError) as error:
        raise SparkfleetError(f"{beside(file)} cannot be read: {error}") from None


def of(data: bytes, key: str, kind: Kind) -> bytes:
    """The signature of data. `key`: a private key without a passphrase, or a public one whose private key the SSH agent
    has. Raises SparkfleetError."""
    path = expanded(kind.key, key)
    if not path.is_file():
        raise SparkfleetError(f"{kind.key}: {path} is not a file; `ssh-keygen -t ed25519` makes a key")
    code, made, said = _run(["-Y", "sign", "-f", str(path), "-n", kind.namespace], data)
    if code or not made.startswith(b"-----BEGIN SSH SIGNATURE-----"):
        raise SparkfleetError(
            f"{kind.key}: {path} does not sign: {printable(said, 300) or code}. A key with a "
            "passphrase works through the SSH agent: ssh-add it, and name its .pub file"
        )
    return made


def sign(file: Path, key: str, kind: Kind) -> Path:
    """Sign a file; the signature, next to it, where one that was there stays until there is another. Raises
    SparkfleetError."""
    return write(file, of(file.read_bytes(), key, kind))


def write(file: Path, signature: bytes) -> Path:
    """Put a file's signature next to it. Raises SparkfleetError."""
    made = beside(file)
    scratch = made.with_name(f"{made.name}.{os.getpid()}")
    try:
        scratch.write_bytes(signature)
        scratch.replace(made)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise SparkfleetError(f"{made} cannot be written: {error}") from None
    return made


def check(data: bytes, signature: bytes | None, signers: str, what: str, kind: Kind) -> str:
    """Who of the file `signers` (ALLOWED SIGNERS in ssh-keygen(1)) signed data. Raises SparkfleetError for none."""
    path = expanded(kind.signers, signers)
    if not path.is_file():
        raise SparkfleetError(f"{kind.signers}: {path} is not a file: NAME KEYTYPE KEY, a line for each")
    if signature is None:
        raise SparkfleetError(
            f"{what} is not signed, and {kind.signers} wants a signature: make it with {kind.key}, or sign the file "
            f"that is there, once you have read it: ssh-keygen -Y sign -n {kind.namespace} -f KEY FILE"
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "signature")
        file.write_bytes(signature)
        common = ["-f", str(path), "-n", kind.namespace, "-s", str(file)]
        code, printed, said = _run(["-Y", "find-principals", "-f", str(path), "-s", str(file)])
        listed = printed.decode("utf-8", "replace").splitlines()
        names = [name for name in listed if re.fullmatch(r"[!-~]{1,200}", name)] if code == 0 else []
        for name in names:
            code, _, said = _run(["-Y", "verify", "-I", name, *common], data)
            if code == 0:
                return name
    raise SparkfleetError(f"{what} is not signed by anyone in {path}: {printable(said, 200) or 'unknown key'}")


def _run(arguments: Sequence[str], data: bytes = b"") -> tuple[int, bytes, str]:
    """Exit code, what it printed, and what it said of it. It asks nobody for a passphrase. Raises SparkfleetError where
    it is missing."""
    try:
        done = subprocess.run(
            [_PROGRAM, *arguments],
            input=data,
            capture_output=True,
            timeout=SECONDS,
            check=False,
            env={**os.environ, "SSH_ASKPASS_REQUIRE": "force", "SSH_ASKPASS": "/bin/false", "LC_ALL": "C"},
        )
    except FileNotFoundError:
        raise SparkfleetError(
            f"{_PROGRAM} is not installed, which signs and checks bundles and locks: install openssh"
        ) from None
    except (OSError, subprocess.SubprocessError) as error:
        raise SparkfleetError(f"{_PROGRAM}: {error}") from None
    said = (done.stderr or done.stdout).decode("utf-8", "replace").strip()
    return done.returncode, done.stdout[:LARGEST], said[:LARGEST]
