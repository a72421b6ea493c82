"""The inventory as Ansible reads it, without a playbook. Import it late: Ansible reads its configuration then."""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ansible import constants, context
from ansible.cli import CLI
from ansible.errors import AnsibleError
from ansible.inventory.manager import InventoryManager
from ansible.module_utils.common.collections import ImmutableDict
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import init_plugin_loader
from ansible.template import Templar
from ansible.utils.vars import load_extra_vars
from ansible.vars.manager import VariableManager

from sparkfleet import SparkfleetError
from sparkfleet.documents import yaml_text

#: A file of an inventory, bytes.
LARGEST = 16 << 20

#: What Ansible says of a part of a pattern that no host and no group has.
_UNMATCHED = re.compile(r"Could not match supplied host pattern, ignoring: (.+)")
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
        if limit is not None:
            _narrow(hosts, inventory, limit)
        found = {
            str(host.name): _values(
                loader, manager, host, lambda name: name.startswith("sparkfleet_") or name == "ansible_host"
            )
            for host in hosts.get_hosts("sparks")
        }
    except AnsibleError as error:
        raise SparkfleetError(str(error)) from None
    if not found:
        raise SparkfleetError(
            f"inventory {inventory} has no host in the group sparks (name your Sparks there, or make your "
            "group a child of sparks), or the limit excludes all"
        )
    return found


def matching(inventory: str, limit: str) -> list[str]:
    """The names of the hosts that a pattern of Ansible (`-l`) leaves. Raises SparkfleetError for one that leaves none
    or has a part that matches none (one that excludes nothing is a slip), with the names that are near it, for an
    invalid pattern, and for an inventory that cannot be read."""
    try:
        hosts = _open(inventory, ())[1]
    except (AnsibleError, OSError, ValueError, TypeError) as error:
        raise SparkfleetError(f"--limit {limit!r}, inventory {inventory}: {error}") from None
    return _narrow(hosts, inventory, limit)


def _narrow(hosts: InventoryManager, inventory: str, limit: str) -> list[str]:
    """`matching` for an inventory that is open, which has those hosts alone then."""
    usual, constants.HOST_PATTERN_MISMATCH = constants.HOST_PATTERN_MISMATCH, "error"
    try:
        hosts.subset(limit)
        found = [str(host.name) for host in hosts.get_hosts()] if hosts._subset else []
    # Ansible indexes and compiles the parts of a pattern, and does not catch what that raises.
    except (AnsibleError, ValueError, IndexError, TypeError, AttributeError, OSError, re.error) as error:
        reason, part = str(error), _UNMATCHED.search(str(error))
        if part:
            reason = f"no host or group matches {part[1]!r}{_near(part[1], hosts)}"
        raise SparkfleetError(f"--limit {limit!r}, inventory {inventory}: {reason}") from None
    finally:
        constants.HOST_PATTERN_MISMATCH = usual
    if not found:
        raise SparkfleetError(f"--limit {limit!r} leaves no host of the inventory {inventory}")
    return found


def _near(part: str, hosts: InventoryManager) -> str:
    """A question with the names of hosts and groups that are most like a part of a pattern; "" for none."""
    names = [*map(str, hosts.hosts), *(str(name) for name in hosts.groups if name not in ("all", "ungrouped"))]
    near = difflib.get_close_matches(part.lstrip("!&~")[:100], names, n=3)
    return f": did you mean {' or '.join(near)}?" if near else ""


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
    if not os.path.exists(inventory):  # noqa: PTH110  raises nothing
        raise SparkfleetError(f"inventory {inventory!r}: no such file or folder; copy inventory/example")
    for file in _files(Path(inventory)):
        with contextlib.suppress(OSError, UnicodeError):
            yaml_text.measure(file.read_text(encoding="utf-8"), str(file))
    for words in extra:
        yaml_text.measure(words, "-e")
    context.CLIARGS = ImmutableDict(extra_vars=tuple(extra), basedir=None)
    load_extra_vars.extra_vars = {}  # Ansible reads them once a process
    loader = DataLoader()
    loader.set_vault_secrets(_prepared())
    hosts = InventoryManager(loader, sources=[inventory])
    return loader, hosts, VariableManager(loader, inventory=hosts)


def _files(inventory: Path) -> list[Path]:
    """Files of an inventory that Ansible may read as YAML. Raises SparkfleetError for one that is too large."""
    folder = inventory if inventory.is_dir() else inventory.parent
    below = [path for name in ("group_vars", "host_vars") for path in (folder / name).rglob("*")]
    found = [*(folder.iterdir() if inventory.is_dir() else [inventory]), *below]
    files = [path for path in found if path.is_file() and path.suffix in ("", ".yml", ".yaml", ".json")]
    for path in files:
        if path.stat().st_size > LARGEST:
            raise SparkfleetError(f"{path}: more than {LARGEST >> 20} MiB, which cannot be an inventory")
    return files


@functools.cache
def _prepared() -> Any:
    """Make Ansible ready, once a process; the passwords of vaults that its configuration names. It never prompts."""
    with contextlib.suppress(ValueError):  # another run did
        init_plugin_loader()
    return CLI.setup_vault_secrets(DataLoader(), list(constants.DEFAULT_VAULT_IDENTITY_LIST), auto_prompt=False)


def _values(loader: DataLoader, manager: VariableManager, host: Any, wanted: Callable[[str], bool]) -> dict[str, Any]:
    known = manager.get_vars(host=host, include_hostvars=False)
    templar = Templar(loader, variables=known)
    return {name: templar.template(value) for name, value in known.items() if wanted(name)}
