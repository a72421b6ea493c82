# SPDX-License-Identifier: Apache-2.0
"""A secret of the inventory, wherever it is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.sparkfleet.dgx.plugins.plugin_utils import package  # noqa: F401 - finds what follows
from sparkfleet_host.registry import login_file

from sparkfleet import SparkfleetError
from sparkfleet.documents import secret as source
from sparkfleet.planning import variables


def _checked(found: Callable[[str, Any], Any]) -> Callable[[Any, str], Any]:
    def filtered(value: Any, name: str = "") -> Any:
        try:
            return found(name, value)
        except SparkfleetError as error:
            raise AnsibleFilterError(str(error)) from None

    return filtered


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict[str, Callable[[Any, str], Any]]:
        """Return them by name."""
        return {
            "secret": _checked(source.text),
            "secrets": _checked(source.each),
            "registry_logins": _checked(lambda name, value: login_file(variables.logins(value))),
        }
