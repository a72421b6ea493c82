#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action of the same name, which runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: share
short_description: What one Spark fetches, others take from it
version_added: 0.2.0
description:
  - Agrees which Sparks of a play fetch from the internet and who takes from whom, starts the services on both sides
    (M(sparkfleet.dgx.share_service)), and ends them. They speak TLS with a key of this run.
  - Where it cannot be done RV(reason) says why, and each Spark fetches by itself; with a bundle, which is all that
    there is, it fails.
  - This is an action, which runs on the controller.
options:
  state:
    description:
      - V(schedule) divides the Sparks of the play, and contacts nobody; V(serve) starts a source, delegated to it;
        V(connect) leads this host to its sources; V(absent) ends what runs on this host.
    type: str
    choices: [schedule, serve, connect, absent]
    required: true
  share: {description: Whether Sparks take from each other at all., type: bool, default: true}
  bundle: {description: Folder of the controller that the first Spark serves in place of the internet., type: path}
  source: {description: "With O(state=serve), a source that O(state=schedule) returned.", type: dict}
  port: {description: "With O(state=serve), TCP port that others reach.", type: int}
  room: {description: "With O(state=serve), GiB that an image may take on the source.", type: float}
  cache_dir: {description: "With O(state=serve), folder of the model cache.", type: path}
  engine: {description: Place in each plan's list of the engine whose image and model are meant., type: int, default: 0}
  digest: {description: "With O(state=serve), what the image's tag stands for.", type: str}
  clean: {description: "With O(state=absent), remove what was kept for others as well.", type: bool, default: true}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Nobody takes from anybody.}
  diff_mode: {support: none, description: There is nothing to show.}
"""

EXAMPLES = r"""
- name: Agree who takes from whom
  sparkfleet.dgx.share:
    state: schedule
  register: plan

- name: End it
  sparkfleet.dgx.share:
    state: absent
"""

RETURN = r"""
sources: {description: Sources that this host starts., returned: state is schedule, type: list, elements: dict}
image_from: {description: "Host that the image is taken from, or empty.", returned: state is schedule, type: str}
model_from: {description: "Host that the model is taken from, or empty.", returned: state is schedule, type: str}
takes: {description: Whether this host takes anything., returned: state is schedule, type: bool}
takes_part: {description: Whether this host takes or gives anything., returned: state is schedule, type: bool}
leaders: {description: Host that starts each source., returned: state is schedule, type: dict}
mirror: {description: "HOST:PORT of the way to the image, or empty.", returned: state is connect, type: str}
digest: {description: "What the image stands for, or empty.", returned: state is connect, type: str}
peer: {description: "Address of the way to the model, or empty.", returned: state is connect, type: str}
reason: {description: "Why it could not be done, or empty.", returned: state is serve or absent, type: str}
"""
