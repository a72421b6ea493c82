"""Sparkfleet: DGX Sparks from bare host to a verified vLLM endpoint."""

from __future__ import annotations

__version__ = "0.2.0"


class SparkfleetError(Exception):
    """Bad input or a refused plan: one message that names the value, the place and the remedy."""
