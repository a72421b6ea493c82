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

DOCUMENTATION = r"""
name: secret
short_description: A secret of the inventory, from a file, the environment or a command
description:
  - >-
    Text is returned as it is. A mapping names where the secret is, C({file: PATH}), C({env: NAME}) or
    C({command: [pass, show, NAME]}), and is replaced by the first line there.
  - Files are read and commands are run on the controller, commands once a run.
version_added: 0.3.0
positional: name
options:
  _input: {description: The value of the variable., type: raw, required: true}
  name: {description: Name of the variable for messages., type: str, required: true}
author: ["The Sparkfleet developers"]
"""

EXAMPLES = r"""
- name: Write the token
  sparkfleet.dgx.secret_file:
    path: /etc/sparkfleet/hf_token
    content: "{{ sparkfleet_hf_token | sparkfleet.dgx.secret('sparkfleet_hf_token') }}"
"""

RETURN = r"""
_value: {description: The secret., type: str}
"""


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
