# SPDX-License-Identifier: Apache-2.0
"""Where runs leave their reports on the controller."""

from __future__ import annotations

from typing import Any

from ansible.plugins.lookup import LookupBase
from ansible_collections.sparkfleet.dgx.plugins.plugin_utils import package  # noqa: F401 - finds what follows

from sparkfleet import paths

DOCUMENTATION = r"""
name: state_dir
short_description: Folder on the controller for reports and event logs
description:
  - C(.sparkfleet) of a clone; for an installed collection C(sparkfleet) below C(XDG_STATE_HOME), C(~/.local/state) by
    default.
version_added: 0.2.0
author: ["The Sparkfleet developers"]
"""

EXAMPLES = r"""
- name: Say where the reports are
  ansible.builtin.debug:
    msg: "{{ lookup('sparkfleet.dgx.state_dir') }}/reports"
"""

RETURN = r"""
_raw: {description: The path., type: list, elements: path}
"""


class LookupModule(LookupBase):  # type: ignore[misc]
    """Takes no terms."""

    def run(self, terms: list[str], variables: dict[str, Any] | None = None, **kwargs: Any) -> list[str]:
        """Return one path."""
        return [str(paths.STATE)]
