#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action of the same name, which runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: image_digest
short_description: Resolves an image tag to a digest, on the controller
version_added: 0.2.0
description:
  - Resolved once per run for all its hosts, so that no host decides what others run. Contacts no host.
  - If the controller cannot reach the registry, it warns; hosts then resolve the tag themselves.
  - This is an action plugin; it runs on the controller.
options:
  image: {description: The image., type: str, required: true}
  registries: {description: "HOST[:PORT] to ask instead of a registry.", type: dict, default: {}}
  proxy: {description: Proxy between controller and registry., type: str, default: ""}
  no_proxy: {description: Names to reach without it., type: str, default: ""}
  ca_file:
    description: File with certificates in PEM of authorities to trust besides the controller's.
    type: path
    version_added: 0.3.0
  logins:
    description: Username and password by registry, as in C(sparkfleet_registry_logins).
    type: dict
    default: {}
    version_added: 0.3.0
  bundle: {description: Folder whose bundle.json is used instead of the registry., type: path}
  keys:
    description: >-
      Files with the public keys of publishers that sign their images with cosign, by REGISTRY or REGISTRY/PATH; an
      image below such a name without a signature by its key is refused.
    type: dict
    default: {}
  controller_verifies: {description: Fail if the registry cannot be asked., type: bool, default: false}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Changes nothing.}
  diff_mode: {support: none, description: There is nothing to show.}
"""

EXAMPLES = r"""
- name: Resolve the tag
  sparkfleet.dgx.image_digest:
    image: nvcr.io/nvidia/vllm:25.09-py3
  register: answer
"""

RETURN = r"""
digest: {description: "The digest, or empty.", returned: success, type: str}
reason: {description: "Why it could not be asked, or empty.", returned: success, type: str}
"""
