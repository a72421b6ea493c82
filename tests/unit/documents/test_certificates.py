"""sparkfleet_ca_file is checked on the controller: what is refused names variable, file and remedy."""

from __future__ import annotations

import base64
import contextlib
import os
import ssl
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparkfleet import SparkfleetError
from sparkfleet.documents import certificates
from tests.unit.fakes.authority import Authority, openssl


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def refused(path: Path) -> str:
    with pytest.raises(SparkfleetError) as caught:
        certificates.read(str(path))
    text = str(caught.value)
    assert text.startswith(f"sparkfleet_ca_file: {path}")
    return text


def test_certificates_alone_are_taken_over(authority: Authority, tmp_path: Path) -> None:
    assert certificates.read("") == ""
    other = Authority(tmp_path / "other", "Another CA")
    both = tmp_path / "both.pem"
    both.write_text(
        f"# Of the company\r\n{authority.pem.replace(chr(10), chr(13) + chr(10))}\nsubject=CN=x\n{other.pem}"
    )
    assert certificates.read(str(both)) == authority.pem + other.pem
    both.write_text(authority.pem + authority.pem)
    assert certificates.read(str(both)) == authority.pem


def test_what_is_no_certificate_of_an_authority(authority: Authority, tmp_path: Path) -> None:
    assert "is not there: it is a file on this controller" in refused(tmp_path / "missing.pem")
    assert "cannot be read: Is a directory" in refused(tmp_path)
    file = tmp_path / "ca.pem"
    file.write_bytes(b"\0" * (certificates.BYTES + 1))
    assert "is larger than 64 KiB" in refused(file)
    file.write_text("nothing")
    assert "has no certificate in PEM" in refused(file)
    openssl("x509", "-in", authority.ca, "-outform", "DER", "-out", file)
    assert "`openssl x509 -inform DER -in FILE` converts" in refused(file)
    file.write_text(authority.pem + authority.key.read_text())
    assert "has a private key, which no host may be given" in refused(file)
    lines = authority.pem.splitlines()
    file.write_text("\n".join([*lines[:3], *lines[4:]]))
    assert "damaged" in refused(file)
    file.write_text((authority.folder / "issued.pem").read_text())
    assert "certificate 1 (CN=localhost) is not that of a CA" in refused(file)


def test_one_that_is_cut_off_is_not_passed_over(authority: Authority, tmp_path: Path) -> None:
    other, file = Authority(tmp_path / "other", "Another CA").pem, tmp_path / "ca.pem"
    trusted = other.replace("BEGIN CERT", "BEGIN TRUSTED CERT").replace("END CERT", "END TRUSTED CERT")
    for second in (other[: len(other) // 2], other[:-5], other[:20], other[: len(other) // 2] + other, trusted):
        file.write_text(authority.pem + second)
        said = refused(file)
        assert "damaged" in said and " begin, and " in said


def test_what_is_no_file(authority: Authority, tmp_path: Path) -> None:
    pipe = tmp_path / "ca.pem"
    os.mkfifo(pipe)
    assert "is no regular file" in refused(pipe)
    assert "is no regular file" in refused(Path("/dev/zero"))
    for name in ("a\0b", "\ud800"):
        with pytest.raises(SparkfleetError, match=r"sparkfleet_ca_file: .* cannot be read: ") as caught:
            certificates.read(f"{tmp_path}/{name}")
        assert "\0" not in str(caught.value)


def test_a_version_that_there_is_not(authority: Authority, tmp_path: Path) -> None:
    der = ssl.PEM_cert_to_DER_cert(authority.pem)
    third = b"\xa0\x03\x02\x01\x02"
    (tmp_path / "ca.pem").write_text(ssl.DER_cert_to_PEM_cert(der.replace(third, third[:-1] + b"\x07", 1)))
    assert "is damaged: " in refused(tmp_path / "ca.pem")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 1 << 12), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_certificate_with_other_bytes_is_taken_or_one_error(
    authority: Authority, tmp_path: Path, changes: list[tuple[int, int]]
) -> None:
    der = bytearray(ssl.PEM_cert_to_DER_cert(authority.pem))
    for place, value in changes:
        der[place % len(der)] = value
    text = base64.encodebytes(bytes(der)).decode()
    (tmp_path / "ca.pem").write_text(f"-----BEGIN CERTIFICATE-----\n{text}-----END CERTIFICATE-----\n")
    with contextlib.suppress(SparkfleetError):
        certificates.read(str(tmp_path / "ca.pem"))


def test_a_whole_bundle_is_not_taken_for_a_private_authority(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificates, "MOST", 1)
    file = tmp_path / "ca.pem"
    file.write_text(authority.pem + Authority(tmp_path / "other", "Another CA").pem)
    assert "has 2 certificates, at most 1: name a file with those of your own CA alone" in refused(file)


def test_one_that_has_expired(authority: Authority, tmp_path: Path) -> None:
    file, request = tmp_path / "ca.pem", tmp_path / "request.pem"
    folder = tmp_path / "demo"
    (folder / "new").mkdir(parents=True)
    (folder / "index").touch()
    (folder / "serial").write_text("01")
    (tmp_path / "ca.cnf").write_text(
        f"[ca]\ndefault_ca=d\n[d]\ndatabase={folder}/index\nserial={folder}/serial\nnew_certs_dir={folder}/new\n"
        "default_md=sha256\npolicy=p\nx509_extensions=v\n[p]\ncommonName=supplied\n[v]\nbasicConstraints=CA:TRUE\n"
    )
    openssl("req", "-new", "-key", authority.key, "-subj", "/CN=Old CA", "-out", request)
    dates = ("-startdate", "20200101000000Z", "-enddate", "20210101000000Z")
    sign = ("-selfsign", "-keyfile", authority.key, "-in", request, "-out", file, "-batch", "-notext", *dates)
    subprocess.run(["openssl", "ca", "-config", tmp_path / "ca.cnf", *sign], check=True, capture_output=True)
    assert "certificate 1 (CN=Old CA) expired on 2021-01-01: name its successor" in refused(file)


def test_an_authority_of_the_first_version_has_no_extensions(authority: Authority, tmp_path: Path) -> None:
    request, file = tmp_path / "request.pem", tmp_path / "ca.pem"
    openssl("req", "-new", "-key", authority.key, "-subj", "/CN=Ancient CA", "-out", request)
    openssl("x509", "-req", "-in", request, "-signkey", authority.key, "-days", "30", "-out", file)
    shown = subprocess.run(
        ["openssl", "x509", "-in", file, "-noout", "-text"], check=True, capture_output=True, text=True
    )
    if "Version: 1" in shown.stdout:  # OpenSSL 3.4 and later write the third version in any case
        assert certificates.read(str(file)) == file.read_text()
    else:
        assert "is not that of a CA" in refused(file)
