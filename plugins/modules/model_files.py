#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action of the same name, which runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: model_files
short_description: Resolves a model revision to its commit and files, on the controller
version_added: 0.2.0
description:
  - Commit, files, sizes and hashes, resolved once per run for all its hosts, so that no host decides what
    others load. Contacts no host.
  - If the controller cannot reach the Hub, it warns; what one host serves to others is then not verified.
  - This is an action plugin; it runs on the controller.
options:
  repo: {description: Name on the Hub., type: str, required: true}
  revision: {description: "Branch, tag or commit.", type: str, required: true}
  endpoint: {description: URL of the Hub., type: str, required: true}
  token: {description: The Hub's token., type: str, default: ""}
  proxy: {description: Proxy between controller and Hub., type: str, default: ""}
  no_proxy: {description: Names to reach without it., type: str, default: ""}
  ca_file:
    description: File with certificates in PEM of authorities to trust besides the controller's.
    type: path
    version_added: 0.3.0
  bundle: {description: Folder whose list is used instead of the Hub., type: path}
  remote_code:
    description: Include code files, which the engine runs with C(trust_remote_code).
    type: bool
    default: false
  pickle: {description: Weights may be pickles where there are no safetensors., type: bool, default: false}
  controller_verifies: {description: Fail if the Hub cannot be asked., type: bool, default: false}
  lock: {description: Lock file that has the revision (a commit) instead of the Hub., type: path}
  listing: {description: "What a host has of the model; refused if it differs.", type: dict, default: {}}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Changes nothing.}
  diff_mode: {support: none, description: There is nothing to show.}
"""

EXAMPLES = r"""
- name: Resolve the revision
  sparkfleet.dgx.model_files:
    repo: nvidia/Llama-3.1-8B-Instruct-FP8
    revision: main
    endpoint: https://huggingface.co
    token: "{{ lookup('ansible.builtin.env', 'HF_TOKEN') }}"
  no_log: true
  register: answer
"""

RETURN = r"""
expected: {description: "Commit and files, or empty.", returned: success, type: dict}
reason: {description: "Why it could not be asked, or empty.", returned: success, type: str}
"""
