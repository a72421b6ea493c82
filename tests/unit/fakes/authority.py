"""A private certificate authority, made by openssl, and servers on loopback that have a certificate of it."""

from __future__ import annotations

import contextlib
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Authority:
    """`ca`: its certificate, `key`: its key, `server`: a certificate for localhost and 127.0.0.1 with its key."""

    def __init__(self, folder: Path, name: str = "Private CA of a test", days: int = 30) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.ca, self.key, self.server = (folder / each for each in ("ca.pem", "ca.key", "server.pem"))
        new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
        openssl("req", "-x509", *new, "-days", str(days), "-subj", f"/CN={name}", "-keyout", self.key, "-out", self.ca)
        request, extensions = folder / "request.pem", folder / "extensions"
        openssl("req", *new, "-subj", "/CN=localhost", "-keyout", folder / "server.key", "-out", request)
        extensions.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\nbasicConstraints=critical,CA:FALSE\n")
        issued = folder / "issued.pem"
        by = ("-CA", self.ca, "-CAkey", self.key, "-CAcreateserial", "-days", "30", "-extfile", extensions)
        openssl("x509", "-req", "-in", request, *by, "-out", issued)
        self.server.write_text(issued.read_text() + (folder / "server.key").read_text())

    @property
    def pem(self) -> str:
        """The certificate as text."""
        return self.ca.read_text(encoding="ascii")

    def wrap(self, server: ThreadingHTTPServer) -> None:
        """Let a server speak TLS."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.server)
        server.socket = context.wrap_socket(server.socket, server_side=True)

    @contextlib.contextmanager
    def serving(self, handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
        """HOST:PORT of a server with TLS."""
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            self.wrap(server)
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            yield f"localhost:{server.server_address[1]}"
            server.shutdown()


def openssl(*words: str | Path) -> None:
    """Run the real program."""
    subprocess.run(["openssl", *words], check=True, capture_output=True, timeout=60)
