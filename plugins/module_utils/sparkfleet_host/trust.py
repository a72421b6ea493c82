"""Certificate authorities that a host trusts besides its own: in the trust store of Debian and Ubuntu, which apt,
Python, curl and the containers of downloads read, and for Docker, by registry.

Docker reads the trust store once, when it first verifies a certificate; `/etc/docker/certs.d/REGISTRY` it reads at each
pull, for the registry itself and for whatever that redirects to or gets its tokens from. Only Docker Hub has no such
folder with Docker's own image store (`lookupV2Endpoints` in moby's `registry/service_v2.go`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import ssl
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .bounded import BoundsError, printable, read_file
from .releases import write_bytes

PREFIX = "sparkfleet-"
#: Of a registry's folder, which may have certificates of others.
DOCKER_NAME = f"{PREFIX}ca.crt"
#: What the distribution's program writes: its own authorities and those of the host's owner.
CA_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
BUNDLE_BYTES = 4 << 20
UPDATE_SECONDS = 120
#: What begins a certificate, of whatever kind, or is cut off before it says what it begins.
_BEGIN = re.compile(r"-----BEGIN(?: [A-Z0-9 ]*CERTIFICATE-----|(?! [A-Z0-9 ]+-----))")
_BLOCK = re.compile(r"-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----")


class TrustError(Exception):
    """The trust store cannot be changed; says what to do about it."""


def split(pem: str) -> dict[str, str]:
    """Each certificate by the name of its file, in PEM; the same certificate has the same name and text however it is
    written. Raises ValueError."""
    found = {}
    blocks = _BLOCK.findall(pem)
    if (begun := len(_BEGIN.findall(pem))) != len(blocks):
        raise ValueError(f"{begun} begin, and {len(blocks)} are whole and of the kind -----BEGIN CERTIFICATE-----")
    for block in blocks:
        der = ssl.PEM_cert_to_DER_cert(block)
        found[f"{PREFIX}{hashlib.sha256(der).hexdigest()[:16]}.crt"] = ssl.DER_cert_to_PEM_cert(der)
    return found


@dataclass(frozen=True)
class Store:
    """Where certificates are on a host."""

    local: Path = Path("/usr/local/share/ca-certificates")
    etc: Path = Path(CA_BUNDLE).parent
    docker: Path = Path("/etc/docker/certs.d")
    program: str = "/usr/sbin/update-ca-certificates"
    #: Options of the program, for another place than its own.
    options: tuple[str, ...] = ()

    @property
    def bundle(self) -> Path:
        """What the program writes."""
        return self.etc / Path(CA_BUNDLE).name

    def wanted(self, pem: str, registries: Iterable[str]) -> dict[Path, str]:
        """The files that there should be. Raises ValueError."""
        each = split(pem)
        files = {self.local / name: text for name, text in each.items()}
        whole = "".join(each.values())
        return files | ({self.docker / name / DOCKER_NAME: whole for name in registries} if each else {})

    def found(self) -> dict[Path, str]:
        """Our files that are there; one that cannot be read counts as empty."""
        paths = [*self.local.glob(f"{PREFIX}*.crt"), *self.docker.glob(f"*/{DOCKER_NAME}")]
        return {path: _text(path) for path in sorted(paths)}

    def difference(self, pem: str, registries: Iterable[str]) -> tuple[dict[Path, str], list[Path]]:
        """Files to write, and files to remove. What is right for a registry that no engine uses now stays: a rollback
        may want it. Raises ValueError."""
        wanted, here = self.wanted(pem, registries), self.found()
        whole = "".join(split(pem).values())
        stale = [path for path, text in here.items() if path not in wanted]
        kept = [path for path in stale if path.parent.parent == self.docker and whole and here[path] == whole]
        write = {path: text for path, text in wanted.items() if here.get(path) != text}
        return write, [path for path in stale if path not in kept]

    def is_current(self, pem: str, registries: Iterable[str]) -> bool:
        """Whether nothing is left to do. Raises ValueError."""
        return not any(self.difference(pem, registries)) and self._is_built(pem)

    def _is_built(self, pem: str) -> bool:
        """Whether the bundle has the certificates, and links to ones that are gone are gone as well."""
        bundle = _text(self.bundle) if pem else ""
        return all(text in bundle for text in split(pem).values()) and not self._dangling()

    def _dangling(self) -> list[Path]:
        """Links to our certificates that are gone: by their own names, or by a hash."""
        links = [path for path in self.etc.iterdir() if path.is_symlink()] if self.etc.is_dir() else []
        ours = [path for path in links if path.name.startswith(PREFIX) or str(path.readlink()).startswith(PREFIX)]
        return [path for path in ours if not path.exists()]

    def apply(self, pem: str, registries: Iterable[str]) -> None:
        """Write and remove what differs, and rebuild the bundle if it has to be. Raises TrustError, OSError,
        ValueError."""
        write, remove = self.difference(pem, registries)
        if pem and not self.has_program():
            raise TrustError(f"{self.program} is missing: install the package ca-certificates on the host")
        for path in remove:
            path.unlink()
            if path.name == DOCKER_NAME:
                with contextlib.suppress(OSError):  # it has certificates of others
                    path.parent.rmdir()
        for path, text in write.items():
            write_bytes(path, text.encode("ascii"))
        local = [path for path in (*write, *remove) if path.parent == self.local]
        # Removed ones are in the bundle for as long as it is not rebuilt, whatever interrupts this.
        if local or not self._is_built(pem):
            self._update()
            for link in self._dangling():
                link.unlink()
            if not self._is_built(pem):
                raise TrustError(f"{self.program} ran, but {self.bundle} does not have the certificates")

    def has_program(self) -> bool:
        """Whether the distribution's program is there."""
        return os.access(self.program, os.X_OK)

    def _update(self) -> None:
        if not self.has_program():  # then there is no bundle either
            return
        path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
        try:
            subprocess.run(
                [self.program, *self.options],
                env={**os.environ, "PATH": path, "LC_ALL": "C.UTF-8"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=UPDATE_SECONDS,
                check=True,
            )
        except subprocess.CalledProcessError as error:
            said = printable(" ".join((error.stderr or error.stdout).split()), 300)
            raise TrustError(f"{self.program} failed ({error.returncode}): {said}") from None
        except subprocess.TimeoutExpired:
            raise TrustError(f"{self.program} took longer than {UPDATE_SECONDS} s") from None


def context(pem: str) -> ssl.SSLContext:
    """What verifies servers: the authorities of this machine, and these."""
    made = ssl.create_default_context()
    if pem:
        made.load_verify_locations(cadata=pem)
    return made


def _text(path: Path) -> str:
    try:
        return read_file(path, BUNDLE_BYTES).decode("utf-8", "replace")
    except (OSError, BoundsError):
        return ""
