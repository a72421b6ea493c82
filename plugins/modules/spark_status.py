#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""What a Spark serves now."""

from __future__ import annotations

DOCUMENTATION = r"""
module: spark_status
short_description: What a Spark serves, and how
description:
  - Releases, the containers of ours, the guard's record, health and figures of each engine, temperature; in one round
    trip, without a plan. Changes nothing. The action of the same name prints it, and can fail.
options:
  project_dir: {description: Folder of the releases., type: path, default: /opt/sparkfleet}
  state_dir: {description: Folder of journal and guard., type: path, default: /var/lib/sparkfleet}
  log_lines: {description: Number of log lines to return of each engine., type: int, default: 0}
  inspection:
    description: >-
      Set by the action; what M(sparkfleet.dgx.spark_plan) returned with C(status=true), to compare with the inventory.
    type: dict
  problem: {description: Set by the action; why it cannot be compared., type: str, default: ""}
  history: {description: Set by the action; return what happened on the host., type: bool, default: false}
  show: {description: Set by the action; print the status., type: bool, default: true}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Reads only.}
  diff_mode: {support: none, description: Reads only.}
"""

EXAMPLES = r"""
- name: Check what is served
  sparkfleet.dgx.spark_status:
  register: status
"""

RETURN = r"""
releases: {description: current previous numbers locks outcomes switch switch_active., returned: always, type: dict}
engines:
  description: >-
    Each engine of the current release - service, model, profile, repo, image, port, state, healthy, figures of vLLM's
    metrics, tokens_per_second of all its requests, the last lines of its log, and the guard's record of it.
  returned: always
  type: list
  elements: dict
engine:
  description: "Worst state of the engines; serving, loading, stopped, missing, given-up, switching…"
  returned: always
  type: str
containers: {description: Name and state of each of ours., returned: always, type: list, elements: dict}
healthy: {description: Whether all engines answer., returned: always, type: bool}
gpu: {description: Temperature in degrees Celsius and power draw in W or null., returned: always, type: dict}
log:
  description: The last lines of the engines' logs; with several engines each line starts with the service.
  returned: always
  type: list
  elements: str
history:
  description: By the action, if wanted; releases, the last switch and the guard's restarts, the oldest first.
  returned: action
  type: list
  elements: dict
shown:
  description: By the action, with the history; what status page and report show of the Spark.
  returned: action
  type: dict
summary: {description: By the action; the row that is printed., returned: action, type: dict}
"""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.docker import Docker
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.releases import Store
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.status import inspect_host


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "project_dir": {"type": "path", "default": "/opt/sparkfleet"},
            "state_dir": {"type": "path", "default": "/var/lib/sparkfleet"},
            "log_lines": {"type": "int", "default": 0},
            "show": {"type": "bool", "default": True},
        },
        supports_check_mode=True,
    )
    params = module.params
    store = Store(Path(params["project_dir"]), Path(params["state_dir"]))
    module.exit_json(changed=False, **inspect_host(store, Docker(timeout=10.0), params["log_lines"]))


if __name__ == "__main__":
    main()
