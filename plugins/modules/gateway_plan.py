#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action of the same name, which runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gateway_plan
short_description: Works out a gateway's backends and servers from the inventory
version_added: 0.2.0
description:
  - One backend per model, one server per Spark of the group C(sparks). Contacts no host.
  - This is an action plugin; it runs on the controller.
options:
  keys:
    description: Keys of clients, each a text or a mapping with C(key), C(name), C(requests_per_second) and C(streams).
    type: list
    elements: raw
    default: []
  requests_per_second:
    description: Requests a second of a client without its own quota; 0 for none.
    type: int
    default: 0
  streams: {description: Requests at a time of a client without its own quota; 0 for none., type: int, default: 0}
  paths: {description: Paths to open besides those of the role., type: list, elements: str, default: []}
  rotating:
    description: >-
      While keys are rotated, what the gateway has of them: C(engine_keys) (lines of its map), or C(keys) of clients
      with the name of one as C(client). What it has and the inventory no longer has stays valid besides the new.
    type: dict
    default: {}
    version_added: 0.3.0
  monitoring: {description: Whether the fleet is monitored., type: bool, default: false, version_added: 0.3.0}
  prometheus_port: {description: TCP port of Prometheus on the monitor., type: int, default: 9114, version_added: 0.3.0}
  address: {description: "Floating address, with or without a prefix length.", type: str, default: ""}
  port: {description: TCP port for clients., type: int, default: 8080}
  statistics_port: {description: TCP port of statistics and metrics., type: int, default: 8404}
  peer_port: {description: TCP port on which gateways synchronise sessions., type: int, default: 8405}
  ports: {description: Separate port per model., type: dict, default: {}}
  models:
    description: Models that get a backend although no Spark is meant to serve them.
    type: list
    elements: str
    default: []
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Changes nothing.}
  diff_mode: {support: none, description: There is nothing to show.}
"""

EXAMPLES = r"""
- name: Work out backends and servers
  sparkfleet.dgx.gateway_plan:
    ports: {qwen3-8b-fp8: 8081}
  register: gateway
"""

RETURN = r"""
backends: {description: As the role gateway takes them., returned: success, type: list, elements: dict}
previous:
  description: Backends with the engines' key before.
  returned: success
  type: list
  elements: dict
previous_keys:
  description: Keys of the client before.
  returned: success
  type: list
  elements: dict
models: {description: Answer of C(/v1/models)., returned: success, type: str}
client_keys:
  description: The keys of clients with their names and quotas, as the role gateway takes them.
  returned: success
  type: list
  elements: dict
paths: {description: Paths to open besides those of the role., returned: success, type: list, elements: str}
engine_keys: {description: Engine key per backend., returned: success, type: dict}
names: {description: Servers whose names the gateway resolves., returned: success, type: list, elements: dict}
gateways: {description: Name and address of each gateway., returned: success, type: list, elements: dict}
drained: {description: Sparks that are left out., returned: success, type: list, elements: str}
certificate_names: {description: Names of a self-signed certificate., returned: success, type: list, elements: str}
certificate_shown: {description: The same names as printed by OpenSSL., returned: success, type: str}
"""
