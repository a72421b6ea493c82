#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""A private certificate authority that a host trusts."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ca_trust
short_description: Makes a host and its Docker trust private certificate authorities, or no longer
version_added: 0.3.0
description:
  - Writes each certificate to C(/usr/local/share/ca-certificates/sparkfleet-*.crt) and runs
    C(update-ca-certificates), only if there is a difference. Certificates of others stay.
  - Docker reads the trust store once, but C(/etc/docker/certs.d/REGISTRY) at each pull, so that it is not restarted for
    a registry that has its file there. Docker Hub is the exception with Docker's own image store.
  - A running program that has read the trust store before trusts what it read until it is restarted.
options:
  certificates: {description: Certificates in PEM; empty to remove those of earlier runs., type: str, required: true}
  registries:
    description: Registries that Docker pulls from, HOST or HOST:PORT.
    type: list
    elements: str
    default: []
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Reports whether a file would change.}
  diff_mode: {support: full, description: Shows the certificates that are added and removed.}
"""

EXAMPLES = r"""
- name: Trust the CA of the company
  sparkfleet.dgx.ca_trust:
    certificates: "{{ lookup('ansible.builtin.file', '/srv/company-ca.pem') }}"
    registries: [registry.example:5000]
"""

RETURN = r"""
written: {description: Files that were or would be written., returned: success, type: list, elements: str}
removed: {description: Files that were or would be removed., returned: success, type: list, elements: str}
"""

import re
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.trust import Store, TrustError

#: Of the folder below /etc/docker/certs.d.
REGISTRY = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,252}(:[0-9]{1,5})?")


def entry(path: Path, before: str, after: str) -> dict[str, Any]:
    """How a file changes, for --diff."""
    return {
        "before_header": str(path) if before else f"{path} (absent)",
        "after_header": str(path) if after else f"{path} (absent)",
        "before": before,
        "after": after,
    }


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "certificates": {"type": "str", "required": True},
            "registries": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    pem, registries, store = module.params["certificates"], module.params["registries"], Store()
    wrong = [name for name in registries if not REGISTRY.fullmatch(name)]
    if wrong:
        module.fail_json(msg=f"registries: {wrong[0]!r} is not HOST or HOST:PORT")
    try:
        changed, here = not store.is_current(pem, registries), store.found()
        write, remove = store.difference(pem, registries)
        if changed and not module.check_mode:
            store.apply(pem, registries)
    except ValueError as error:
        module.fail_json(msg=f"certificates: not PEM: {error}")
    except TrustError as error:
        module.fail_json(msg=str(error))
    except OSError as error:
        module.fail_json(msg=f"cannot change {error.filename}: {error.strerror}")
    changes = [entry(path, here.get(path, ""), text) for path, text in write.items()]
    changes += [entry(path, here[path], "") for path in remove]
    module.exit_json(changed=changed, written=sorted(map(str, write)), removed=sorted(map(str, remove)), diff=changes)


if __name__ == "__main__":
    main()
