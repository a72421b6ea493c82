# SPDX-License-Identifier: Apache-2.0
"""The Hub's client as one file."""

from __future__ import annotations

from typing import Any

from ansible.plugins.lookup import LookupBase
from ansible_collections.sparkfleet.dgx.plugins.plugin_utils import package  # noqa: F401 - finds what follows

from sparkfleet import paths
from sparkfleet.packaging import hub_client

DOCUMENTATION = r"""
name: hub_client
short_description: Path of the Hub's client as one file
description:
  - Packs huggingface_hub of the controller's environment into one file that runs under a host's own Python, and
    returns its path on the controller. Identical versions produce identical bytes; it is built once and cached.
author: ["The Sparkfleet developers"]
"""

EXAMPLES = r"""
- name: Copy the Hub client
  ansible.builtin.copy:
    src: "{{ lookup('sparkfleet.dgx.hub_client') }}"
    dest: /opt/sparkfleet/lib/hf_client.pyz
    mode: "0644"
"""

RETURN = r"""
_raw: {description: The path., type: list, elements: path}
"""


class LookupModule(LookupBase):  # type: ignore[misc]
    """Takes no terms."""

    def run(self, terms: list[str], variables: dict[str, Any] | None = None, **kwargs: Any) -> list[str]:
        """Return one path."""
        return [str(hub_client.build(paths.CACHE))]
