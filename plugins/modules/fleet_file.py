#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""What the status page shows and Prometheus cannot know."""

from __future__ import annotations

DOCUMENTATION = r"""
module: fleet_file
short_description: Tells the status page about the fleet
version_added: 0.3.0
description:
  - Writes C(fleet.json) next to the status page, on the host that monitors the others - models, memory plans, drift
    and last events of the Sparks that this run has inspected, and the wave of a rollout. What it says of other Sparks
    stays.
  - It is written atomically, and only if something has happened. Where the page is not deployed nothing is written.
  - The action of the same name collects all of that from the run.
options:
  path: {description: The file., type: path, default: /var/lib/sparkfleet-page/fleet.json}
  schedule:
    description: >-
      By the action; what M(sparkfleet.dgx.rollout_schedule) returned, in a rollout. Its progress is written then, and
      not the Sparks.
    type: dict
  news: {description: Set by the action; what this run knows., type: dict, default: {}}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Reports whether the file would change.}
  diff_mode: {support: full, description: Shows the file before and after.}
"""

EXAMPLES = r"""
- name: Update the status page
  sparkfleet.dgx.fleet_file:
  delegate_to: "{{ monitor }}"
  run_once: true
"""

RETURN = r"""
path: {description: The file., returned: always, type: str}
"""

import json
import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import fleet_file


def _text(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=2, sort_keys=True) + "\n" if data else ""


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "default": "/var/lib/sparkfleet-page/fleet.json"},
            "schedule": {"type": "dict"},
            "news": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    path = Path(module.params["path"])
    if not path.parent.is_dir():
        module.exit_json(changed=False, path=str(path))
    try:
        old, new = fleet_file.write(path, module.params["news"], time.time(), module.check_mode)
    except OSError as error:
        module.fail_json(msg=f"cannot write {path}: {error.strerror}")
    module.exit_json(changed=new != old, path=str(path), diff={"before": _text(old), "after": _text(new)})


if __name__ == "__main__":
    main()
