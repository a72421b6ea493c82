#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""A release, staged."""

from __future__ import annotations

DOCUMENTATION = r"""
module: release_stage
short_description: Stores a release on the host, ready to be switched to
description:
  - Writes compose file, plan and lock to C(releases/N) under the project folder, completely or not at all, after Docker
    Compose has accepted the file. What runs is not touched. A kept release that is the same is used again.
  - Files of kept releases that were edited or damaged are set aside and rewritten from their copies; a release
    that has none is set aside altogether.
options:
  compose: {description: The complete compose file., type: str, required: true}
  plan: {description: The plan that it was made by., type: dict, required: true}
  lock: {description: What it is pinned to., type: dict, required: true}
  number: {description: "Its number, the same on all hosts of a group; 0 for the next one.", type: int, default: 0}
  project_dir: {description: Folder of the releases., type: path, default: /opt/sparkfleet}
  state_dir: {description: Folder that stores the highest number ever used., type: path, default: /var/lib/sparkfleet}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Reports which release it would be.}
  diff_mode: {support: full, description: Shows the compose file against the current release's.}
"""

EXAMPLES = r"""
- name: Stage the release
  sparkfleet.dgx.release_stage:
    compose: "{{ lookup('ansible.builtin.template', 'compose.yml.j2') }}"
    plan: "{{ sparkfleet_inspection.plan.release.plan }}"
    lock: "{{ sparkfleet_inspection.plan.release.lock }}"
  register: staged
"""

RETURN = r"""
release: {description: Number of the release., returned: success, type: int}
current: {description: Number of the release that is current; null for none., returned: success, type: int}
repaired: {description: Damage to kept releases that was repaired., returned: success, type: list, elements: str}
"""

import tempfile
import time
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.bounded import BoundsError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.engine import validate_compose
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.releases import Store


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "compose": {"type": "str", "required": True},
            "plan": {"type": "dict", "required": True},
            "lock": {"type": "dict", "required": True},
            "number": {"type": "int", "default": 0},
            "project_dir": {"type": "path", "default": "/opt/sparkfleet"},
            "state_dir": {"type": "path", "default": "/var/lib/sparkfleet"},
        },
        supports_check_mode=True,
    )
    compose, plan, lock = (module.params[key] for key in ("compose", "plan", "lock"))
    store = Store(module.params["project_dir"], module.params["state_dir"])
    deployed = Path(store.project_dir, "compose.yml")
    before = deployed.read_text(encoding="utf-8", errors="replace") if deployed.is_file() else ""
    try:
        if module.check_mode:
            repaired = [reason for number in store.numbers() for reason in store.damage(number)]
        else:
            store.set_journal_aside()
            repaired = store.repair_all()
        number, current, wanted = store.find(compose, plan), store.current(), module.params["number"]
        if wanted and number != wanted:
            number = None
        staged = number is None
        if number is None and module.check_mode:
            number = wanted or store.next_number()
        elif number is None:
            with tempfile.NamedTemporaryFile("w", suffix=".yml", encoding="utf-8") as file:
                file.write(compose)
                file.flush()
                reason = validate_compose(str(store.project_dir), Path(file.name))
            if reason:
                module.fail_json(
                    msg=f"Docker Compose refuses the new release; what runs is untouched: {reason}",
                    failure="compose-invalid",
                )
            number = store.stage(compose, plan, {**lock, "created": time.time()}, wanted)
    except (OSError, BoundsError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        module.fail_json(msg=f"cannot write a release under {store.project_dir}: {reason}; what runs is untouched")
    for reason in repaired:
        module.warn(f"a release was damaged: {reason}")
    module.exit_json(
        changed=staged or number != current or bool(repaired),  # a kept one differs from what runs, too
        repaired=repaired,
        release=number,
        current=current,
        diff={
            "before": before,
            "after": compose,
            "before_header": str(deployed),
            "after_header": f"{store.project_dir}/releases/{number}/compose.yml",
        },
    )


if __name__ == "__main__":
    main()
