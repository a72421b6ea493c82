# SPDX-License-Identifier: Apache-2.0
"""The program of the services on a host, as one file."""

from __future__ import annotations

from typing import Any

from ansible.plugins.lookup import LookupBase
from ansible_collections.sparkfleet.dgx.plugins.plugin_utils import package  # noqa: F401 - finds what follows

from sparkfleet import paths
from sparkfleet.packaging import host_program

DOCUMENTATION = r"""
name: host_program
short_description: Path of the program that the services on a host run
description:
  - Packs plugins/module_utils/sparkfleet_host into one file that runs under a host's own Python, and
    returns its path on the controller. Identical sources produce identical bytes; it is built once and cached.
author: ["The Sparkfleet developers"]
"""

EXAMPLES = r"""
- name: Copy the program
  ansible.builtin.copy:
    src: "{{ lookup('sparkfleet.dgx.host_program') }}"
    dest: /opt/sparkfleet/lib/sparkfleet_host.pyz
    mode: "0644"
"""

RETURN = r"""
_raw: {description: The path., type: list, elements: path}
"""


class LookupModule(LookupBase):  # type: ignore[misc]
    """Takes no terms."""

    def run(self, terms: list[str], variables: dict[str, Any] | None = None, **kwargs: Any) -> list[str]:
        """Return one path."""
        return [str(host_program.build(paths.CACHE))]
