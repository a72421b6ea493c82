# SPDX-License-Identifier: Apache-2.0
"""The certificates of a file on the controller."""

from __future__ import annotations

from collections.abc import Callable

from ansible.errors import AnsibleFilterError
from ansible_collections.sparkfleet.dgx.plugins.plugin_utils import package  # noqa: F401 - finds what follows

from sparkfleet import SparkfleetError
from sparkfleet.documents import certificates


def _read(path: str) -> str:
    try:
        return certificates.read(str(path or ""))
    except SparkfleetError as error:
        raise AnsibleFilterError(str(error)) from None


class FilterModule:
    """The filter of this file."""

    def filters(self) -> dict[str, Callable[[str], str]]:
        """Return it by name."""
        return {"certificates": _read}
