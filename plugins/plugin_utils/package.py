# SPDX-License-Identifier: Apache-2.0
"""Makes the package `sparkfleet` importable for this collection's plugins: the one that belongs to it.

A collection that `ansible-galaxy` installed has the sources of the package within it, as a clone has; they come before
an installed package of perhaps another version. The wheel's collection has none: there the package is next to it.
"""

from __future__ import annotations

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
for _folder in (_ROOT / "plugins" / "module_utils", _ROOT / "src"):
    if (_ROOT / "src").is_dir() and sys.path[0] != str(_folder):
        sys.path[:] = [str(_folder), *(entry for entry in sys.path if entry != str(_folder))]
