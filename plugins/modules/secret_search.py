#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: where a secret is on a host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: secret_search
short_description: Finds copies of a secret on a host
description:
  - Searches files, the command lines and environments of all processes, and what Docker keeps of containers (their
    settings and logs) for some values, and reports the places, never the values.
  - Files of more than 64 MiB are searched at their last 64 MiB. Models and layers of images are not searched.
  - Changes nothing.
version_added: 0.3.0
options:
  values: {description: The secrets., type: list, elements: str, required: true}
  paths:
    description: Files, and folders with all below them.
    type: list
    elements: path
    default:
      - /etc
      - /opt/sparkfleet
      - /root
      - /run
      - /tmp
      - /usr/local
      - /var/lib/sparkfleet
      - /var/lib/docker/containers
      - /var/log
      - /var/tmp
      - /home
  allowed: {description: Files that may have them., type: list, elements: path, default: []}
  seconds: {description: How long it may take., type: float, default: 120}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Reads only.}
  diff_mode: {support: none, description: Reads only.}
"""

EXAMPLES = r"""
- name: Find copies of the key before
  sparkfleet.dgx.secret_search:
    values: ["{{ key_before }}"]
  register: copies
  failed_when: copies.found | length > 0
"""

RETURN = r"""
found: {description: Places that have one of them., returned: always, type: list, elements: str}
searched: {description: Number of places that were searched., returned: always, type: int}
unfinished: {description: Whether the time was over before the end., returned: always, type: bool}
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.copies import PLACES, SHORTEST, search


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "values": {"type": "list", "elements": "str", "required": True, "no_log": True},
            "paths": {"type": "list", "elements": "path", "default": PLACES},
            "allowed": {"type": "list", "elements": "path", "default": []},
            "seconds": {"type": "float", "default": 120.0},
        },
        supports_check_mode=True,
    )
    params = module.params
    short = [value for value in params["values"] if len(value) < SHORTEST]
    if short or not params["values"]:
        module.fail_json(msg=f"values: at least one, of {SHORTEST} characters or more")
    module.exit_json(changed=False, **search(*(params[key] for key in ("values", "paths", "allowed", "seconds"))))


if __name__ == "__main__":
    main()
