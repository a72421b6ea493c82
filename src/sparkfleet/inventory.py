"""The inventory as Ansible reads it, without a playbook. Import it late: Ansible reads its configuration then."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

from ansible import constants, context
from ansible.cli import CLI
from ansible.errors import AnsibleError
from ansible.inventory.manager import InventoryManager
from ansible.module_utils.common.collections import ImmutableDict
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import init_plugin_loader
from ansible.template import Templar
from ansible.vars.manager import VariableManager

from sparkfleet import SparkfleetError

#: Variables that say how a host is reached, and what it is to serve.
REACH = (
    *("ansible_host", "ansible_port", "ansible_user", "ansible_connection"),
    *("ansible_ssh_private_key_file", "ansible_ssh_common_args"),
    *("sparkfleet_model", "sparkfleet_profile", "sparkfleet_require_gb10"),
)


def variables(inventory: str, limit: str | None, extra: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The variables of each host of the group sparks, as Ansible would have them, templates not yet resolved.

    Raises SparkfleetError for an inventory or extra variables that cannot be read.
    """
    try:
        loader, hosts, manager = _open(inventory, extra)
        if limit:
            hosts.subset(limit)
        found = {
            str(host.name): _values(
                loader, manager, host, lambda name: name.startswith("sparkfleet_") or name == "ansible_host"
            )
            for host in hosts.get_hosts("sparks")
        }
    except AnsibleError as error:
        raise SparkfleetError(str(error)) from None
    if not found:
        raise SparkfleetError(f"inventory {inventory} has no host in the group sparks, or the limit leaves none")
    return found


def reach(inventory: str) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Of each host of the group sparks the variables of REACH, and those that a host has that is new in the group.

    Raises SparkfleetError for an inventory that cannot be read.
    """
    try:
        loader, hosts, manager = _open(inventory, ())
        found = {
            str(host.name): _values(loader, manager, host, REACH.__contains__) for host in hosts.get_hosts("sparks")
        }
        hosts.add_group("sparks")
        hosts.add_host("a-new-host", "sparks")
        return found, _values(loader, manager, hosts.get_host("a-new-host"), REACH.__contains__)
    except AnsibleError as error:
        remedy = " (set ANSIBLE_VAULT_PASSWORD_FILE)" if "vault" in str(error) else ""
        raise SparkfleetError(f"inventory {inventory}: {error}{remedy}") from None


def _open(inventory: str, extra: Sequence[str]) -> tuple[DataLoader, InventoryManager, VariableManager]:
    context.CLIARGS = ImmutableDict(extra_vars=tuple(extra), basedir=None)
    loader = DataLoader()
    loader.set_vault_secrets(_prepared())
    hosts = InventoryManager(loader, sources=[inventory])
    return loader, hosts, VariableManager(loader, inventory=hosts)


@functools.cache
def _prepared() -> Any:
    """Make Ansible ready, once a process; the passwords of vaults that its configuration names. Nobody is asked."""
    with contextlib.suppress(ValueError):  # somebody else did
        init_plugin_loader()
    return CLI.setup_vault_secrets(DataLoader(), list(constants.DEFAULT_VAULT_IDENTITY_LIST), auto_prompt=False)


def _values(loader: DataLoader, manager: VariableManager, host: Any, wanted: Callable[[str], bool]) -> dict[str, Any]:
    known = manager.get_vars(host=host, include_hostvars=False)
    templar = Templar(loader, variables=known)
    return {name: templar.template(value) for name, value in known.items() if wanted(name)}
