#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action of the same name, which runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: bundle
short_description: A bundle of images, models and packages for Sparks without internet
version_added: 0.2.0
description:
  - With internet, copies what M(sparkfleet.dgx.bundle_collect) collected on a Spark to a folder on
    the controller; without, copies the folder's content to a Spark.
  - A file that is already complete is not transferred again. What a Spark reports as collected is validated before any
    of it touches a path on the controller, and each file is checked by size and hash on arrival.
  - This is an action plugin; it runs on the controller.
options:
  state:
    description:
      - C(schedule) returns whether this host collects a part of the bundle, without contacting any host.
      - C(fetch) copies what the host collected; C(python) adds wheels for a controller without internet.
      - C(push) copies what the host needs from the bundle; C(absent) removes it from the host.
    type: str
    choices: [schedule, fetch, python, push, absent]
    required: true
  bundle: {description: The bundle's folder on the controller., type: path}
  collected: {description: "With O(state=fetch), the result of M(sparkfleet.dgx.bundle_collect).", type: dict}
  engine:
    description: With O(state=fetch), place of image and model in the list C(fetches) of the plan.
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
  packages: {description: "With O(state=push), also copy the Debian packages.", type: bool, default: false}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: partial, description: Only O(state=schedule) is run.}
  diff_mode: {support: none, description: There is nothing to show.}
"""

EXAMPLES = r"""
- name: Packages from the bundle
  sparkfleet.dgx.bundle:
    state: push
    bundle: /media/stick/bundle
    packages: true
"""

RETURN = r"""
collects: {description: Whether this host collects a part of the bundle., returned: state is schedule, type: bool}
have: {description: Names in the bundle that are complete., returned: state is schedule, type: list, elements: str}
folder: {description: The bundle's folder., returned: state is fetch, type: path}
digest: {description: Of bundle.json., returned: state is python, type: str}
"""
