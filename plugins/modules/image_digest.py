#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action of the same name, which runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: image_digest
short_description: What the tag of an image stands for, asked of its registry by the controller
version_added: 0.2.0
description:
  - Asked once a run for all its hosts, so that no host is believed about what others run. Contacts no host.
  - Where the controller cannot ask, it says so; hosts then ask for themselves.
  - This is an action, which runs on the controller.
options:
  image: {description: The image., type: str, required: true}
  registries: {description: "HOST[:PORT] that is asked in place of a registry.", type: dict, default: {}}
  proxy: {description: Proxy between controller and registry., type: str, default: ""}
  no_proxy: {description: Names that are reached without it., type: str, default: ""}
  bundle: {description: Folder whose bundle.json is asked in place of the registry., type: path}
  controller_verifies: {description: Fail where the registry cannot be asked., type: bool, default: false}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Changes nothing.}
  diff_mode: {support: none, description: There is nothing to show.}
"""

EXAMPLES = r"""
- name: Ask what the tag stands for
  sparkfleet.dgx.image_digest:
    image: nvcr.io/nvidia/vllm:25.09-py3
  register: answer
"""

RETURN = r"""
digest: {description: "The digest, or empty.", returned: success, type: str}
reason: {description: "Why it could not be asked, or empty.", returned: success, type: str}
"""
