#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action of the same name, which runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: bundle
short_description: A bundle of images, models and packages for Sparks without internet
version_added: 0.2.0
description:
  - With internet, takes what M(sparkfleet.dgx.bundle_collect) put together on a Spark to a folder of the
    controller; without, brings what is in the folder to a Spark.
  - A file that is there as it should be does not travel again. What a Spark says that it has collected is checked
    before any of it touches a path of the controller, each file by size and hash once it has come.
  - This is an action, which runs on the controller.
options:
  state:
    description:
      - C(schedule) says whether this host collects a part of the bundle, and contacts nobody.
      - C(fetch) takes what the host collected; C(python) adds wheels for a controller without internet.
      - C(push) brings the host what it needs of the bundle; C(absent) takes off the host what was pushed.
    type: str
    choices: [schedule, fetch, python, push, absent]
    required: true
  bundle: {description: The bundle's folder on the controller., type: path}
  collected: {description: "With O(state=fetch), the result of M(sparkfleet.dgx.bundle_collect).", type: dict}
  engine:
    description: With O(state=fetch), place in the plan's list of the engine that it is for.
    type: int
    default: 0
  images: {description: "With O(state=push), images that the host needs.", type: list, elements: str, default: []}
  models:
    description: With O(state=push), models that the host needs.
    type: list
    elements: dict
    default: []
    suboptions:
      repo: {description: Name on the Hub., type: str, required: true}
      revision: {description: "Branch, tag or commit.", type: str, required: true}
  packages: {description: "With O(state=push), bring the Debian packages too.", type: bool, default: false}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: partial, description: Only O(state=schedule) does anything.}
  diff_mode: {support: none, description: There is nothing to show.}
"""

EXAMPLES = r"""
- name: Packages out of the bundle
  sparkfleet.dgx.bundle:
    state: push
    bundle: /media/stick/bundle
    packages: true
"""

RETURN = r"""
collects: {description: Whether this host collects a part of it., returned: state is schedule, type: bool}
have: {description: Names in the bundle that are complete., returned: state is schedule, type: list, elements: str}
folder: {description: The bundle's folder., returned: state is fetch, type: path}
digest: {description: Of bundle.json., returned: state is python, type: str}
"""
