"""The inventory as Ansible reads it, without a playbook. Import it late: Ansible reads its configuration then."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from ansible import context
from ansible.errors import AnsibleError
from ansible.inventory.manager import InventoryManager
from ansible.module_utils.common.collections import ImmutableDict
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import init_plugin_loader
from ansible.template import Templar
from ansible.vars.manager import VariableManager

from sparkfleet import SparkfleetError


def variables(inventory: str, limit: str | None, extra: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The variables of each host of the group sparks, as Ansible would have them, templates not yet resolved.

    Raises SparkfleetError for an inventory or extra variables that cannot be read.
    """
    context.CLIARGS = ImmutableDict(extra_vars=tuple(extra), basedir=None)
    with contextlib.suppress(ValueError):  # it was done before in this process
        init_plugin_loader()
    loader = DataLoader()
    try:
        hosts = InventoryManager(loader, sources=[inventory])
        if limit:
            hosts.subset(limit)
        manager = VariableManager(loader, inventory=hosts)
        found: dict[str, dict[str, Any]] = {}
        for host in hosts.get_hosts("sparks"):
            known = manager.get_vars(host=host, include_hostvars=False)
            templar = Templar(loader, variables=known)
            found[str(host.name)] = {
                name: templar.template(value)
                for name, value in known.items()
                if name.startswith("sparkfleet_") or name == "ansible_host"
            }
    except AnsibleError as error:
        raise SparkfleetError(str(error)) from None
    if not found:
        raise SparkfleetError(f"inventory {inventory} has no host in the group sparks, or the limit leaves none")
    return found
