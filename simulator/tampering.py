"""What someone between a Spark and its sources may do, or a source that is owned: each is refused, and what served goes
on serving.

    python -m simulator.tampering --world NAME [--only SCENE...] [--json FILE]

The world is one of two Sparks or more with the engine that fails on command, as site.yml has deployed it. The last
Spark is the victim. Each scene puts things back.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from simulator import keys
from simulator.fleet import Fleet
from simulator.shell import SimulatorError, expect
from simulator.spark import Spark
from simulator.world import REPOSITORY, World, put, run_in

NEXT = "nvcr.io/nvidia/vllm:25.10-py3"
MIDDLE_PORT = 5001
VARIABLES = {"sparkfleet_start_timeout": 40, "sparkfleet_guard_interval": 0.5}
REFUSED = 2

#: Passes on what docker-registry says, and changes it: `layer` a byte of each layer, `tag` what manifest there is.
MIDDLE = """
import http.client, http.server, sys
KIND, OTHER = sys.argv[1:3]

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        path = self.path
        if KIND == "tag" and "/manifests/" in path:
            path = path.rpartition("/")[0] + "/" + OTHER
        upstream = http.client.HTTPConnection("127.0.0.1", 5000)
        # Docker names each media type that it takes in a line of its own.
        headers = {name: ", ".join(self.headers.get_all(name)) for name in self.headers if name.lower() != "host"}
        upstream.request(self.command, path, headers={**headers, "Host": "nvcr.io", "X-Forwarded-Proto": "https"})
        answer = upstream.getresponse()
        body = bytearray(answer.read())
        if KIND == "layer" and "/blobs/" in path and not body.startswith(b"{"):
            body[len(body) // 2] ^= 1
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "docker-content-digest", "etag"):
                self.send_header(name, value)
        wanted = path if KIND != "tag" else self.path
        if "@" not in wanted and "sha256:" in wanted:
            self.send_header("Docker-Content-Digest", wanted.rpartition("/")[2])
        length = answer.getheader("Content-Length") if self.command == "HEAD" else len(body)
        self.send_header("Content-Length", str(length or 0))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
    do_HEAD = do_GET
    def log_message(self, *words):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", 5001), Handler).serve_forever()
