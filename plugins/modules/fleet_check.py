#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action of the same name, which runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: fleet_check
short_description: Refuses what would stop several Sparks at once
version_added: 0.2.0
description:
  - Checks the plans or states of all hosts of a play, and fails before anything changes if more than one
    serving Spark would stop, unless C(sparkfleet_all_at_once) is true, or if two inventory names are the same machine.
  - Runs once for all hosts, without contacting any of them.
  - This is an action plugin; it runs on the controller.
options:
  stages:
    description: Stages of the plans that M(sparkfleet.dgx.spark_plan) registered as C(sparkfleet_inspection).
    type: list
    elements: str
    choices: [prepare, deploy]
    default: []
  verb:
    description: >-
      Instead of O(stages), what to do with what M(sparkfleet.dgx.spark_status) registered as C(status).
    type: str
    choices: [stop, start, restart, rollback, remove]
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Never refuses in check mode.}
  diff_mode: {support: none, description: There is nothing to show.}
"""

EXAMPLES = r"""
- name: Check what would stop
  sparkfleet.dgx.fleet_check:
    stages: [deploy]
  run_once: true
"""

RETURN = r"""
"""
