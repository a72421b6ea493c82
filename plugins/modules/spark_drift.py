#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action of the same name, which runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: spark_drift
short_description: Reports how a Spark differs from the inventory
version_added: 0.2.0
description:
  - Fails if it does. Changes nothing, and contacts no host.
  - This is an action plugin; it runs on the controller.
options:
  inspection: {description: What M(sparkfleet.dgx.spark_plan) returned., type: dict, required: true}
  verified: {description: "Result of M(sparkfleet.dgx.vllm_verify), if it was asked.", type: dict, default: {}}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Changes nothing.}
  diff_mode: {support: none, description: There is nothing to show.}
"""

EXAMPLES = r"""
- name: Compare
  sparkfleet.dgx.spark_drift:
    inspection: "{{ inspection }}"
"""

RETURN = r"""
drift: {description: A line for each difference., returned: always, type: list, elements: str}
"""
