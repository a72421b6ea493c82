"""Ctrl-C in the middle: `python -m simulator.interrupt TEXT SECONDS COMMAND...` runs a command, shows what it prints,
and sends it SIGINT so many seconds after TEXT was in its output. Exit code 124 when it was interrupted, else the
command's own (1 where that is 0: it ended before it could be interrupted)."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading


def main(argv: list[str]) -> int:
    """See above."""
    text, seconds, command = argv[0], float(argv[1]), argv[2:]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    sent = threading.Event()

    def interrupt() -> None:
        sent.set()
        running.send_signal(signal.SIGINT)

    timer: threading.Timer | None = None
    for line in running.stdout or ():
        print(line, end="", flush=True)
        if timer is None and text in line:
            timer = threading.Timer(seconds, interrupt)
            timer.start()
    code = running.wait()
    if timer is not None:
        timer.cancel()
    return 124 if sent.is_set() else code or 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
