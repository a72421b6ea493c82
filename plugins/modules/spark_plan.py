# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action plugin of the same name; it never runs on a host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: spark_plan
short_description: Inspects a Spark once and plans what to do there
description:
  - Runs the module M(sparkfleet.dgx.spark_state) on the host, and makes the plan on the controller
    (C(sparkfleet.planning.plan)).
  - Fails with every finding at once if the input is wrong or the host cannot serve the model.
  - The settings are the host's variables C(sparkfleet_*), which the role C(sparkfleet) documents and has defaults for,
    and C(sparkfleet_vllm_*), arguments of C(vllm serve).
options:
  again:
    description: Inspect the host even if an earlier task of the run has, whose result is returned otherwise.
    type: bool
    default: true
  status:
    description: Include what is served, for M(sparkfleet.dgx.spark_status), and print nothing.
    type: bool
    default: false
  trial_weights:
    description: >-
      Plan a trial of the model with V(dummy) or V(real) weights instead of a deployment, see C(sparkfleet trial).
    type: str
    choices: ["", dummy, real]
    default: ""
  trial_loads:
    description: What a trial measures, as M(sparkfleet.dgx.engine_bench) has a load; empty for its usual loads.
    type: list
    elements: dict
    default: []
author: ["The Sparkfleet developers"]
"""

EXAMPLES = r"""
- name: Plan, with the defaults of the settings that the inventory leaves out
  ansible.builtin.import_role:
    name: sparkfleet.dgx.sparkfleet
    tasks_from: plan

- name: Plan
  sparkfleet.dgx.spark_plan:
  register: sparkfleet_inspection
"""

RETURN = r"""
plan: {description: The plan; see C(sparkfleet.planning.plan.make)., returned: success, type: dict}
state: {description: What M(sparkfleet.dgx.spark_state) found., returned: success, type: dict}
"""
