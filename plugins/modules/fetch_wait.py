#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action of the same name, which runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: fetch_wait
short_description: Waits for a host's background jobs and shows their progress
version_added: 0.2.0
description:
  - Jobs are M(sparkfleet.dgx.image_pull) and M(sparkfleet.dgx.model_download), started with C(poll) 0 and
    registered. A registered result may also be a finished one (check mode, no async) or a skipped one.
  - Jobs live on the host; an interrupted controller leaves them running, and the next run joins them.
  - This is an action plugin; it runs on the controller.
options:
  jobs:
    description: The jobs.
    type: list
    elements: dict
    required: true
    suboptions:
      name: {description: "What it is called: C(image) or C(model).", type: str, required: true}
      job: {description: The registered result., type: dict, required: true}
      status_file: {description: "C(/run/sparkfleet/fetch/NAME.json) by default.", type: path}
      source: {description: The other host that it is to be copied from; named where it was not., type: str}
  timeout: {description: Seconds; the jobs themselves continue., type: float, default: 7200}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Passes on the modules' results.}
  diff_mode: {support: none, description: There is nothing to show.}
"""

EXAMPLES = r"""
- name: Fetch image and model
  sparkfleet.dgx.fetch_wait:
    jobs:
      - name: image
        job: "{{ image_job }}"
      - name: model
        job: "{{ model_job }}"
    timeout: 7200
  register: fetched
"""

RETURN = r"""
image: {description: "Of the job C(image), if there was one: digest, seconds, changed.", returned: success, type: dict}
model: {description: "Of the job C(model), if there was one: commit, seconds, changed.", returned: success, type: dict}
"""
