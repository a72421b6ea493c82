"""Adds the collection to a wheel, next to Python's packages, where ansible-core searches for collections."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PARTS = (
    *("LICENSE", "README.md", "ansible.cfg", "galaxy.yml", "inventory/example", "inventory/local", "meta", "models"),
    *("playbooks", "plugins", "requirements.txt", "roles"),
)


class CollectionHook(BuildHookInterface):  # type: ignore[misc]
    """An editable installation has none of it: there the clone itself is the collection."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Name the files; `version` is `standard` or `editable`."""
        if version == "standard":
            for part in PARTS:
                build_data["force_include"][part] = f"ansible_collections/sparkfleet/dgx/{part}"
