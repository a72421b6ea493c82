#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action of the same name, which runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: rollout_schedule
short_description: Divides the planned Sparks into the waves of a rollout
version_added: 0.2.0
description:
  - Reads the plans of the run and the settings C(sparkfleet_rollout_*) of all Sparks. Contacts no host.
  - This is an action plugin; it runs on the controller.
options: {}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Changes nothing.}
  diff_mode: {support: none, description: There is nothing to show.}
"""

EXAMPLES = r"""
- name: Divide the Sparks into waves
  sparkfleet.dgx.rollout_schedule:
  register: rollout
  run_once: true
"""

RETURN = r"""
waves: {description: Names of the Sparks of each wave., returned: success, type: list, elements: list}
labels: {description: Label of each wave., returned: success, type: list, elements: str}
serial: {description: Size of each wave., returned: success, type: list, elements: int}
on_failure: {description: C(stop) or C(continue)., returned: success, type: str}
hosts: {description: "Name, model and needed, of each Spark.", returned: success, type: list, elements: dict}
drained: {description: Sparks that are left out., returned: success, type: list, elements: str}
"""
