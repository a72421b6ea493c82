"""`python -m sparkfleet`: the command."""

from __future__ import annotations

import sys

from sparkfleet.cli.main import main

sys.exit(main())
