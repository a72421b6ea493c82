#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action of the same name, which runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: monitoring_plan
short_description: Works out what Prometheus scrapes and whom Alertmanager notifies
version_added: 0.3.0
description:
  - Targets from the groups C(sparks), C(gateways) and C(monitors) of the inventory. Contacts no host.
  - This is an action plugin; it runs on the controller.
options:
  receivers:
    description: The variables C(sparkfleet_alert_*), without their prefix.
    type: dict
    required: true
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Changes nothing.}
  diff_mode: {support: none, description: There is nothing to show.}
"""

EXAMPLES = r"""
- name: Work out targets and receivers
  sparkfleet.dgx.monitoring_plan:
    receivers: {email: "", email_from: "", smtp: "", smtp_user: "", smtp_password: "", webhook: http://192.0.2.9/hook,
                webhook_token: "", ntfy: "", ntfy_token: ""}
  register: monitoring
"""

RETURN = r"""
monitor: {description: The host that monitors the others., returned: success, type: str}
address: {description: Name or address under which it is reached., returned: success, type: str}
targets: {description: Targets per job in the form of Prometheus' files., returned: success, type: dict}
receivers: {description: The receiver's part of Alertmanager's configuration., returned: success, type: dict}
unreached: {description: Gateways that are not scraped., returned: success, type: list, elements: str}
"""
