"""Certificate authorities of the inventory (`sparkfleet_ca_file`): a PEM file of the controller, checked before a host
is given it."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

from sparkfleet_host import trust
from sparkfleet_host.bounded import BoundsError, printable, read_file

from sparkfleet import SparkfleetError

VARIABLE = "sparkfleet_ca_file"
BYTES = 64 << 10
#: A system's whole bundle has more than a hundred: it is there already, and its updates are the distribution's.
MOST = 16


def read(path: str) -> str:
    """The certificates of a file, in PEM, without what else it has; "" for no file. Raises SparkfleetError, which names
    the variable, the file and what to do."""
    if not path:
        return ""
    at = f"{VARIABLE}: {printable(path, 1000)}"
    try:
        text = read_file(Path(path), BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        raise SparkfleetError(f"{at} is not there: it is a file on this controller") from None
    except BoundsError:
        if not Path(path).is_file():
            raise SparkfleetError(f"{at} is no regular file: name one with the certificate of your own CA") from None
        raise SparkfleetError(
            f"{at} is larger than {BYTES >> 10} KiB: name a file with the certificate of your own CA alone"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL, or what is not UTF-8
        reason = error.strerror if isinstance(error, OSError) else printable(str(error), 100)
        raise SparkfleetError(f"{at} cannot be read: {reason}") from None
    if "PRIVATE KEY-----" in text:
        raise SparkfleetError(
            f"{at} has a private key, which no host may be given: name a file with the certificate of the CA alone"
        )
    try:
        each = trust.split(text)
    except ValueError as error:
        raise SparkfleetError(f"{at} has a certificate that is damaged: {printable(str(error), 100)}") from None
    if not each:
        raise SparkfleetError(
            f"{at} has no certificate in PEM (-----BEGIN CERTIFICATE-----): `openssl x509 -inform DER -in FILE` "
            "converts one in DER"
        )
    if len(each) > MOST:
        raise SparkfleetError(
            f"{at} has {len(each)} certificates, at most {MOST}: name a file with those of your own CA alone; hosts "
            "have the public ones already"
        )
    for place, pem in enumerate(each.values(), 1):
        _check(f"{at}: certificate {place}", pem)
    return "".join(each.values())


def _check(at: str, pem: str) -> None:
    """Raise SparkfleetError for what is not the valid certificate of an authority."""
    from cryptography import x509  # noqa: PLC0415 - most runs have no private CA
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415 - the same

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem)
        known = x509.load_pem_x509_certificate(pem.encode("ascii"))
        subject = printable(known.subject.rfc4514_string(), 200)
        basic = [one.value for one in known.extensions if isinstance(one.value, x509.BasicConstraints)]
        ends = known.not_valid_after_utc
    except (
        *(ssl.SSLError, ValueError, UnsupportedAlgorithm),
        *(x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType),
    ) as error:
        raise SparkfleetError(f"{at} is damaged: {printable(str(error), 200)}") from None
    # Certificates of the first version have no extensions, and old authorities have such ones.
    if known.version is not x509.Version.v1 and not (basic and basic[0].ca):
        raise SparkfleetError(
            f"{at} ({subject}) is not that of a CA, so it verifies nothing else: name that of its issuer"
        )
    if ends < datetime.datetime.now(datetime.UTC):
        raise SparkfleetError(f"{at} ({subject}) expired on {ends:%Y-%m-%d}: name its successor")
