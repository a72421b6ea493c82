"""What an audit makes of what was read on a host."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import pytest
from sparkfleet_host.http import KEY_FILE

from sparkfleet.diagnosis import audit

DAY = 86400.0
NOW = 1_800_000_000.0
PORTS = {22: "SSH", 8000: "engine", 9109: "guard"}
EVERYWHERE = "0.0.0.0"  # noqa: S104 - what a host says


def published(port: int, address: str = EVERYWHERE, protocol: str = "tcp") -> dict[str, Any]:
    return {"address": address, "port": port, "protocol": protocol}


def mounts(source: str, writable: bool = False) -> list[dict[str, Any]]:
    return [{"source": source, "writable": writable}]


#: What an engine has: models, what it compiled, the key, authorities.
OWN = ("/opt/hf", "/var/cache/sparkfleet/0123/vllm", KEY_FILE, "/etc/ssl/certs/ca-certificates.crt")
CONTAINER: dict[str, Any] = {
    **{"name": "vllm-m", "image": "i@sha256:1", "ours": True, "privileged": False},
    **{"mounts": [item for source in OWN for item in mounts(source, True)], "key": True},
    **{"host": ["IpcMode"], "capabilities": ["DAC_OVERRIDE"], "published": [published(8000)]},
}
OTHER = {**CONTAINER, "name": "db", "ours": False, "host": [], "key": False, "published": []}
SECRET = {"path": KEY_FILE, "mode": "0600", "owner": "root", "age": 3.0}


UNIT = {
    **{"name": "sparkfleet-u.service", "path": "/etc/systemd/system/sparkfleet-u.service", "drop_ins": []},
    **{"reload": False, "edited": False, "state": "active"},
}


def good() -> dict[str, Any]:
    """A host with nothing to report."""
    return copy.deepcopy(
        {
            "now": NOW,
            "listeners": [
                {"address": EVERYWHERE, "port": 22, "process": "sshd"},
                {"address": "::", "port": 8000, "process": "docker-proxy"},
                {"address": "127.0.0.1", "port": 2375, "process": "other"},
                {"address": "::1", "port": 6000, "process": "other"},
            ],
            "secrets": [SECRET],
            "files": [],
            "copies": {"found": [], "searched": 900, "unfinished": False},
            "docker_logins": [],
            "containers": [CONTAINER],
            "docker_users": [],
            "releases": {
                "current": 3,
                "damage": [],
                "images": [{"service": "vllm-m", "locked": "i@sha256:1", "wanted": "sha256:a", "runs": "sha256:a"}],
            },
            "units": [UNIT],
            "certificates": [{"path": "/c.pem", "ends": NOW + 90 * DAY}],
            "sshd": {"permitrootlogin": "prohibit-password", "passwordauthentication": "no"},
            "updates": {"installed": True, "enabled": True},
            "sudo": [],
            "firewall": [],
        }
    )


def graded(facts: dict[str, Any], **expected: Any) -> list[tuple[str, str]]:
    return [(item.id, item.grade) for item in audit.findings(facts, audit.Expected(PORTS, **expected))]


def test_a_host_with_nothing_to_report() -> None:
    assert graded(good()) == []


DIFFERENT = {"drop_ins": ["/etc/u.d/x.conf"]}, {"reload": True}, {"edited": True}, {"path": "/run/u.service"}
COPY = {"path": "/home/a/key", "mode": "0600", "owner": "a", "age": 1.0}
SHARED = {**COPY, "mode": "0644"}


@pytest.mark.parametrize(
    ("part", "value", "finding"),
    [
        ("listeners", [{"address": EVERYWHERE, "port": 2375, "process": "dockerd"}], ("docker-api", "critical")),
        ("listeners", [{"address": "192.0.2.1", "port": 4243, "process": "dockerd"}], ("docker-api", "critical")),
        ("listeners", [{"address": "::", "port": 3306, "process": "mysqld"}], ("port-unexpected", "low")),
        ("listeners", [{"address": "192.0.2.1", "port": 8404, "process": "haproxy"}], ("statistics-open", "low")),
        ("secrets", [{**SECRET, "mode": "0644"}], ("secret-mode", "high")),
        ("secrets", [{**SECRET, "owner": "nvidia"}], ("secret-mode", "high")),
        ("secrets", [{**SECRET, "age": 400.0}], ("secret-old", "low")),
        ("copies", {"found": [COPY], "searched": 9, "unfinished": False}, ("secret-copy", "high")),
        (
            "copies",
            {"found": [{**COPY, "mode": "0644"}], "searched": 9, "unfinished": False},
            ("secret-copy", "critical"),
        ),
        ("copies", {"found": [], "searched": 9, "unfinished": True}, ("not-read", "info")),
        ("docker_logins", [{**COPY, "registries": ["nvcr.io"]}], ("docker-login", "medium")),
        ("docker_logins", [{**COPY, "mode": "0640", "registries": ["nvcr.io"]}], ("docker-login", "high")),
        ("files", [{**COPY, "path": "/opt/sparkfleet/compose.yml"}], ("file-writable", "high")),
        ("containers", [{**CONTAINER, "privileged": True}], ("container-privileged", "high")),
        ("containers", [{**CONTAINER, "capabilities": ["CAP_SYS_ADMIN"]}], ("container-privileged", "high")),
        ("containers", [{**CONTAINER, "mounts": mounts("/run/docker.sock")}], ("container-socket", "high")),
        ("containers", [{**CONTAINER, "mounts": mounts("/run")}], ("container-socket", "high")),
        ("containers", [{**CONTAINER, "mounts": mounts("/run/containerd")}], ("container-socket", "high")),
        (
            "containers",
            [{**CONTAINER, "mounts": mounts("/run/containerd/containerd.sock")}],
            ("container-socket", "high"),
        ),
        ("containers", [{**CONTAINER, "mounts": mounts("/")}], ("container-socket", "high")),
        ("containers", [{**OTHER, "mounts": mounts("/etc")}], ("container-mount", "medium")),
        ("containers", [{**OTHER, "mounts": mounts("/root")}], ("container-mount", "medium")),
        ("containers", [{**OTHER, "mounts": mounts("/var")}], ("container-mount", "medium")),
        ("containers", [{**OTHER, "mounts": mounts("/var/lib/docker")}], ("container-mount", "medium")),
        ("containers", [{**OTHER, "mounts": mounts("/proc")}], ("container-mount", "medium")),
        ("containers", [{**OTHER, "mounts": mounts("/dev")}], ("container-mount", "medium")),
        ("containers", [{**OTHER, "mounts": mounts("/etc", True)}], ("container-mount", "high")),
        ("containers", [CONTAINER, {**OTHER, "published": [published(5432)]}], ("port-unexpected", "low")),
        ("containers", [CONTAINER, {**OTHER, "published": [published(5432, "::", "udp")]}], ("port-unexpected", "low")),
        ("containers", [CONTAINER, {**OTHER, "published": [published(2375)]}], ("docker-api", "critical")),
        ("containers", [{**CONTAINER, "host": ["PidMode"]}], ("container-host", "low")),
        ("containers", [{**CONTAINER, "ours": False, "key": False}], ("container-host", "low")),
        ("containers", [{**CONTAINER, "key": False}], ("engine-open", "high")),
        ("docker_users", ["nvidia"], ("docker-group", "medium")),
        ("releases", {"current": 3, "damage": ["lock.json was changed"], "images": []}, ("release-altered", "high")),
        ("certificates", [{"path": "/c.pem", "ends": NOW + 20 * DAY}], ("certificate-expires", "medium")),
        ("certificates", [{"path": "/c.pem", "ends": NOW + 3 * DAY}], ("certificate-expires", "high")),
        ("certificates", [{"path": "/c.pem", "ends": NOW - DAY}], ("certificate-expires", "critical")),
        ("sshd", {"passwordauthentication": "yes"}, ("ssh-password", "low")),
        ("sshd", {"passwordauthentication": "yes", "permitemptypasswords": "yes"}, ("ssh-password", "high")),
        ("updates", {"installed": False, "enabled": False}, ("updates-off", "medium")),
        ("sudo", ["nvidia"], ("sudo-nopasswd", "info")),
        *(("units", [{**UNIT, **different}], ("unit-altered", "medium")) for different in DIFFERENT),
        ("sshd", {"error": "FileNotFoundError: sshd"}, ("not-read", "info")),
    ],
)
def test_one_thing_is_one_finding(part: str, value: Any, finding: tuple[str, str]) -> None:
    facts = good()
    facts[part] = value
    assert graded(facts, statistics_port=8404) == [finding]


HARMLESS = ("/etc/localtime", "/var/lib/docker/volumes/v/_data", "/rooted", "/var/log", "/run/other", "/home/a/.cache")


@pytest.mark.parametrize("source", HARMLESS)
def test_other_mounts_are_nobody_s_business(source: str) -> None:
    facts = good()
    facts["containers"].append({**OTHER, "mounts": mounts(source, True), "published": [published(5432, "127.0.0.1")]})
    assert graded(facts) == []


def listening(*ports: int, process: str = "python3", address: str = EVERYWHERE) -> list[dict[str, Any]]:
    return [{"address": address, "port": port, "process": process} for port in ports]


DOOR = {**CONTAINER, "key": False, "published": [published(18000, "127.0.0.1")]}
LOOPBACK = {**DOOR, "published": [published(8001, "127.0.0.1")]}
RANK = {**CONTAINER, "key": False, "published": [], "host": ["IpcMode", "NetworkMode"]}
KEYED = {**RANK, "key": True}


@pytest.mark.parametrize(
    ("listeners", "containers", "secrets", "found"),
    [
        (listening(8000), [DOOR], [], ["engine-open"]),
        (listening(8000), [], [], ["engine-open"]),  # asleep
        (listening(8000), [DOOR], [SECRET], []),  # the guard asks for it
        (listening(8000, address="127.0.0.1"), [DOOR], [], []),
        (listening(8000, process="haproxy", address="192.0.2.1"), [DOOR], [], []),
        (listening(8001, process="socat"), [LOOPBACK], [SECRET], ["engine-open"]),  # past what Docker publishes
        (listening(8001, process="vllm"), [RANK], [SECRET], ["engine-open", "container-host"]),
        (listening(8001, process="vllm"), [KEYED], [SECRET], ["container-host"]),
        (listening(8001, process="vllm", address="::1"), [RANK], [SECRET], ["container-host"]),
    ],
)
def test_an_engine_that_docker_does_not_publish(
    listeners: list[Any], containers: list[Any], secrets: list[Any], found: Sequence[str]
) -> None:
    facts = {**good(), "listeners": listeners, "containers": containers, "secrets": secrets}
    expected = audit.Expected({**PORTS, 8001: "engine"}, engines={8001}, doors={8000})
    assert [item.id for item in audit.findings(facts, expected)] == found


@pytest.mark.parametrize(
    ("firewall", "closed", "found"),
    [(True, [8000, 8001, 9109], 0), (True, [9109], 2), (True, [], 2), (False, [8000, 8001, 9109], 2)],
)
def test_the_firewall_closes_what_it_has_loaded(firewall: bool, closed: list[int], found: int) -> None:
    facts = good() | {"firewall": closed, "secrets": []}
    facts["listeners"] += listening(8001)
    facts["containers"] = [{**CONTAINER, "key": False}]
    expected = audit.Expected({**PORTS, 8001: "engine"}, doors={8001}, firewall=firewall)
    assert [item.id for item in audit.findings(facts, expected)] == ["engine-open"] * found


def test_a_port_of_a_container_is_one_finding_whoever_listens() -> None:
    """docker-proxy does, or Docker itself (`userland-proxy: false`), which is not its API then."""
    for process in ("docker-proxy", "dockerd"):
        facts = good()
        facts["containers"].append({**OTHER, "published": [published(5432)]})
        facts["listeners"] += [*listening(5432, process=process), *listening(5432, process=process, address="::")]
        facts["listeners"] += listening(8000, process=process)
        (item,) = audit.findings(facts, audit.Expected(PORTS, engines={8000}))
        assert (item.id, item.what) == ("port-unexpected", f"container db is published on {EVERYWHERE}:5432")


def test_what_could_not_be_read_is_no_reason_to_fail() -> None:
    facts = good()
    facts |= {part: {"error": "OSError: no"} for part in ("containers", "secrets", "firewall", "listeners")}
    assert graded(facts, engines={8000}, firewall=True) == [("not-read", "info")] * 4


def test_findings_come_by_grade_and_have_remedies() -> None:
    facts = good()
    facts["sshd"] = {"permitrootlogin": "yes", "passwordauthentication": "yes"}
    facts["units"] = [{**UNIT, "drop_ins": ["/etc/u.d/x.conf"], "reload": True}]
    facts["releases"]["images"][0]["runs"] = "sha256:b"
    found = audit.findings(facts, audit.Expected(PORTS, differs=["port: 8000 → 8001"]))
    grades = [audit.GRADES.index(item.grade) for item in found]
    assert grades == sorted(grades, reverse=True)
    names = ["image-differs", "ssh-root", "unit-altered", "unit-altered", "deployment-differs", "ssh-password"]
    assert [item.id for item in found] == names
    assert all(item.as_dict()["remedy"] and item.as_dict()["why"] for item in found)
    assert len(audit.reaches(found, "medium")) == 4 and audit.reaches(found, "critical") == []


def test_who_is_in_the_group_docker_as_the_inventory_wants_is_known() -> None:
    facts = good()
    facts["docker_users"] = ["nvidia", "other"]
    assert graded(facts, operator="nvidia") == [("docker-group", "medium"), ("docker-group", "info")]


def test_sarif_names_rules_hosts_and_places() -> None:
    facts = good()
    facts["secrets"] = [{**SECRET, "mode": "0644"}]
    facts["updates"] = {"installed": False, "enabled": False}
    found = [item.as_dict() for item in audit.findings(facts, audit.Expected(PORTS))]
    document = json.loads(audit.sarif({"spark-1": found, "spark-2": []}))
    assert document["version"] == "2.1.0" and document["$schema"].endswith("sarif-2.1.0.json")
    (run,) = document["runs"]
    rules = {rule["id"] for rule in run["tool"]["driver"]["rules"]}
    assert rules == set(audit.CHECKS)
    assert [(item["ruleId"], item["level"]) for item in run["results"]] == [
        ("secret-mode", "error"),
        ("updates-off", "warning"),
    ]
    (place,) = run["results"][0]["locations"]
    assert place["physicalLocation"]["artifactLocation"]["uri"] == "spark-1/etc/sparkfleet/engine_key"


def test_what_a_host_says_does_nothing_to_a_terminal_and_has_an_end() -> None:
    facts = good()
    facts["docker_users"] = ["\x1b[2J" + "x" * 10_000]
    (item,) = audit.findings(facts, audit.Expected(PORTS))
    assert "\x1b" not in item.what + item.where and len(item.what) < 1000
