# SPDX-License-Identifier: Apache-2.0
"""The program of the services on a host, as one file."""

from __future__ import annotations

import hashlib
from typing import Any

from ansible.errors import AnsibleError
from ansible.plugins.lookup import LookupBase
from ansible_collections.sparkfleet.dgx.plugins.plugin_utils import package  # noqa: F401 - finds what follows

from sparkfleet import paths
from sparkfleet.packaging import host_program

DOCUMENTATION = r"""
name: host_program
short_description: Path, or SHA-256, of the program that the services on a host run
description:
  - Packs plugins/module_utils/sparkfleet_host into one file that runs under a host's own Python, and
    returns its path on the controller. Identical sources produce identical bytes; it is built once and cached.
options:
  _terms:
    description: C(sha256) for the SHA-256 of the file in place of its path.
    type: list
    elements: str
    choices: [sha256]
    required: false
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
_raw: {description: The path or the SHA-256., type: list, elements: str}
"""


class LookupModule(LookupBase):  # type: ignore[misc]
    """Takes no terms, or C(sha256)."""

    def run(self, terms: list[str], variables: dict[str, Any] | None = None, **kwargs: Any) -> list[str]:
        """Return one path, or one SHA-256 in hexadecimal."""
        if terms not in ([], ["sha256"]):
            raise AnsibleError(f"lookup sparkfleet.dgx.host_program: {terms}: nothing, or 'sha256', is what it takes")
        program = host_program.build(paths.CACHE)
        return [hashlib.sha256(program.read_bytes()).hexdigest() if terms else str(program)]
