# SPDX-License-Identifier: Apache-2.0
"""Action: what the tag of an image stands for, asked of its registry by the controller, once a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible import constants
from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.sparkfleet.dgx.plugins.plugin_utils import package  # noqa: F401 - finds what follows

from sparkfleet import SparkfleetError
from sparkfleet.documents import certificates
from sparkfleet.fleet import image_digest, image_signature
from sparkfleet.fleet.gateway import truth
from sparkfleet.packaging.bundle import Bundle
from sparkfleet.planning.variables import logins

display = Display()


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible has no types
    """See the module's docstring."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _VALID_ARGS = frozenset(
        ("image", "registries", "proxy", "no_proxy", "bundle", "controller_verifies", "keys", "logins", "ca_file")
    )

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """{"image", "digest", "reason"}; raises AnsibleActionFail for what is not an image."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        arguments, variables = self._task.args, task_vars or {}
        image, failure = str(arguments["image"]), "bad-input"
        try:
            if arguments.get("bundle"):
                bundle = Bundle.read(arguments["bundle"], *Bundle.trust(variables, self._templar.template))
                known = bundle.images.get(bundle.image_key(image), {})
                return {
                    **result,
                    "changed": False,
                    "image": image,
                    "digest": str(known.get("digest") or ""),
                    "reason": "",
                }
            proxy, no_proxy = (str(arguments.get(key) or "") for key in ("proxy", "no_proxy"))
            ca = certificates.read(str(arguments.get("ca_file") or ""))
            ways = arguments.get("registries") or {}, proxy, no_proxy, logins(arguments.get("logins") or {}), ca
            folder = Path(constants.DEFAULT_LOCAL_TMP)
            answer, new = image_digest.of_run(folder, image, *ways)
            failure = "image-unsigned"
            image_signature.require(folder, image, answer, arguments.get("keys") or {}, *ways)
        except SparkfleetError as error:
            host = variables.get("inventory_hostname")
            raise AnsibleActionFail(f"{host}: {error}", result={"failure": failure}) from None
        if answer.reason and truth(arguments.get("controller_verifies", False)):
            raise AnsibleActionFail(
                f"{variables.get('inventory_hostname')}: this controller cannot resolve {image}, and "
                f"sparkfleet_controller_verifies is true: {answer.reason}",
                result={"failure": "registry-unreachable"},
            )
        if answer.reason and new:
            display.display(
                f"{image}: this controller cannot ask its registry ({answer.reason}); each Spark resolves "
                "the tag itself"
            )
        return {**result, "changed": False, "image": image, "digest": answer.digest, "reason": answer.reason}
