#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action of the same name, which runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: rollout_wave
short_description: Decides whether the next wave of a rollout may start
version_added: 0.2.0
description:
  - It may start when every Spark of the earlier waves serves. ansible-core counts only failed hosts for
    C(max_fail_percentage), never unreachable ones, which also skip C(rescue) and C(always); so the Sparks that
    completed are counted. Contacts no host.
  - This is an action plugin; it runs on the controller.
options:
  schedule: {description: What M(sparkfleet.dgx.rollout_schedule) returned., type: dict, required: true}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Changes nothing.}
  diff_mode: {support: none, description: There is nothing to show.}
"""

EXAMPLES = r"""
- name: Check whether all earlier waves serve
  sparkfleet.dgx.rollout_wave:
    schedule: "{{ rollout }}"
  register: wave
  run_once: true
"""

RETURN = r"""
go: {description: Whether to continue., returned: success, type: bool}
unfinished: {description: Sparks of earlier waves that do not serve., returned: success, type: list, elements: str}
canary: {description: Whether the wave is that of a canary., returned: success, type: bool}
"""
