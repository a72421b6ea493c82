"""Whom Alertmanager tells: a pure function of the inventory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sparkfleet_host.bounded import HOST, printable

from sparkfleet import SparkfleetError
from sparkfleet.fleet import gateway

#: Variables `sparkfleet_alert_*` that say whom Alertmanager tells.
_OF_EMAIL = ("smtp", "email_from", "smtp_user", "smtp_password")
NAMES = ("email", *_OF_EMAIL, "webhook", "webhook_token", "ntfy", "ntfy_token")
_PLACE = re.compile(r"(?:\[([^\]]+)\]|([^:\[\]]+))(?::([0-9]{1,5}))?")
_USER = re.compile(r"[A-Za-z0-9._:~!$&'()*+,;=%@-]*")
_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_ADDRESS = re.compile(r"[^\s@,<>]{1,64}@[^\s@,<>]{1,253}")


def check(values: Mapping[str, Any]) -> None:
    """Whether Alertmanager takes what a host's variables say of whom it tells, where monitoring is on. Raises
    SparkfleetError naming the variable, never a secret."""
    if gateway.truth(values.get("sparkfleet_monitoring", False)):
        configuration({name: values.get(f"sparkfleet_alert_{name}") for name in NAMES})


def configuration(values: Mapping[str, Any]) -> dict[str, Any]:
    """Whom Alertmanager tells, from the variables `sparkfleet_alert_*` without their prefix: the receiver's part of its
    configuration; no keys for none. Raises SparkfleetError naming the variable, never a secret."""
    text = {name: str(values.get(name) or "").strip() for name in NAMES}
    made: dict[str, Any] = {}
    if text["email"]:
        made["email_configs"] = [_email(text)]
    elif useless := next((name for name in _OF_EMAIL if text[name]), ""):
        raise SparkfleetError(
            f"sparkfleet_alert_email: missing, to whom mail goes; sparkfleet_alert_{useless} has no use"
        )
    for name in ("webhook", "ntfy"):
        if text[name]:
            made.setdefault("webhook_configs", []).append(_hook(name, text[name], text[f"{name}_token"]))
        elif text[f"{name}_token"]:
            raise SparkfleetError(f"sparkfleet_alert_{name}_token: is for sparkfleet_alert_{name}, which is not set")
    return made


def _email(text: Mapping[str, str]) -> dict[str, Any]:
    for name in ("email", "email_from"):
        addresses = text[name].split(",") if name == "email" else [text[name]]
        for address in addresses:
            if not _ADDRESS.fullmatch(address.strip()):
                shown = printable(repr(address.strip()), 80)
                raise SparkfleetError(f"sparkfleet_alert_{name}: {shown} is not an address of mail (name@example.org)")
    host, port = _place(text["smtp"])
    if not host or not port:
        raise SparkfleetError(
            f"sparkfleet_alert_smtp: {printable(repr(text['smtp']), 80)} is not HOST:PORT of a mail server "
            "(mail.example.org:587, [2001:db8::1]:587)"
        )
    gateway.port_number("sparkfleet_alert_smtp:", port)
    for name, other in (("smtp_user", "smtp_password"), ("smtp_password", "smtp_user")):
        if text[name] and not text[other]:
            raise SparkfleetError(f"sparkfleet_alert_{other}: missing; sparkfleet_alert_{name} has no use without it")
    made: dict[str, Any] = {
        **{"to": text["email"], "from": text["email_from"], "smarthost": text["smtp"], "send_resolved": True},
    }
    if text["smtp_user"]:
        made |= {"auth_username": text["smtp_user"], "auth_password": text["smtp_password"]}
    # A relay of one's own on this host or net has no TLS often; with a password there is no sending without it.
    return made | {"require_tls": bool(text["smtp_user"])}


def _place(text: str) -> tuple[str, str]:
    """Host and port of HOST, HOST:PORT, or both with an IPv6 address in brackets; "" for a port that is not there, and
    for a host that is none."""
    found = _PLACE.fullmatch(text)
    if not found:
        return "", ""
    literal, name, port = found.groups(default="")
    return (literal if gateway.is_address(literal) else name if HOST.fullmatch(name) else ""), port


def _hook(name: str, url: str, token: str) -> dict[str, Any]:
    at = f"sparkfleet_alert_{name}"
    if not re.fullmatch(r"https?://[!-~]{1,2000}", url):
        raise SparkfleetError(f"{at}: is not an address that begins with http:// or https://")
    parts = re.fullmatch(r"https?://(?:([^/?#]*)@)?([^/?#]*)([^?#]*)(\?[^#]*)?(#.*)?", url)
    assert parts
    user, place, path, query, fragment = parts.groups(default="")
    host, port = _place(place)
    if not host:
        raise SparkfleetError(f"{at}: has neither a name nor an address of a host, or more than a port after it")
    if port:
        gateway.port_number(f"{at}:", port)
    # As Alertmanager reads it, which takes anything for a query.
    if not _USER.fullmatch(user) or any(_ESCAPE.search(part) for part in (user, path, fragment)):
        raise SparkfleetError(f"{at}: has a character that an address has only as %XX, or a % without two digits")
    if not re.fullmatch(r"[!-~]{0,4000}", token):
        raise SparkfleetError(f"{at}_token: has a character that a key cannot have, such as a blank")
    bearer = {"http_config": {"authorization": {"credentials": token}}} if token else {}
    if name == "ntfy":
        if fragment or not path.strip("/"):
            raise SparkfleetError(f"{at}: {'has a part after #' if fragment else 'has no topic after the host'}")
        # ntfy makes a message of Alertmanager's document with this template of its own.
        url += f"{'&' if query else '?'}template=alertmanager"
    return {"url": url, "send_resolved": True, **bearer}
