#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action of the same name, which runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: rollout_wave
short_description: Whether the next wave of a rollout may begin
version_added: 0.2.0
description:
  - It may when every Spark of the waves before it serves. ansible-core counts failed hosts alone for
    C(max_fail_percentage), never unreachable ones, and these skip C(rescue) and C(always) as well; so what is
    counted is what has come to its end. Contacts nobody.
  - This is an action, which runs on the controller.
options:
  schedule: {description: What M(sparkfleet.dgx.rollout_schedule) returned., type: dict, required: true}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Changes nothing.}
  diff_mode: {support: none, description: There is nothing to show.}
"""

EXAMPLES = r"""
- name: See whether all earlier waves serve
  sparkfleet.dgx.rollout_wave:
    schedule: "{{ rollout }}"
  register: wave
  run_once: true
"""

RETURN = r"""
go: {description: Whether to go on., returned: success, type: bool}
unfinished: {description: Sparks of earlier waves that do not serve., returned: success, type: list, elements: str}
"""
