"""Keys and certificates of a world, made for the occasion."""

from __future__ import annotations

import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

#: Whose place the simulated internet takes.
NAMES = ("nvcr.io", "huggingface.co", "nvidia.github.io")
DAYS = 3650


def ensure(folder: Path) -> None:
    """Make ``ssh/`` (a login key, a host key) and ``ca/`` (a CA, a certificate for NAMES) unless they are there."""
    if not (folder / "ssh" / "host_ed25519.pub").exists():
        for name in ("id_ed25519", "host_ed25519"):
            _ssh_key(folder / "ssh" / name)
    if not (folder / "ca" / "server.pem").exists():
        _certificates(folder / "ca")


def _private(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.touch(mode=0o600)
    path.write_bytes(content)


def _ssh_key(path: Path) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    form = serialization.PrivateFormat.OpenSSH
    _private(path, key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_name(f"{path.name}.pub").write_bytes(public + b"\n")


def _certificates(folder: Path) -> None:
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Sparkfleet simulated world")])
    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    authority = (
        _builder(name, name, key, key, now + datetime.timedelta(days=DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    _private(folder / "ca.key", _pem(key))
    _private(folder / "ca.pem", authority.public_bytes(serialization.Encoding.PEM))
    server, server_key = issue(folder, now + datetime.timedelta(days=DAYS))
    _private(folder / "server.key", server_key)
    _private(folder / "server.pem", server)


def issue(folder: Path, until: datetime.datetime) -> tuple[bytes, bytes]:
    """A certificate for NAMES by the CA in a folder, and its key, both in PEM; valid from 30 days ago."""
    authority = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    if not isinstance(authority, ec.EllipticCurvePrivateKey):
        raise TypeError(f"{folder}/ca.key is not a key on an elliptic curve")
    issuer = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes()).subject
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAMES[0])])
    server = (
        _builder(name, issuer, key, authority, until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in NAMES]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(authority, hashes.SHA256())
    )
    return server.public_bytes(serialization.Encoding.PEM), _pem(key)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    authority: ec.EllipticCurvePrivateKey,
    until: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # A host whose clock is days behind has to see that by its clock, not by our certificates.
        .not_valid_before(datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=30))
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    form, encryption = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, form, encryption)
