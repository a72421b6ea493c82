#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Proof that an endpoint answers."""

from __future__ import annotations

DOCUMENTATION = r"""
module: vllm_verify
short_description: Proves that a vLLM endpoint answers
description:
  - A health check alone shows little, so questions with known answers are asked, as chat, completion and
    event stream, concurrently; the model list, counters and API description are checked as well.
  - With O(mode=deep) the engine is asked for all that its model is for as well, one kind after the other - a fact in a
    long context, a call of a tool, an answer of a JSON schema, thoughts apart from the answer, a picture, many streams.
  - Changes nothing, so it also runs in check mode.
  - The action of the same name prints the checks as a table and saves the result on the controller.
options:
  url:
    description: Where the engine answers, as seen from the host.
    type: str
    default: http://127.0.0.1:8000
  model:
    description: Name under which the model is served.
    type: str
    required: true
  question:
    description: Asked as a chat message, plain and streamed.
    type: str
    default: What is the capital of France? Answer in one short sentence.
  expect:
    description: What the answer must contain, as whole words; case is ignored.
    type: str
    default: Paris
  prompt:
    description: Text to be completed.
    type: str
    default: The capital of France is
  prompt_expect:
    description: What the completion must contain, as whole words; case is ignored.
    type: str
    default: Paris
  timeout:
    description: Timeout for one answer in seconds.
    type: float
    default: 120
  max_tokens:
    description: Tokens that one answer may have.
    type: int
    default: 32
  chat_template_kwargs:
    description: Passed to the model's chat template; templates ignore unknown keys.
    type: dict
    default: {enable_thinking: false}
  kinds:
    description:
      - What is asked, by what the model is for. C(chat), C(completion) and C(stream) are the quick set, and so are
        C(embeddings), C(rerank) and C(classify) for models of these kinds; O(mode=deep) asks the others as well.
      - The module alone asks all that are listed, at once where they are of the quick set.
    type: list
    elements: str
    choices:
      - chat
      - completion
      - stream
      - embeddings
      - rerank
      - classify
      - concurrency
      - json_schema
      - tool_call
      - reasoning
      - image
      - needle
    default: [chat, completion, stream]
  mode:
    description: By the action; C(quick) asks those of O(kinds) that are of the quick set, C(deep) all.
    type: str
    choices: [quick, deep]
    default: quick
  budget:
    description: Seconds that all kinds but those of the quick set may take together.
    type: float
    default: 300
  verified:
    description:
      - By the action; results of a verification just done, by service, as M(sparkfleet.dgx.release_switch) returns them
        in C(verifications). What passed there in depth is shown, and not asked again.
    type: dict
    default: {}
  verify_id: {description: The verification that this one continues; the action's., type: str, default: ""}
  report:
    description: By the action; file on the controller for the result, none when empty. Not written in check mode.
    type: str
    default: ""
  engines:
    description: By the action; engines to verify in turn, as M(sparkfleet.dgx.spark_plan) returns them.
    type: list
    elements: dict
  measured:
    description: By the action; what was measured of engines, by service, for the report.
    type: dict
    default: {}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Also runs in check mode; changes nothing.}
  diff_mode: {support: none, description: There is nothing to show.}
"""

EXAMPLES = r"""
- name: Ask the endpoint
  sparkfleet.dgx.vllm_verify:
    model: nvidia/Llama-3.1-8B-Instruct-FP8
    question: What is the capital of France? Answer in one short sentence.
    expect: Paris
    report: "{{ playbook_dir }}/reports/{{ inventory_hostname }}.json"
"""

RETURN = r"""
verified: {description: Whether every check passed., returned: always, type: bool}
checks:
  description: One entry per check; name, ok, detail, seconds, failure (entry in the table of failures, or empty).
  returned: always
  type: list
  elements: dict
asked: {description: "url, model, question, expect, prompt and prompt_expect as used.", returned: always, type: dict}
answer: {description: The chat answer., returned: always, type: str}
completion: {description: The completion., returned: always, type: str}
ttft_ms: {description: ms to the first streamed text with three requests at once., returned: success, type: float}
tokens_per_second: {description: Rate of the stream after its first text., returned: success, type: float}
usage: {description: Tokens of the three requests; prompt_tokens and completion_tokens., returned: always, type: dict}
verify_id: {description: Part of the requests' X-Request-Id., returned: always, type: str}
seconds: {description: Duration of the complete verification., returned: always, type: float}
"""

from urllib.parse import urlsplit

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import integrity
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.docker import Docker
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.http import HttpError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.integrity import request
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.verify import (
    BUDGET,
    DEEP,
    GENERATIVE,
    KINDS,
    QUICK,
    verify,
)


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "default": "http://127.0.0.1:8000"},
            "model": {"type": "str", "required": True},
            "question": {"type": "str", "default": "What is the capital of France? Answer in one short sentence."},
            "expect": {"type": "str", "default": "Paris"},
            "prompt": {"type": "str", "default": "The capital of France is"},
            "prompt_expect": {"type": "str", "default": "Paris"},
            "timeout": {"type": "float", "default": 120.0},
            "max_tokens": {"type": "int", "default": 32},
            "chat_template_kwargs": {"type": "dict", "default": {"enable_thinking": False}},
            "kinds": {"type": "list", "elements": "str", "choices": list(KINDS), "default": list(GENERATIVE)},
            "mode": {"type": "str", "choices": [QUICK, DEEP], "default": QUICK},
            "budget": {"type": "float", "default": BUDGET},
            "verified": {"type": "dict", "default": {}},
            "verify_id": {"type": "str", "default": ""},
            "report": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    try:
        result = verify(module.params)
    except HttpError as error:
        module.fail_json(msg=str(error))
    if not result["verified"] and not module.check_mode and result["failure"] in integrity.NONSENSE:
        # Where the engine runs on this host, the next fetch hashes its model.
        port = urlsplit(module.params["url"]).port or 0
        integrity.mark_served(Docker(timeout=10), f"a verification failed ({result['failure']})", port=port)
    if not result["verified"]:
        if not module.check_mode:
            request(str(result["failure"]))
        module.fail_json(changed=False, **result)
    module.exit_json(changed=False, **result)


if __name__ == "__main__":
    main()
