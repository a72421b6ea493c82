#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""What an audit looks at on a host, in one round trip."""

from __future__ import annotations

DOCUMENTATION = r"""
module: spark_audit
short_description: Reads what decides how secure a Spark or gateway is
version_added: 0.3.0
description:
  - Who listens on which port, modes of files with secrets and of files that decide what runs, copies of secrets,
    containers, the deployed release, units, certificates, SSH, updates, and members of the group docker.
  - Changes and installs nothing. No secret is part of the result. The action of the same name grades what was found.
options:
  project_dir: {description: Folder of the releases., type: path, default: /opt/sparkfleet}
  state_dir: {description: Folder of journal and guard., type: path, default: /var/lib/sparkfleet}
  token_file: {description: File of the Hugging Face token., type: path, default: /etc/sparkfleet/hf_token}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Reads only.}
  diff_mode: {support: none, description: Reads only.}
"""

EXAMPLES = r"""
- name: Audit the host
  sparkfleet.dgx.spark_audit:
"""

RETURN = r"""
facts: {description: What was found., returned: always, type: dict}
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.audit import look
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.docker import Docker
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.releases import STATE_DIR


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "project_dir": {"type": "path", "default": "/opt/sparkfleet"},
            "state_dir": {"type": "path", "default": STATE_DIR},
            "token_file": {"type": "path", "default": "/etc/sparkfleet/hf_token", "no_log": False},
        },
        supports_check_mode=True,
    )
    params = module.params
    places = (params[key] for key in ("project_dir", "state_dir", "token_file"))
    module.exit_json(changed=False, facts=look(*places, Docker(timeout=10)))


if __name__ == "__main__":
    main()