"""
NGINX, CERTIFICATE = "/etc/nginx/nginx.conf", "etc/simulator/server"
WWW = "/srv/www/libnvidia-container"


class Scenes:
    """A world whose last Spark is the victim."""

    def __init__(self, world: World) -> None:
        self.world, self.names = world, sorted(world.state()["sparks"])
        self.victim = Spark(world, self.names[-1], VARIABLES)

    def internet(self, script: str) -> str:
        """Run a script on the host that plays the internet. Raises SimulatorError."""
        code, output = run_in(self.world.container("internet"), ["sh", "-euc", script])
        expect(code == 0, script, output)
        return output

    def refused(self, pattern: str, play: str = "site.yml", **variables: object) -> str:
        """Deploy on the victim, which must be refused in these words; what serves must serve as before."""
        before = self.victim.release()
        printed = self.victim.play(play, **variables)
        text = " ".join(printed.split())
        found = re.search(pattern, text)
        expect(found is not None and not re.search(r"failed=0 .*failed=0", text), pattern, printed[-3000:])
        expect(
            self.victim.answers() and self.victim.release() == before, "what served goes on serving", printed[-2000:]
        )
        return text[max(found.start() - 160, 0) : found.end() + 160] if found else ""

    @contextlib.contextmanager
    def certificate(self, certificate: bytes, key: bytes) -> Iterator[None]:
        """The simulated internet shows another certificate."""
        internet = self.world.container("internet")
        own = {
            f"{CERTIFICATE}.{kind}": (self.world.folder / "ca" / f"server.{kind}").read_bytes()
            for kind in ("pem", "key")
        }
        put(internet, {f"{CERTIFICATE}.pem": certificate, f"{CERTIFICATE}.key": key})
        try:
            self.internet("systemctl reload nginx; sleep 1")
            yield
        finally:
            put(internet, own)
            self.internet("systemctl reload nginx; sleep 1")

    @contextlib.contextmanager
    def middle(self, kind: str) -> Iterator[None]:
        """Someone between nvcr.io and its clients, with a certificate that is trusted."""
        # Not in /run: what is copied into a container does not reach its tmpfs.
        put(self.world.container("internet"), {"srv/middle.py": MIDDLE.encode()})
        self.internet(
            f"systemd-run --quiet --collect --unit middle python3 /srv/middle.py {kind} 25.09-py3; "
            f"curl -sf --retry 9 --retry-delay 1 --retry-all-errors http://127.0.0.1:{MIDDLE_PORT}/v2/ >/dev/null; "
            f"sed -i.own s/127.0.0.1:5000/127.0.0.1:{MIDDLE_PORT}/ {NGINX}; systemctl reload nginx; sleep 1"
        )
        try:
            yield
        finally:
            self.internet(f"mv {NGINX}.own {NGINX}; systemctl reload nginx; systemctl stop middle")

    # -- scenes --------------------------------------------------------------------------------------------

    def expired(self) -> str:
        """The registry's certificate ended yesterday."""
        yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
        with self.certificate(*keys.issue(self.world.folder / "ca", yesterday)):
            return self.refused(r"certificate.{0,40}expired", sparkfleet_image=NEXT)

    def stranger(self) -> str:
        """Someone in the middle shows a certificate of a CA that the Spark does not know."""
        with tempfile.TemporaryDirectory() as folder:
            keys.ensure(Path(folder))
            own = tuple((Path(folder) / "ca" / f"server.{kind}").read_bytes() for kind in ("pem", "key"))
        with self.certificate(*own):
            return self.refused(r"certificate verify failed|unknown authority", sparkfleet_image=NEXT)

    def layer(self) -> str:
        """A layer of the image arrives with one bit changed."""
        with self.middle("layer"):
            return self.refused(r"\[?image-differs|does not have the digest", sparkfleet_image=NEXT)

    def tag(self) -> str:
        """The registry has another image under the tag, and under the digest that the controller knows."""
        with self.middle("tag"):
            return self.refused(r"\[?image-differs|does not have the digest", sparkfleet_image=NEXT)

    def package(self) -> str:
        """A package of NVIDIA's repository was changed; then what its list says of it as well, which is signed."""
        self.victim.sh("dpkg --purge --force-depends nvidia-container-toolkit >/dev/null; apt-get clean")
        change = f"cp -a {WWW} /srv/www/own; for deb in {WWW}/stable/deb/*/*.deb; do printf x >>$deb; done"
        self.internet(change)
        try:
            first = self.refused(r"(unexpected size|Hash Sum mismatch|hash sum mismatch)")
            self.internet(
                f"for folder in {WWW}/stable/deb/*; do cd $folder; apt-ftparchive packages . >Packages; "
                "gzip -knf Packages; done"
            )
            self.victim.sh("rm -rf /var/lib/apt/lists/*; apt-get clean")
            second = self.refused(r"(unexpected size|Hash Sum mismatch|hash sum mismatch|BADSIG|not signed)")
        finally:
            self.internet(f"rm -rf {WWW}; mv /srv/www/own {WWW}")
            self.victim.sh("rm -rf /var/lib/apt/lists/*; apt-get clean")
            printed = self.victim.play()
        expect("failed=0" in printed, "it is installed again", printed[-3000:])
        return f"{first} | {second}"

    def key(self) -> str:
        """The repository is signed by someone else, whose key it offers."""
        self.victim.sh(
            "dpkg --purge --force-depends nvidia-container-toolkit >/dev/null; "
            "rm -f /etc/apt/keyrings/nvidia-container-toolkit.gpg"
        )
        self.internet(
            f"cp -a {WWW} /srv/www/own; export GNUPGHOME=/srv/gnupg-other; mkdir -p -m 700 $GNUPGHOME; "
            "gpg --batch --passphrase '' --quick-generate-key 'Mallory <m@example.invalid>' rsa3072 sign never; "
            f"gpg --batch --armor --export >{WWW}/gpgkey; for folder in {WWW}/stable/deb/*; do cd $folder; "
            "rm InRelease; "
            "gpg --batch --clearsign --output InRelease Release; done; gpgconf --kill all"
        )
        try:
            return self.refused(r"has none of the wanted keys")
        finally:
            self.internet(f"rm -rf {WWW} /srv/gnupg-other; mv /srv/www/own {WWW}")
            printed = self.victim.play()
            expect("failed=0" in printed, "it is installed again", printed[-3000:])

    def source(self) -> str:
        """Another Spark that shares a model has changed a file of weights, its size kept."""
        source = Spark(self.world, self.names[0], VARIABLES)
        folder = f"/opt/hf/models--{REPOSITORY.replace('/', '--')}"
        blob = source.sh(f"ls -S {folder}/blobs/* | head -1").strip()
        change = f"dd if=/dev/urandom of={blob} bs=4096 count=1 seek=8 conv=notrunc status=none"
        source.sh(f"cp -p {blob} /root/kept; touch -r {blob} /root/time; {change}; touch -r /root/time {blob}")
        self.victim.sh(f"rm -rf {folder} /opt/hf/.sparkfleet/models--{REPOSITORY.replace('/', '--')}")
        try:
            fleet = Fleet(self.world, [self.names[0]], 1)
            code, printed, _ = fleet.run("ansible-playbook", "site.yml", **VARIABLES, sparkfleet_all_at_once=True)
            expect(code == 0, "site.yml", printed[-3000:])
            digest = self.victim.sh(f"sha256sum {folder}/blobs/{Path(blob).name}").split()[0]
            expect(digest == Path(blob).name, "the victim has the model's own bytes", printed[-3000:])
            expect(self.victim.answers(), "it serves", printed[-2000:])
        finally:
            source.sh(f"cp -p /root/kept {blob}; rm /root/kept")
        lines = [line for line in printed.splitlines() if source.name in line and self.victim.name in line]
        expect(any("differs from the Hub's" in line for line in lines), "it is said", printed)
        return " | ".join(lines)


SCENES = ("expired", "stranger", "layer", "tag", "package", "key", "source")


def main(argv: Sequence[str] | None = None) -> int:
    """Play the scenes; 1 when one is not refused."""
    parser = argparse.ArgumentParser(prog="python -m simulator.tampering", description="What is tampered with.")
    parser.add_argument("--world", default="tampering")
    parser.add_argument("--only", nargs="*", choices=SCENES)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    scenes, found, bad = Scenes(World(options.world, lambda text: None)), dict[str, str](), False
    for name in options.only or SCENES:
        try:
            found[name] = getattr(scenes, name)()
            print(f"{name}: refused: {found[name]}", flush=True)
        except SimulatorError as error:
            bad = True
            print(f"{name}: FAILED: {error}", file=sys.stderr, flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
