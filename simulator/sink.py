"""A mail server and a web server that keep what they are sent: where alerts go. Runs on a Spark by itself, too.

usage: sink.py FILE HTTP_PORT SMTP_PORT

Each message is a line of FILE: {"way": "mail", "ntfy" or the path, "body": text, "key": the bearer's}.
"""

from __future__ import annotations

import http.server
import json
import socketserver
import sys
import threading
from pathlib import Path

_LOCK = threading.Lock()


class Web(http.server.BaseHTTPRequestHandler):
    """Keeps what is posted; ntfy's topics are those whose template is asked for."""

    file: Path

    def do_POST(self) -> None:
        """Answer 200 to anything."""
        body = self.rfile.read(int(self.headers["Content-Length"])).decode("utf-8", "replace")
        way = "ntfy" if self.path.endswith("template=alertmanager") else self.path
        keep(self.file, way=way, body=body, key=self.headers.get("Authorization", ""))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class Mail(socketserver.StreamRequestHandler):
    """SMTP (RFC 5321) as far as a message needs it, without TLS and without a login."""

    file: Path

    def handle(self) -> None:
        """One connection."""
        self.say("220 sink ESMTP")
        while line := self.rfile.readline(4096).decode("utf-8", "replace").strip():
            verb = line.split()[0].upper()
            if verb == "AUTH":
                keep(self.file, way="login", body=line)
            if verb == "DATA":
                self.say("354 go on")
                lines = []
                while (part := self.rfile.readline(65536)) not in (b".\r\n", b""):
                    lines.append(part.decode("utf-8", "replace"))
                keep(self.file, way="mail", body="".join(lines))
            if verb == "QUIT":
                self.say("221 bye")
                return
            self.say("250 ok")

    def say(self, text: str) -> None:
        """One line of an answer."""
        self.wfile.write(f"{text}\r\n".encode())


def keep(file: Path, **message: str) -> None:
    """Add a line to the file."""
    with _LOCK, file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(message) + "\n")


class Server(socketserver.ThreadingTCPServer):
    """Many at a time."""

    allow_reuse_address = True
    daemon_threads = True


def serve(file: Path, http_port: int, smtp_port: int) -> tuple[Server, Server]:
    """Both servers, on loopback and running; port 0 for any that is free."""
    made = (
        Server(("127.0.0.1", http_port), type("Kept", (Web,), {"file": file})),
        Server(("127.0.0.1", smtp_port), type("Kept", (Mail,), {"file": file})),
    )
    for server in made:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    return made


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    threading.Event().wait()
