#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action of the same name, which runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: group_plan
short_description: Lets the hosts of a group do the same
version_added: 0.2.0
description:
  - The hosts of C(sparkfleet_nodes) run one engine together. If one of them is to stage a release or to restart, all of
    them do, with the same number. Fails where image, model or arguments differ between them, or where one of them is
    not part of the run. Contacts no host.
  - This is an action plugin; it runs on the controller.
options:
  reads: {description: "For a run that changes nothing, which a missing host does not end.", type: bool, default: false}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Changes nothing.}
  diff_mode: {support: none, description: There is nothing to show.}
"""

EXAMPLES = r"""
- name: Agree with the other hosts of the group
  sparkfleet.dgx.group_plan:
  register: sparkfleet_inspection
"""

RETURN = r"""
plan: {description: The plan of the host with what the group does., returned: success, type: dict}
state: {description: "What was found on the host, unchanged.", returned: success, type: dict}
"""
