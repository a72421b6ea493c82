#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Module: sends a test alert through Alertmanager on this host, and says by which way it was delivered."""

from __future__ import annotations

DOCUMENTATION = r"""
module: alert_test
short_description: Send a test alert through Alertmanager
version_added: 0.3.0
description:
  - Posts the alert C(SparkfleetTest) to Alertmanager on this host, which ends by itself after a minute, and waits
    until Alertmanager has delivered it, or failed to.
options:
  port: {description: TCP port of Alertmanager., type: int, required: true}
  sender: {description: Who sends it., type: str, default: ""}
  timeout: {description: Seconds to wait., type: int, default: 60}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Sends nothing.}
  diff_mode: {support: none, description: There is nothing to show.}
"""

EXAMPLES = r"""
- name: Send a test alert
  sparkfleet.dgx.alert_test:
    port: 9115
"""

RETURN = r"""
delivered: {description: "Ways by which it arrived; email, webhook.", returned: success, type: list, elements: str}
"""

import datetime
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import metrics

NAME = "SparkfleetTest"
SECONDS = 10
LIMIT = 4 << 20
PAUSE = 0.5
_REQUESTS = "alertmanager_notification_requests"
_INTEGRATION = re.compile(r'integration="([a-z]{1,40})"')


def ask(port: int, path: str, body: Any = None) -> str:
    """An answer of Alertmanager. Raises OSError, ValueError."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    # No proxy stands between a host and itself.
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=SECONDS) as answer:
        return str(answer.read(LIMIT).decode("utf-8", "replace"))


def succeeded(text: str) -> dict[str, float]:
    """Requests to receivers that succeeded so far, by integration: each try is one, unlike a notification."""
    found: dict[str, float] = {}
    for name, labels, value in metrics.samples(text):
        match = _INTEGRATION.search(labels)
        sign = {f"{_REQUESTS}_total": 1.0, f"{_REQUESTS}_failed_total": -1.0}.get(name)
        if match and sign:
            found[match[1]] = found.get(match[1], 0.0) + sign * value
    return found


def ways(port: int) -> dict[str, int]:
    """How many receivers of each integration are configured."""
    text = json.loads(ask(port, "/api/v2/status"))["config"]["original"]
    found = {
        "email": len(re.findall(r"^ .*\bsmarthost: ", text, re.M)),
        "webhook": len(re.findall(r"^ .*\burl: ", text, re.M)),
    }
    return {name: count for name, count in found.items() if f"{name}_configs:" in text and count}


def send(port: int, sender: str, timeout: float) -> tuple[list[str], list[str]]:
    """Integrations by which the alert was delivered, and those by which it was not. Raises OSError, ValueError."""
    wanted, before = ways(port), succeeded(ask(port, "/metrics"))
    if not wanted:
        raise ValueError(
            "nobody is told of alerts: set sparkfleet_alert_email, sparkfleet_alert_webhook or sparkfleet_alert_ntfy, "
            "and run site.yml --tags monitoring"
        )
    now = datetime.datetime.now(datetime.timezone.utc)
    alert: Mapping[str, Any] = {
        # A label of its own, so that it is not taken for one that was sent already.
        "labels": {"alertname": NAME, "severity": "none", "sent": now.strftime("%Y-%m-%dT%H:%M:%SZ")},
        "annotations": {
            "summary": f"A test of Sparkfleet's alerts{f' by {sender}' if sender else ''}; nothing is wrong"
        },
        "endsAt": (now + datetime.timedelta(minutes=1)).isoformat(),
    }
    ask(port, "/api/v2/alerts", [alert])
    end = time.monotonic() + timeout
    while True:
        after = succeeded(ask(port, "/metrics"))
        delivered = sorted(name for name, count in wanted.items() if after.get(name, 0) - before.get(name, 0) >= count)
        if len(delivered) == len(wanted) or time.monotonic() >= end:
            return delivered, sorted({*wanted} - {*delivered})
        time.sleep(PAUSE)


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "port": {"type": "int", "required": True},
            "sender": {"type": "str", "default": ""},
            "timeout": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    params = module.params
    if module.check_mode:
        module.exit_json(changed=False, delivered=[])
    try:
        delivered, missing = send(params["port"], params["sender"], params["timeout"])
    except urllib.error.HTTPError as error:
        module.fail_json(
            msg=f"Alertmanager refused the alert: HTTP {error.code}; journalctl -u sparkfleet-alertmanager"
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        known = isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError)
        why = str(error) if known else f"Alertmanager does not answer on port {params['port']} ({error})"
        hint = "" if known else "; sparkfleet_monitoring: true and site.yml --tags monitoring install it"
        module.fail_json(msg=why + hint)
    if missing:
        module.fail_json(
            msg=f"not delivered by {', '.join(missing)} within {params['timeout']} s"
            f"{f' (delivered by {chr(44).join(delivered)})' if delivered else ''}; "
            "journalctl -u sparkfleet-alertmanager says why"
        )
    module.exit_json(changed=False, delivered=delivered)


if __name__ == "__main__":
    main()
