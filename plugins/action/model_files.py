# SPDX-License-Identifier: Apache-2.0
"""Action: what a model's revision stands for, asked of the Hub by the controller, once a run."""

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
from sparkfleet.fleet import model_files
from sparkfleet.fleet.gateway import truth
from sparkfleet.packaging import signature
from sparkfleet.packaging.bundle import Bundle

display = Display()


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible has no types
    """See the module's docstring."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _VALID_ARGS = frozenset(
        (
            "repo",
            "revision",
            "endpoint",
            "token",
            "proxy",
            "no_proxy",
            "ca_file",
            "bundle",
            "remote_code",
            "pickle",
            "controller_verifies",
            "listing",
            "lock",
        )
    )

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """{"expected", "reason"}; raises AnsibleActionFail for an invalid model, and if verification is required."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        arguments, variables = self._task.args, task_vars or {}
        host = str(variables.get("inventory_hostname"))
        repo, revision = str(arguments["repo"]), str(arguments["revision"])
        failure, code, new = "bad-input", truth(arguments.get("remote_code", False)), False
        try:
            if arguments.get("lock"):
                signers = str(self._templar.template(variables.get(signature.LOCK.signers) or ""))
                answer = model_files.of_lock(str(arguments["lock"]), repo, revision, code, signers)
            elif arguments.get("bundle"):
                trust = Bundle.trust(variables, self._templar.template)
                answer = model_files.of_bundle(str(arguments["bundle"]), trust, repo, revision)
            else:
                way = model_files.Way(
                    endpoint=str(arguments.get("endpoint") or model_files.Way.endpoint),
                    token=str(arguments.get("token") or "").strip(),
                    proxy=str(arguments.get("proxy") or ""),
                    no_proxy=str(arguments.get("no_proxy") or ""),
                    ca=certificates.read(str(arguments.get("ca_file") or "")),
                )
                kinds = {"remote_code": code, "pickle": truth(arguments.get("pickle", False))}
                answer, new = model_files.of_run(Path(constants.DEFAULT_LOCAL_TMP), repo, revision, way, **kinds)
            if answer.expected and arguments.get("listing"):
                failure = "lock-mismatch" if answer.locked else "model-differs"
                model_files.refuse(answer.expected, arguments["listing"], host, f"{repo}@{revision}")
        except SparkfleetError as error:
            raise AnsibleActionFail(f"{host}: {error}", result={"failure": failure}) from None
        if answer.reason and truth(arguments.get("controller_verifies", False)):
            raise AnsibleActionFail(
                f"{host}: this controller cannot ask the Hub for {repo}@{revision}, and "
                f"sparkfleet_controller_verifies is true: {answer.reason}",
                result={"failure": answer.failure},
            )
        if answer.reason and new:
            display.warning(
                f"{repo}@{revision}: not verified by this controller, which cannot ask the Hub "
                f"({answer.reason}): commit and hashes are those that each Spark gets from the Hub or the source Spark"
            )
        return {**result, "changed": False, "expected": answer.expected, "reason": answer.reason}
