# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action plugin of the same name; it never runs on a host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: spark_plan
short_description: Looks at a Spark once and plans what is to be done there
description:
  - Runs the module M(sparkfleet.dgx.spark_state) on the host, and makes the plan on the controller
    (C(sparkfleet.planning.plan)).
  - Fails with every finding at once when the input is wrong or the host cannot serve the model.
  - Arguments of C(vllm serve) are taken from the host's variables C(sparkfleet_vllm_*).
  - The options are the variables C(sparkfleet_*) of the role C(sparkfleet), which documents them.
options:
  model: {description: Name in the catalogue or path of a card., type: str, required: true}
  profile: {description: Profile of the card., type: str, default: throughput}
  model_source: {description: Who downloads the model., type: str, choices: [local, hub], default: local}
  environment: {description: Variables of the engine's environment., type: dict, default: {}}
  tool_calls: {description: Let clients call tools., type: bool, default: true}
  memory_plan:
    description: What to do when the plan does not fit.
    type: str
    choices: [enforce, warn]
    default: enforce
  memory_reserve_gib: {description: Memory that is left to the host in GiB., type: float, default: 4}
  earlyoom: {description: Whether earlyoom is wanted., type: bool, default: true}
  earlyoom_arguments: {description: Its arguments., type: str, default: ""}
  swap: {description: What to do with swap., type: str, choices: [keep, disabled], default: keep}
  proxy: {description: Proxy between the host and the internet., type: str, default: ""}
  no_proxy: {description: Names that are reached without it., type: str, default: ""}
  image: {description: Image in place of the card's., type: str, default: ""}
  revision: {description: Revision in place of the card's., type: str, default: ""}
  port: {description: Port of the engine., type: int, default: 8000}
  listen: {description: Addresses that the port is published on., type: raw, default: auto}
  address: {description: Where gateways reach the host., type: str, default: ""}
  engine_key: {description: Key that the engine asks for., type: str, default: ""}
  project_dir: {description: Folder of the compose file., type: path, default: /opt/sparkfleet}
  cache_dir: {description: Folder of the model cache., type: path, default: /opt/hf}
  cache_owner: {description: Owner of the cache., type: str, default: root}
  cache_group: {description: Group of the cache., type: str, default: docker}
  ca_file: {description: Certificate authorities for an engine that downloads., type: path, default: ""}
  compile_cache_dir:
    description: Folder of what the engine compiles.
    type: path
    default: /var/cache/sparkfleet
  cache_mode: {description: Mode of the cache., type: str, default: "2775"}
  operator: {description: User who may run docker., type: str, default: root}
  docker_source:
    description: Where Docker is installed from.
    type: str
    choices: [distribution, docker]
    default: distribution
  require_gb10: {description: Refuse a host without a GB10., type: bool, default: true}
  image_disk_gib: {description: Disk that the unpacked image takes in GiB., type: float, default: 25}
  service_state: {description: Whether the service is to run., type: str, choices: [started, stopped], default: started}
  hf_token: {description: Hugging Face token., type: str, required: true}
  hf_token_file: {description: File on the host with the token., type: path, required: true}
  status:
    description: Look at what is served as well, for M(sparkfleet.dgx.spark_status), and print nothing.
    type: bool
    default: false
  hub_endpoint: {description: Address of the Hub., type: str, required: true}
author: ["The Sparkfleet developers"]
"""

EXAMPLES = r"""
- name: Plan
  sparkfleet.dgx.spark_plan:
    model: llama31-8b-fp8
    hf_token: "{{ sparkfleet_hf_token }}"
    hf_token_file: /etc/sparkfleet/hf_token
    hub_endpoint: https://huggingface.co
  register: sparkfleet_look
"""

RETURN = r"""
plan: {description: What is to be done; see C(sparkfleet.planning.plan.make)., returned: success, type: dict}
state: {description: What M(sparkfleet.dgx.spark_state) found., returned: success, type: dict}
"""
