#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Measures an engine that serves."""

from __future__ import annotations

DOCUMENTATION = r"""
module: engine_bench
short_description: Measures how fast an engine of this host is
description:
  - The engine's own C(vllm bench serve) asks, inside its container; where the image has none that works, requests from
    the host. What is measured, and the form of the records, is in docs/benchmark.md.
  - The module alone does one step. The action of the same name plans the loads, repeats the step C(measure) for each,
    keeps the record on host and controller, and shows a table.
  - Changes nothing that is served, and is not run in check mode.
options:
  step:
    description:
      - C(look) says what there is to measure and whether others use it, C(measure) measures one load, C(keep) adds a
        record to those of the host.
    type: str
    choices: [look, measure, keep]
    default: look
  model: {description: "With C(look), name of the card; empty for all engines.", type: str, default: ""}
  service: {description: "With C(measure), the engine.", type: str, default: ""}
  container: {description: "With C(measure), the container that was looked at.", type: str, default: ""}
  started_at: {description: "With C(measure), when it was started.", type: str, default: ""}
  load: {description: "With C(measure), streams input output rounds seed and seconds.", type: dict, default: {}}
  tool: {description: "With C(measure), what measured the loads before.", type: str, default: ""}
  record: {description: "With C(keep), the record.", type: dict, default: {}}
  loads:
    description: By the action; streams, shapes (NAME or INPUT:OUTPUT), repetitions, rounds and seconds.
    type: dict
    default: {}
  even_if_serving: {description: By the action; measure although others use the engine., type: bool, default: false}
  project_dir: {description: Folder of the releases., type: path, default: /opt/sparkfleet}
  state_dir: {description: Folder of the records., type: path, default: /var/lib/sparkfleet}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: partial, description: C(look) alone.}
  diff_mode: {support: none, description: There is nothing to show.}
"""

EXAMPLES = r"""
- name: Measure what this Spark serves
  sparkfleet.dgx.engine_bench:
    loads: {shapes: [chat], streams: [1, 4, 16], repetitions: 3}
"""

RETURN = r"""
release: {description: With C(look); the release that serves., returned: look, type: int}
gpu: {description: With C(look); name of the GPU., returned: look, type: str}
driver: {description: With C(look); version of its driver., returned: look, type: str}
engines: {description: With C(look); what there is to measure., returned: look, type: list, elements: dict}
row: {description: With C(measure); the figures., returned: measure, type: dict}
tool: {description: With C(measure); what measured them., returned: measure, type: str}
now: {description: Unix time of the host., returned: always, type: float}
benchmarks: {description: By the action; the records., returned: action, type: list, elements: dict}
"""

import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import benchmarks
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.bench import BenchError, Load, measure
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.bounded import BoundsError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.docker import Docker, DockerError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.http import HttpError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.release_format import check_load
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.releases import ReleaseError, Store


def measured(store: Store, docker: Docker, params: dict[str, Any]) -> dict[str, Any]:
    """The result of the step. Raises BenchError and what its parts raise."""
    load = Load.of(check_load(params["load"]))
    number = store.current()
    items = [item for item in store.engines(number) if item.service == params["service"]] if number else []
    where = params["service"], params["container"], params["started_at"]
    if not items or not benchmarks.same(docker, *where):
        raise BenchError(f"{params['service']} was restarted or replaced since the benchmark began")
    row, tool = measure(docker, params["container"], items[0], load, params["tool"])
    if not benchmarks.same(docker, *where):
        raise BenchError(f"{params['service']} was restarted or replaced while it was measured")
    return {"row": row, "tool": tool}


def main() -> None:
    """Entry point of the module."""
    text = {"type": "str", "default": ""}
    module = AnsibleModule(
        argument_spec={
            "step": {"type": "str", "choices": ["look", "measure", "keep"], "default": "look"},
            **dict.fromkeys(("model", "service", "container", "started_at", "tool"), text),
            "load": {"type": "dict", "default": {}},
            "record": {"type": "dict", "default": {}},
            "project_dir": {"type": "path", "default": "/opt/sparkfleet"},
            "state_dir": {"type": "path", "default": "/var/lib/sparkfleet"},
        },
        supports_check_mode=True,
    )
    params = module.params
    store, docker = Store(Path(params["project_dir"]), Path(params["state_dir"])), Docker()
    if module.check_mode and params["step"] != "look":
        module.exit_json(changed=False, skipped=True, msg="nothing is measured in check mode", now=time.time())
    made: dict[str, Any] = {}
    try:
        if params["step"] == "look":
            made = benchmarks.look(store, docker, params["model"])
        elif params["step"] == "measure":
            made = measured(store, docker, params)
        else:
            benchmarks.keep(store, params["record"])
    except (BenchError, BoundsError, DockerError, HttpError, ReleaseError, OSError) as error:
        module.fail_json(msg=str(error), failure="benchmark")
    module.exit_json(changed=False, now=time.time(), **made)


if __name__ == "__main__":
    main()
