# SPDX-License-Identifier: Apache-2.0
"""The program of the services on a host, and of ranks over Ray:
`python3 sparkfleet_host.pyz switch|guard|names|share|integrity|sensors|rank …`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

VERBS = ("switch", "guard", "names", "share", "integrity", "sensors", "rank")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns its exit code, 2 for one that there is not."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in VERBS:
        print(f"usage: sparkfleet_host.pyz {'|'.join(VERBS)} …", file=sys.stderr)
        return 2
    module = importlib.import_module(f"{__package__}.{words[0]}")
    return int(module.main(words[1:]))


if __name__ == "__main__":
    sys.exit(main())
