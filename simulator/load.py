"""Load on an endpoint: so many streams at a time, each request counted: sent, answered right, failed.

    python -m simulator.load --url http://127.0.0.1:8000 --streams 8 --seconds 60 [--key KEY] [--json FILE]

Several URLs, separated by commas, share the streams. Every other request streams. An answer counts only when it is
whole: the words expected, and [DONE] of a stream.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import math
import sys
import threading
import time
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import urllib3

from simulator.spark import QUESTION
from simulator.world import REPOSITORY

EXPECT = "Paris"
TIMEOUT = 120.0


@dataclasses.dataclass
class Load:
    """A load that runs from `start` to `stop`. Times in seconds. `ca`: file with what signs the certificates of https,
    "" for what this machine trusts; `name`: what these are of, "" for the host of the URL."""

    url: str
    streams: int
    key: str = ""
    ca: str = ""
    name: str = ""
    answered: int = 0
    latencies: list[float] = dataclasses.field(default_factory=list)
    failures: list[tuple[float, str]] = dataclasses.field(default_factory=list)  # seconds since the start, why
    right: list[float] = dataclasses.field(default_factory=list)  # when an answer came, seconds since the start
    sent: int = 0

    def start(self) -> Load:
        """Begin; returns itself."""
        self._over, self._lock, self._began = threading.Event(), threading.Lock(), time.monotonic()
        self._threads = [
            threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(self.streams)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> dict[str, Any]:
        """Let the requests that run end; the result."""
        self._over.set()
        for thread in self._threads:
            thread.join(TIMEOUT)
        self._seconds = time.monotonic() - self._began
        return self.result()

    def result(self) -> dict[str, Any]:
        """Counts, latencies and reasons as plain data."""
        ordered = sorted(self.latencies)

        def quantile(share: float) -> float | None:
            return round(ordered[max(math.ceil(share * len(ordered)) - 1, 0)], 4) if ordered else None

        return {
            "streams": self.streams,
            "sent": self.sent,
            "answered": self.answered,
            "failed": len(self.failures),
            "seconds": round(self._seconds, 1),
            "requests_per_second": round(self.answered / self._seconds, 2),
            "p50_s": quantile(0.5),
            "p99_s": quantile(0.99),
            "reasons": dict(collections.Counter(reason for _, reason in self.failures)),
            "longest_gap_s": round(max((b - a for a, b in itertools.pairwise(sorted(self.right))), default=0.0), 2),
            "failed_at_s": [round(at, 1) for at, _ in self.failures],
        }

    def _run(self, number: int) -> None:
        urls = self.url.split(",")
        place = urllib.parse.urlsplit(urls[number % len(urls)])
        # Kept connections as clients have them: one that was closed while idle is opened again, nothing is asked twice.
        pool = urllib3.connection_from_url(
            f"{place.scheme}://{place.netloc}",
            **{"maxsize": 1, "timeout": TIMEOUT, "retries": False},
            **({"ca_certs": self.ca or None, "assert_hostname": self.name or None} if place.scheme == "https" else {}),
        )
        count = number
        while not self._over.is_set():
            count += 1
            began, reason = time.monotonic(), ""
            try:
                self._ask(pool, place.path, count % 2 == 0)
            except (OSError, urllib3.exceptions.HTTPError, ValueError, KeyError) as error:
                reason = f"{type(error).__name__}: {error}"[:120]
                self._over.wait(0.1)  # one who refuses would be asked as fast as the machine can
            with self._lock:
                self.sent += 1
                if reason:
                    self.failures.append((began - self._began, reason))
                else:
                    self.answered += 1
                    self.latencies.append(time.monotonic() - began)
                    self.right.append(time.monotonic() - self._began)

    def _ask(self, pool: urllib3.HTTPConnectionPool, path: str, stream: bool) -> None:
        """One request. Raises OSError, urllib3's HTTPError, ValueError (not what was expected) or KeyError."""
        body = {"model": REPOSITORY, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 32}
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        data = json.dumps({**body, "temperature": 0, "stream": stream})
        answer = pool.request("POST", f"{path}/v1/chat/completions", body=data, headers=headers)
        text = answer.data.decode("utf-8", "replace")
        if answer.status != 200:
            raise ValueError(f"HTTP {answer.status}")
        if stream:
            if not text.rstrip().endswith("data: [DONE]"):
                raise ValueError("the stream ended without [DONE]")
            events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
            printed = "".join(part["delta"].get("content") or "" for event in events for part in event["choices"])
        else:
            printed = json.loads(text)["choices"][0]["message"]["content"]
        if EXPECT not in printed:
            raise ValueError("another answer than expected")


def line(result: dict[str, Any]) -> str:
    """The result in a line."""
    reasons = "".join(f"; {count} x {reason}" for reason, count in result["reasons"].items())
    return (
        f"{result['streams']} streams, {result['seconds']:g} s: {result['sent']} sent, {result['answered']} answered, "
        f"{result['failed']} failed; {result['requests_per_second']:g} a second, p50 {result['p50_s']} s, "
        f"p99 {result['p99_s']} s{reasons}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Put load on an endpoint; 1 when a request failed."""
    parser = argparse.ArgumentParser(prog="python -m simulator.load", description="Load on an endpoint.")
    parser.add_argument("--url", required=True)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--key", default="")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    load = Load(options.url, options.streams, options.key).start()
    with contextlib.suppress(KeyboardInterrupt):
        time.sleep(options.seconds)
    result = load.stop()
    print(line(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
