# SPDX-License-Identifier: Apache-2.0
"""Action: waits until an engine is ready, shows its phases, and explains a failure.

    - sparkfleet.dgx.vllm_wait:
        container: vllm-llama31-8b-fp8
        url: http://127.0.0.1:8000    # as seen from the host
        timeout: 1800                 # seconds
        download_dir: /opt/hf/models--ORG--NAME     # both only where the server downloads by itself
        download_bytes: 9083000000
      register: started               # started.seconds, started.phases, started.kv_cache

The host is polled in slices of a few seconds, so a broken connection or Ctrl-C leaves nothing behind.
"""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.sparkfleet.dgx.plugins.plugin_utils import package  # noqa: F401 - finds what follows

from sparkfleet.diagnosis.startup import Watch, explain

display = Display()


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible has no types
    """Repeats the module vllm_wait until the engine is ready, has failed, or the time is over."""

    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return seconds, phases and KV cache figures; fail with cause, remedy and the lines that show why."""
        task_vars = task_vars or {}
        result: dict[str, Any] = super().run(tmp, task_vars)
        _, options = self.validate_argument_spec(
            argument_spec={
                "container": {"type": "str", "required": True},
                "url": {"type": "str", "default": "http://127.0.0.1:8000"},
                "timeout": {"type": "float", "default": 1800.0},
                "slice": {"type": "float", "default": 3.0},
                "download_dir": {"type": "path", "default": ""},
                "download_bytes": {"type": "int", "default": 0},
                "socket": {"type": "path", "default": "/var/run/docker.sock"},
            }
        )
        container = options["container"]
        if self._task.check_mode:
            return {
                **result,
                "changed": False,
                "msg": f"would wait until {container} answers at {options['url']}/health",
            }
        host = str(task_vars.get("inventory_hostname", "localhost"))
        watch = Watch(host, float(options["slice"]), int(options.pop("download_bytes")))
        while True:
            answer = self._execute_module(
                module_name="sparkfleet.dgx.vllm_wait",
                module_args={
                    **options,
                    "slice": max(min(options["slice"], options["timeout"] - watch.elapsed()), 0.0),
                    "cursor": watch.cursor,
                    "restarts": watch.restarts,
                },
                task_vars=task_vars,
            )
            if answer.get("failed") or "ready" not in answer:
                return {**result, **answer}
            for line in watch.take(answer):
                display.display(line)
            late = watch.elapsed() >= options["timeout"]
            if answer["ready"] or watch.crashed(answer) or late:
                break
        result.update(
            changed=False,
            ready=answer["ready"],
            seconds=round(watch.elapsed(), 1),
            restart_count=answer["restart_count"],
        )
        if not answer["ready"]:
            return {**result, "failed": True, **explain(container, answer, watch)}
        result.update(
            phases=watch.phases(),
            kv_cache=watch.tracker.kv,
            weights_gib=watch.tracker.weights_gib,
            started_at=answer["started_at"],
        )
        return result
