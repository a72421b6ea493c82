#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: whether the Hub accepts a token."""

from __future__ import annotations

DOCUMENTATION = r"""
module: hub_token
short_description: Asks the Hugging Face Hub whose a token is
description:
  - Asks C(/api/whoami-v2) of the Hub from the host, as its downloads do, and fails where the Hub does not accept the
    token. The token is sent with the module, and never shown.
  - Says nothing of which models the token may read.
  - Changes nothing.
version_added: 0.3.0
options:
  token: {description: The token., type: str, required: true}
  endpoint: {description: Address of the Hub., type: str, default: https://huggingface.co}
  proxy: {description: Address of a proxy., type: str, default: ""}
  no_proxy: {description: "Names that are reached without it, separated by commas.", type: str, default: ""}
  seconds: {description: How long it may take., type: float, default: 30}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Asks as well.}
  diff_mode: {support: none, description: Changes nothing.}
"""

EXAMPLES = r"""
- name: Ask the Hub about the new token
  sparkfleet.dgx.hub_token:
    token: "{{ sparkfleet_hf_token }}"
"""

RETURN = r"""
account: {description: Name of the account that the token belongs to., returned: success, type: str}
failure: {description: Entry in the table of failures., returned: failure, type: str}
"""

import http.client
import re
import urllib.error
import urllib.parse
import urllib.request

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import bounded
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.bounded import BoundsError, printable
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.job import JobError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.registry import opener

LARGEST = 1 << 20  # of an answer, bytes
NEAR = re.compile(r"localhost|127(\.\d{1,3}){3}|::1")


def account(token: str, endpoint: str, proxy: str = "", no_proxy: str = "", seconds: float = 30) -> str:
    """Name of the account of a token. Raises JobError where the Hub rejects the token or does not say."""
    try:
        parts = urllib.parse.urlsplit(endpoint)
        host = parts.hostname or ""
    except ValueError as error:
        raise JobError("bad-input", f"sparkfleet_hub_endpoint {printable(endpoint, 200)!r}: {error}") from None
    if parts.scheme != "https" and not NEAR.fullmatch(host):
        raise JobError(
            "hub-token-in-clear",
            f"the Hub at {endpoint} has no TLS, so the token could be intercepted: use https:// for "
            "sparkfleet_hub_endpoint",
        )
    if not re.fullmatch(r"[!-~]{1,1000}", token):
        raise JobError("hub-token-rejected", "the token has characters that no token has, or is empty")
    try:
        answer = bounded.in_time(lambda: _ask(f"{endpoint.rstrip('/')}/api/whoami-v2", token, proxy, no_proxy), seconds)
        known = bounded.as_dict(bounded.parse_json(answer, "the answer", LARGEST), "the answer")
        name: str = printable(bounded.as_str(known.get("name"), "name of the account", 200), 200)
        return name
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise JobError(
                "hub-token-rejected",
                f"{endpoint} does not accept the new token ({error.code}): create a read token at {endpoint}"
                "/settings/tokens and give it to sparkfleet_hf_token",
            ) from None
        reason = f"it answered {error.code} {printable(str(error.reason), 80)}"
    except BoundsError as error:
        raise JobError("hub-answer-odd", f"{endpoint} answers oddly: {printable(str(error), 200)}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = printable(str(getattr(error, "reason", error)) or type(error).__name__, 200)
    raise JobError(
        "hub-unreachable",
        f"{endpoint} could not be asked about the new token: {reason}; check network and proxy, and run again "
        "(`sparkfleet deploy` writes a token without asking)",
    )


def _ask(url: str, token: str, proxy: str, no_proxy: str) -> bytes:
    request = urllib.request.Request(url, headers={"Accept": "application/json"})  # noqa: S310  see opener
    request.add_unredirected_header("Authorization", f"Bearer {token}")
    with opener({"http": proxy, "https": proxy}, no_proxy).open(request, timeout=15) as answer:
        body: bytes = bounded.read_all(answer.read1, "the answer", LARGEST)
    return body


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "token": {"type": "str", "required": True, "no_log": True},
            "endpoint": {"type": "str", "default": "https://huggingface.co"},
            "proxy": {"type": "str", "default": "", "no_log": True},
            "no_proxy": {"type": "str", "default": ""},
            "seconds": {"type": "float", "default": 30.0},
        },
        supports_check_mode=True,
    )
    params = module.params
    try:
        found = account(*(params[key] for key in ("token", "endpoint", "proxy", "no_proxy", "seconds")))
    except JobError as error:
        module.fail_json(msg=str(error), failure=error.id)
    module.exit_json(changed=False, account=found)


if __name__ == "__main__":
    main()
