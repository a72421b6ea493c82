#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action of the same name, which runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: spark_drift
short_description: Says how a Spark differs from the inventory
version_added: 0.2.0
description:
  - Fails where it does. Changes nothing, and contacts nobody.
  - This is an action, which runs on the controller.
options:
  look: {description: What M(sparkfleet.dgx.spark_plan) returned., type: dict, required: true}
  verified: {description: "Result of M(sparkfleet.dgx.vllm_verify), if it was asked.", type: dict, default: {}}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Changes nothing.}
  diff_mode: {support: none, description: There is nothing to show.}
"""

EXAMPLES = r"""
- name: Compare
  sparkfleet.dgx.spark_drift:
    look: "{{ look }}"
"""

RETURN = r"""
drift: {description: A line for each difference., returned: always, type: list, elements: str}
"""
