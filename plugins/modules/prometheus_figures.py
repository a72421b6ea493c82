#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Module: what Prometheus on this host knows of the last hours."""

from __future__ import annotations

DOCUMENTATION = r"""
module: prometheus_figures
short_description: Read figures of the last hours from Prometheus
version_added: 0.3.0
description:
  - Asks Prometheus on this host, on loopback, for the given expressions and for alerts. Reads only, within limits.
  - The action of the same name asks for those of the status page.
options:
  port: {description: TCP port of Prometheus., type: int, required: true}
  hours: {description: Hours to look back., type: float, default: 24.0}
  queries:
    description: Set by the action; by name the C(expr) and whether its last hours are wanted as well (C(window)).
    type: dict
    default: {}
  totals:
    description: Set by the action; by name the expression that is added up over these hours.
    type: dict
    default: {}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Reads only.}
  diff_mode: {support: none, description: Reads only.}
"""

EXAMPLES = r"""
- name: Read the last day
  sparkfleet.dgx.prometheus_figures:
    port: 9114
  register: found
"""

RETURN = r"""
figures:
  description: >-
    Time, samples of now, means of the window and totals by name, alerts that fire and fired; and what is missing.
  returned: success
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import prometheus
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.http import HttpError


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "port": {"type": "int", "required": True},
            "hours": {"type": "float", "default": 24.0},
            "queries": {"type": "dict", "default": {}},
            "totals": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    params = module.params
    try:
        found = prometheus.figures(params["port"], params["queries"], params["hours"] * 3600, params["totals"])
    except HttpError as error:
        module.fail_json(msg=f"Prometheus does not answer on port {params['port']}: {error}")
    module.exit_json(changed=False, figures=found)


if __name__ == "__main__":
    main()
