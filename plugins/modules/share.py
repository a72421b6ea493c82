#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action of the same name, which runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: share
short_description: Shares what one Spark fetches with the other Sparks
version_added: 0.2.0
description:
  - Decides which Sparks of a play fetch from the internet and which copy from them, starts the services on both sides
    (M(sparkfleet.dgx.share_service)), and stops them. They use TLS with a key of this run.
  - If sharing is not possible, RV(reason) explains why, and each Spark fetches for itself; with a bundle, the
    only source, it fails.
  - This is an action plugin; it runs on the controller.
options:
  state:
    description:
      - V(schedule) assigns sources to the Sparks of the play, without contacting any host; V(serve) starts a source,
        delegated to it; V(connect) connects this host to its sources; V(absent) stops the services on this host.
    type: str
    choices: [schedule, serve, connect, absent]
    required: true
  share: {description: Whether Sparks copy from each other at all., type: bool, default: true}
  bundle: {description: Folder on the controller that the first Spark serves instead of the internet., type: path}
  source: {description: "With O(state=serve), a source that O(state=schedule) returned.", type: dict}
  port: {description: "With O(state=serve), TCP port that others reach.", type: int}
  room: {description: "With O(state=serve), GiB that an image may use on the source.", type: float}
  cache_dir: {description: "With O(state=serve), folder of the model cache.", type: path}
  engine: {description: Place of image and model in the list C(fetches) of each plan., type: int, default: 0}
  digest: {description: "With O(state=serve), digest of the image tag.", type: str}
  clean: {description: "With O(state=absent), also remove what was kept for others.", type: bool, default: true}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Nothing is shared.}
  diff_mode: {support: none, description: There is nothing to show.}
"""

EXAMPLES = r"""
- name: Schedule sharing
  sparkfleet.dgx.share:
    state: schedule
  register: plan

- name: End it
  sparkfleet.dgx.share:
    state: absent
"""

RETURN = r"""
sources: {description: Sources that this host starts., returned: state is schedule, type: list, elements: dict}
image_from: {description: "Host that the image is copied from, or empty.", returned: state is schedule, type: str}
model_from: {description: "Host that the model is copied from, or empty.", returned: state is schedule, type: str}
takes: {description: Whether this host copies anything., returned: state is schedule, type: bool}
takes_part: {description: Whether this host copies or serves anything., returned: state is schedule, type: bool}
leaders: {description: Host that starts each source., returned: state is schedule, type: dict}
mirror: {description: "Local HOST:PORT that leads to the image, or empty.", returned: state is connect, type: str}
digest: {description: "Digest of the image, or empty.", returned: state is connect, type: str}
peer: {description: "Local address that leads to the model, or empty.", returned: state is connect, type: str}
reason: {description: "Why it could not be done, or empty.", returned: state is serve or absent, type: str}
"""
