"""The gateway: its plan, its configuration, the server that is drained."""

from __future__ import annotations

import json
import re
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gateway_network
import haproxy_server
import pytest
import yaml
from ansible.errors import AnsibleActionFail
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.module_utils.testing import patch_module_args
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import network

from sparkfleet import SparkfleetError
from sparkfleet.fleet import gateway
from tests.unit import ROOT
from tests.unit.plugins.test_fleet_actions import Stage
from tests.unit.roles.haproxy import rendered

HOSTS: dict[str, dict[str, Any]] = {
    "spark-1": {"ansible_host": "192.0.2.11"},
    "spark-2": {"ansible_host": "192.0.2.12", "sparkfleet_address": "spark-2.lan", "sparkfleet_port": 8001},
    "spark-3": {"sparkfleet_model": "gpt-oss-120b", "sparkfleet_guard": False},
    "spark-4": {"sparkfleet_drained": True},
}


def plan(hosts: dict[str, dict[str, Any]], **ports: Any) -> dict[str, Any]:
    return gateway.plan(gateway.settings(hosts), {name.replace("_", "-"): port for name, port in ports.items()})


def test_a_backend_a_model_a_server_a_spark() -> None:
    made = plan(HOSTS)
    llama, oss = made["backends"]
    assert llama["repo"] == "nvidia/Llama-3.1-8B-Instruct-FP8"
    # Which of its models a Spark serves at the moment, its guard says.
    ready, asked = f"/ready?model={llama['repo']}", "/v1/models"
    assert [tuple(item.values()) for item in llama["servers"]] == [
        ("spark-1", "192.0.2.11", True, 8000, 9109, ready, True),
        ("spark-2", "spark-2.lan", False, 8001, 9109, ready, True),
        ("spark-3", "spark-3", False, 8000, 0, asked, False),
    ]
    assert [(item["name"], item["meant"]) for item in oss["servers"]] == [
        ("spark-1", False),
        ("spark-2", False),
        ("spark-3", True),
    ]
    assert made["drained"] == ["spark-4"]
    assert [item["id"] for item in json.loads(made["models"])["data"]] == [llama["repo"], oss["repo"]]


def refused(name: str, value: Any) -> list[str]:
    """What Ansible's check of the role's arguments says of one of them."""
    file = ROOT / "roles" / "gateway" / "meta" / "argument_specs.yml"
    options = yaml.safe_load(file.read_text(encoding="utf-8"))["argument_specs"]["main"]["options"]
    return list(ArgumentSpecValidator({name: options[name]}).validate({name: value}).error_messages)


def test_the_roles_spec_takes_what_the_plan_gives_and_nothing_else() -> None:
    made = plan(HOSTS, llama31_8b_fp8=9000)["backends"]
    assert refused("gateway_backends", made) == [] and refused("gateway_peers", GATEWAYS) == []
    first = made[0]
    for key in first:
        without = {other: value for other, value in first.items() if other != key}
        assert f"missing required arguments: {key}" in refused("gateway_backends", [without])[0]
    for key in first["servers"][0]:
        server = {other: value for other, value in first["servers"][0].items() if other != key}
        assert f"missing required arguments: {key}" in refused("gateway_backends", [{**first, "servers": [server]}])[0]
    for wrong in ({**first, "port": 8000}, {**first, "ports": ["x"]}, {**first, "servers": ["spark-1"]}, "spark-1"):
        assert refused("gateway_backends", [wrong])
    assert refused("gateway_peers", [{"name": "gateway-1"}])


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"sparkfleet_model": "no-such"}, "spark-1: "),
        ({"sparkfleet_port": "http"}, "spark-1: sparkfleet_port 'http' is not a TCP port"),
        ({"sparkfleet_guard_port": 70000}, "sparkfleet_guard_port 70000"),
        ({"sparkfleet_address": "a b"}, "sparkfleet_address 'a b'"),
        ({"sparkfleet_drained": True}, "no Spark is left"),
    ],
)
def test_what_is_wrong_is_named(variables: dict[str, Any], words: str) -> None:
    with pytest.raises(SparkfleetError, match=words):
        plan({"spark-1": variables})


def keyed(key: str, *names: str) -> dict[str, dict[str, Any]]:
    return {name: {**HOSTS[name], "sparkfleet_engine_key": key} for name in names or HOSTS}


def lines(made: dict[str, Any]) -> str:
    """The engines' keys as the role writes them."""
    return "".join(f"{name} Bearer {key}\n" for name, key in made["engine_keys"].items())


def test_a_key_that_changes_has_two_backends_until_it_has_changed() -> None:
    before = gateway.plan(gateway.settings(keyed("the-key-before")))
    assert before["previous"] == []
    assert all("key=" not in server["check"] for item in before["backends"] for server in item["servers"])
    between = gateway.plan(gateway.settings(keyed("the-key-after")), installed=lines(before))
    assert [item["of"] for item in between["previous"]] == [item["name"] for item in between["backends"]]
    for old, new in zip(between["previous"], between["backends"], strict=True):
        assert between["engine_keys"][old["name"]] == "the-key-before"
        assert between["engine_keys"][new["name"]] == "the-key-after"
        # Until a Spark is switched it has the key before; what it has is asked of its guard.
        assert not any(server["meant"] for server in new["servers"])
        checks = [[server["check"] for server in item["servers"] if server["check_port"]] for item in (old, new)]
        assert checks[0] != checks[1] and all("&key=" in check for part in checks for check in part)
        assert "the-key" not in str(checks)
    again = gateway.plan(gateway.settings(keyed("the-key-after")), installed=lines(between))
    assert again == between
    after = gateway.plan(gateway.settings(keyed("the-key-after")))
    assert after["previous"] == [] and "the-key-before" not in str(after)
    # What was introduced, or did not change, has no key before.
    assert gateway.plan(gateway.settings(keyed("the-key-after")), installed="")["previous"] == []
    assert gateway.plan(gateway.settings(keyed("the-key-after")), installed=lines(after))["previous"] == []


def test_a_third_key_waits_for_the_end_of_the_second_ones_rotation() -> None:
    before = gateway.plan(gateway.settings(keyed("the-key-before")))
    between = gateway.plan(gateway.settings(keyed("the-key-after")), installed=lines(before))
    with pytest.raises(SparkfleetError, match=r"is between two keys of .* already") as refused:
        gateway.plan(gateway.settings(keyed("a-third-key")), installed=lines(between))
    assert "the-key" not in str(refused.value) and "a-third" not in str(refused.value)


def test_of_a_client_what_the_gateway_has_and_the_inventory_no_longer_has_stays_for_a_while() -> None:
    wanted = gateway.clients(
        [{"name": "web", "key": "new-key-of-web", "streams": 2}, {"name": "batch", "key": "k" * 8}]
    )
    installed = (
        "old-key-of-web web/0/2\nnew-key-of-web web/0/2\nkkkkkkkk batch/0/0\nold-key-of-batch batch/0/0\n#x web/0\n"
    )
    assert gateway.previous_clients(installed, "web", wanted) == [
        {"name": "web", "key": "old-key-of-web", "requests_per_second": 0, "streams": 2}
    ]
    assert gateway.previous_clients("", "web", wanted) == []
    with pytest.raises(SparkfleetError, match="no client is called 'wep'; there are web, batch"):
        gateway.previous_clients(installed, "wep", wanted)


def test_a_bad_key_is_told_by_its_place() -> None:
    assert [client["name"] for client in gateway.clients(["0123456789", {"key": "another-key"}])] == ["key-1", "key-2"]
    with pytest.raises(SparkfleetError, match="entry 2") as error:
        gateway.clients(["0123456789", {"name": "alice", "key": "my secret key"}])
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("ports", "words"),
    [
        ({"gpt_oss_20b": 8081}, "no Spark serves 'gpt-oss-20b'; there are gpt-oss-120b, llama31-8b-fp8"),
        ({"gpt_oss_120b": "web"}, "sparkfleet_gateway_ports.gpt-oss-120b: 'web' is not a TCP port"),
    ],
)
def test_a_port_of_a_model_that_will_not_do(ports: dict[str, Any], words: str) -> None:
    with pytest.raises(SparkfleetError, match=words):
        plan(HOSTS, **ports)


def test_a_port_of_a_model_whose_sparks_are_all_drained_is_left_out() -> None:
    hosts = {**HOSTS, "spark-3": {**HOSTS["spark-3"], "sparkfleet_drained": True}}
    assert [item["ports"] for item in plan(hosts, gpt_oss_120b=8081)["backends"]] == [[]]


def test_a_port_has_one_use() -> None:
    gateway.check_ports({"sparkfleet_gateway_port": 8080, "sparkfleet_gateway_ports.a": "8081"})
    with pytest.raises(SparkfleetError, match=r"ports\.a: 8080 is the port of sparkfleet_gateway_port already"):
        gateway.check_ports({"sparkfleet_gateway_port": 8080, "sparkfleet_gateway_ports.a": "8080"})


def test_each_engine_of_a_spark_is_a_server_of_its_model() -> None:
    engines = [{"model": "llama31-8b-fp8"}, {"model": "gpt-oss-120b", "port": "8100"}]
    made = plan({**HOSTS, "spark-2": {"ansible_host": "192.0.2.12", "sparkfleet_engines": engines}})
    llama, oss = made["backends"]
    own = [{item["name"]: (item["port"], item["meant"]) for item in backend["servers"]} for backend in (llama, oss)]
    assert [found["spark-2"] for found in own] == [(8000, True), (8100, True)]
    with pytest.raises(SparkfleetError, match=r"spark-1: sparkfleet_engines\[0\]: has no model"):
        plan({"spark-1": {"sparkfleet_engines": [{"port": 8000}]}})


def test_the_engines_of_a_model_have_one_key() -> None:
    api_key_enabled = {name: {**values, "sparkfleet_engine_key": "k" * 10} for name, values in HOSTS.items()}
    assert plan(api_key_enabled)["engine_keys"] == {"llama31-8b-fp8": "k" * 10, "gpt-oss-120b": "k" * 10}
    assert plan(HOSTS)["engine_keys"] == {}
    api_key_enabled["spark-3"]["sparkfleet_engine_key"] = "another-one"
    # A gateway has one key to send: to the Sparks of a model, and to others that have the same.
    made = plan(api_key_enabled)
    assert [[item["name"] for item in backend["servers"]] for backend in made["backends"]] == [
        ["spark-1", "spark-2"],
        ["spark-3"],
    ]
    api_key_enabled["spark-2"]["sparkfleet_engine_key"] = "s3cret-of-2"
    with pytest.raises(SparkfleetError, match=r"llama31-8b-fp8 \(spark-1, spark-2\)") as error:
        plan(api_key_enabled)
    assert "s3cret" not in str(error.value)
    api_key_enabled["spark-2"]["sparkfleet_engine_key"] = "two words"
    with pytest.raises(SparkfleetError, match="spark-2: sparkfleet_engine_key has blanks"):
        plan(api_key_enabled)


def test_a_certificate_shows_its_names_as_openssl_prints_them(tmp_path: Path) -> None:
    wanted = gateway.names("gateway-1", "localhost", "192.0.2.5", "192.0.2.4/24", "fd00::4")
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=g", "-keyout", "/dev/null"]
    words += ["-addext", f"subjectAltName={','.join(wanted)}", "-out", str(tmp_path / "pem")]
    subprocess.run(words, check=True, capture_output=True)
    show = ["openssl", "x509", "-noout", "-ext", "subjectAltName", "-in", str(tmp_path / "pem")]
    output = subprocess.run(show, check=True, capture_output=True, text=True).stdout
    assert output.splitlines()[1].strip().split(", ") == gateway.shown(wanted)


PLAY = """
- hosts: localhost
  gather_facts: false
  tasks: [{ansible.builtin.include_tasks: %s}]
  handlers: [{name: Reload HAProxy, ansible.builtin.debug: {msg: reloaded}}]
"""


def certified(folder: Path, *addresses: str) -> str:
    """Play the tasks of the certificate for these addresses; what Ansible sums up."""
    wanted = gateway.names("gateway-1", *addresses)
    variables = {
        **{"gateway_folder": str(folder), "gateway_certificate": "self-signed", "gateway_certificate_names": wanted},
        **{"gateway_certificate_shown": gateway.shown(wanted), "ansible_python_interpreter": sys.executable},
    }
    (folder / "play.yml").write_text(PLAY % (ROOT / "roles/gateway/tasks/certificate.yml"), encoding="utf-8")
    program = str(Path(sys.executable).with_name("ansible-playbook"))
    argv = [program, "-i", "localhost,", "-c", "local", "-e", json.dumps(variables), str(folder / "play.yml")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_certificate_is_made_again_when_it_names_something_else_or_ends(tmp_path: Path) -> None:
    assert "reloaded" in certified(tmp_path, "192.0.2.5", "fd00::4")
    first = (tmp_path / "gateway.pem").read_text(encoding="utf-8")
    modes = {path.name: oct(path.stat().st_mode)[-3:] for path in tmp_path.glob("gateway.pem*")}
    assert modes == {"gateway.pem": "600", "gateway.pem.key": "600"}
    assert "changed=0" in certified(tmp_path, "192.0.2.5", "fd00::4")
    assert "reloaded" in certified(tmp_path, "192.0.2.5", "fd00::4", "192.0.2.4/24")  # a floating address, added later
    second = (tmp_path / "gateway.pem").read_text(encoding="utf-8")
    assert first != second
    words = ["openssl", "req", "-x509", "-key", str(tmp_path / "gateway.pem.key"), "-subj", "/CN=g", "-days", "20"]
    names = gateway.names("gateway-1", "192.0.2.5")
    words += ["-addext", f"subjectAltName={','.join(names)}", "-out", str(tmp_path / "gateway.pem")]
    subprocess.run(words, check=True, capture_output=True)
    assert "reloaded" in certified(tmp_path, "192.0.2.5")


def inventory() -> dict[str, Any]:
    hostvars = {name: dict(values) for name, values in HOSTS.items()}
    hostvars["gateway-1"] = {"ansible_host": "192.0.2.5"}
    groups = {"sparks": list(HOSTS), "gateways": ["gateway-1"]}
    return {"hostvars": hostvars, "groups": groups, "inventory_hostname": "gateway-1"}


def test_the_plan_of_a_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, "gateway_plan")
    given = {"keys": ["a-key-of-a-client"], "port": 8080}
    made = stage.run(inventory(), address="192.0.2.4", **given)
    assert made["_ansible_no_log"] is True and made["changed"] is False
    assert made["client_keys"][0] == {"name": "key-1", "key": given["keys"][0], "requests_per_second": 0, "streams": 0}
    assert made["gateways"] == [{"name": "gateway-1", "address": "192.0.2.5"}]
    assert made["certificate_names"] == ["DNS:gateway-1", "DNS:localhost", "IP:192.0.2.5", "IP:192.0.2.4"]
    assert made["certificate_shown"][2] == "IP Address:192.0.2.5" and made["names"] is True
    assert "gateway-1  drained, left out: spark-4" in stage.printed


def test_models_of_a_rollout_that_did_not_come_to_its_end_keep_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    run = inventory()
    run["groups"]["sparkfleet_rollout"] = ["spark-1", "spark-2"]
    locks = {"3": {"engines": [{"model": "qwen3-8b-fp8"}]}, "4": {"engines": [{"model": "gpt-oss-20b"}]}}
    inspection = {"state": {"releases": {"current": 3, "locks": locks}}}
    run["hostvars"]["spark-1"]["sparkfleet_inspection"] = inspection
    run["hostvars"]["spark-2"].update(sparkfleet_inspection=inspection, sparkfleet_rollout_done=True)
    made = Stage(monkeypatch, "gateway_plan").run(run)
    assert [item["model"] for item in made["backends"]] == ["llama31-8b-fp8", "gpt-oss-120b", "qwen3-8b-fp8"]
    run["hostvars"]["spark-1"]["sparkfleet_rollout_done"] = True
    assert len(Stage(monkeypatch, "gateway_plan").run(run)["backends"]) == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"keys": ["#comment-of-haproxy"]}, "sparkfleet_gateway_keys: entry 1"),
        ({"keys": [12345678]}, "sparkfleet_gateway_keys: entry 1 must be text, not a number: write the key in quotes"),
        ({"keys": ["one,two,three"]}, "sparkfleet_gateway_keys: entry 1"),
        ({"keys": [{"name": "alice"}]}, "sparkfleet_gateway_keys: entry 1 has blanks"),
        (
            {"keys": [{"key": "k" * 8, "stream": 2}]},
            "sparkfleet_gateway_keys: entry 1: unknown key 'stream'; there are name",
        ),
        ({"keys": [{"key": "k" * 8, "name": "a b"}]}, "sparkfleet_gateway_keys: entry 1: its name 'a b' is not valid"),
        ({"keys": [{"key": "k" * 8, "streams": -1}]}, "sparkfleet_gateway_keys: entry 1: streams: -1 is not a whole"),
        ({"keys": ["k" * 8, "k" * 8]}, "sparkfleet_gateway_keys: entry 2 has the key of entry 1"),
        (
            {"keys": [{"key": "k" * 8, "name": "a"}, {"key": "l" * 8, "name": "a", "streams": 2}]},
            "entries 1 and 2 are both called a, but streams is 0 and 2",
        ),
        ({"keys": ["k" * 8], "streams": "many"}, "sparkfleet_gateway_streams: 'many' is not a whole number"),
        ({"requests_per_second": 5}, "sparkfleet_gateway_requests_per_second: 5 is a quota of each client key"),
        ({"paths": ["tokenize"]}, "sparkfleet_gateway_paths: entry 1, 'tokenize', is not a path"),
        ({"paths": ["/ok", "/a/../pause"]}, "sparkfleet_gateway_paths: entry 2"),
        ({"address": "fd00::4"}, "sparkfleet_gateway_address"),
        ({"ports": {"gpt-oss-20b": 8081}}, "no Spark serves 'gpt-oss-20b'"),
        ({"models": ["no-such"]}, "sparkfleet_gateway_models: "),
        ({"port": 8082, "ports": {"gpt-oss-120b": 8082}}, "is the port of sparkfleet_gateway_port already"),
        ({"port": 0}, "sparkfleet_gateway_port: 0 is not a TCP port"),
    ],
)
def test_the_plan_of_a_gateway_that_will_not_do(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], words: str
) -> None:
    with pytest.raises(AnsibleActionFail, match=re.escape(words)):
        Stage(monkeypatch, "gateway_plan").run(inventory(), **given)


def test_two_sparks_that_haproxy_could_not_tell_apart() -> None:
    with pytest.raises(SparkfleetError, match=r"spark\+1 and spark@1 are both called spark_1"):
        plan({"spark@1": {"ansible_host": "192.0.2.1"}, "spark+1": {"ansible_host": "192.0.2.2"}})


def test_a_floating_address_is_one() -> None:
    assert gateway.floating("192.0.2.4/24") == "192.0.2.4/24"
    for wrong in ("gateway.lan", "fd00::4", "192.0.2.4/40"):
        with pytest.raises(SparkfleetError, match="sparkfleet_gateway_address"):
            gateway.floating(wrong)


def test_a_certificate_names_every_way_to_the_gateway() -> None:
    output = gateway.names("gateway-1", "localhost", "192.0.2.5", "192.0.2.4/24", "")
    assert output == ["DNS:gateway-1", "DNS:localhost", "IP:192.0.2.5", "IP:192.0.2.4"]


GATEWAYS = [{"name": "gateway-1", "address": "192.0.2.5"}, {"name": "gateway-2", "address": "192.0.2.6"}]
INTERFACES = {"lo": ["127.0.0.1/8"], "eth0": ["192.0.2.5/24"], "fabric0": ["10.0.0.5/30"]}


def meet(monkeypatch: pytest.MonkeyPatch, own: str = "192.0.2.5", **more: Any) -> dict[str, Any]:
    monkeypatch.setattr(network, "towards", lambda address: own)
    given = {"name": "gateway-1", "gateways": GATEWAYS, "address": "", "interface": "", **more}
    return gateway_network.resolve(given, INTERFACES)


def test_where_gateways_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    found = meet(monkeypatch, address="192.0.2.4")
    assert found == {"own": "192.0.2.5", "interface": "eth0", "address": "192.0.2.4/24", "peers": GATEWAYS}
    assert meet(monkeypatch)["address"] == ""
    other = meet(monkeypatch, address="10.0.0.6/30", interface="fabric0")
    assert (other["own"], other["interface"], other["address"]) == ("10.0.0.5", "fabric0", "10.0.0.6/30")
    alone = meet(monkeypatch, gateways=GATEWAYS[:1], address="192.0.2.4")
    assert alone["peers"] == GATEWAYS[:1]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"address": "198.51.100.4"}, "198.51.100.4 is not in the network of eth0"),
        ({"address": "192.0.2.6"}, "192.0.2.6 is a gateway's own address"),
        ({"interface": "eth9"}, "eth9 has no IPv4 address here; there are lo, eth0, fabric0"),
        ({"own": ""}, "no route to 192.0.2.6"),
        (
            {"gateways": [GATEWAYS[0], {"name": "gateway-2", "address": "127.0.1.1"}]},
            "does not resolve to an IPv4 address here",
        ),
    ],
)
def test_what_a_floating_address_cannot_be(monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        meet(monkeypatch, **more)


def test_where_others_reach_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"spark-1": ["127.0.1.1"], "spark-1.lan": ["192.0.2.11", "198.51.100.1"], "gateway-1": ["192.0.2.5"]}
    monkeypatch.setattr(network, "resolve", lambda name: names.get(name, []))
    monkeypatch.setattr(network, "is_own", lambda address: address in ("127.0.1.1", "192.0.2.11"))
    monkeypatch.setattr(network, "towards", lambda address: "192.0.2.11")
    assert network.reached_at("spark-1.lan", ["gateway-1"]) == ["192.0.2.11"]
    assert network.reached_at("spark-1", ["gateway-1"]) == ["127.0.1.1", "192.0.2.11"]
    assert network.reached_at("spark-9", ["gateway-9"]) == []


def test_addresses_of_this_very_host() -> None:
    assert network.is_own("127.0.0.1") and not network.is_own("192.0.2.1")
    assert network.resolve("127.0.0.1") == ["127.0.0.1"] and network.resolve("no-such-host.invalid") == []
    assert network.towards("127.0.0.1") == "127.0.0.1"


def test_a_floating_address_goes_from_one_gateway_to_the_next(tmp_path: Path) -> None:
    given = {"gateway_address": "192.0.2.4/24", "gateway_interface": "eth0", "gateway_own": "192.0.2.5"}
    text = rendered(plan(HOSTS), tmp_path, "keepalived.conf.j2", gateway_peers=GATEWAYS, **given)
    assert "nopreempt" in text and "priority 200" in text and "192.0.2.4/24 dev eth0" in text
    peers = text.partition("unicast_peer {")[2].partition("}")[0].split()
    assert peers == ["192.0.2.6"]
    given["inventory_hostname"] = "gateway-2"
    second = rendered(plan(HOSTS), tmp_path, "keepalived.conf.j2", gateway_peers=GATEWAYS, **given)
    assert "priority 199" in second


class Haproxy(socketserver.ThreadingUnixStreamServer):
    """A runtime socket of a few lines; sessions end one a inspection."""

    daemon_threads = True

    def __init__(self, path: Path) -> None:
        self.status, self.sessions = "UP", 0
        self.asked: list[str] = []
        super().__init__(str(path), Ask)


class Ask(socketserver.StreamRequestHandler):
    server: Haproxy

    def handle(self) -> None:
        command = self.rfile.readline().decode().strip()
        self.server.asked.append(command)
        if command.startswith("show stat"):
            rows = ["# pxname,svname,scur,status,", f"m,spark-1,{self.server.sessions},{self.server.status},"]
            self.server.sessions = max(self.server.sessions - 1, 0)
            self.wfile.write("\n".join(rows).encode() + b"\n\n")
        elif command.endswith("maint"):
            self.server.status = "MAINT"
            self.wfile.write(b"\n")
        elif "ready" in command:
            self.server.status = "UP"
            self.wfile.write(b"\n")


@pytest.fixture
def haproxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Haproxy]:
    monkeypatch.setattr(haproxy_server, "POLL", 0.01)
    with Haproxy(tmp_path / "admin.sock") as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def change(haproxy: Haproxy, capsys: pytest.CaptureFixture[str], check: bool = False, **more: Any) -> dict[str, Any]:
    given = {"servers": ["spark-1"], "socket": str(haproxy.server_address), "_ansible_check_mode": check, **more}
    with patch_module_args(given), pytest.raises(SystemExit):
        haproxy_server.main()
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_drain_waits_for_the_end_of_what_runs(haproxy: Haproxy, capsys: pytest.CaptureFixture[str]) -> None:
    haproxy.sessions = 4
    result = change(haproxy, capsys, state="drain")
    assert result["changed"] and result["sessions"] == 0 and result["backends"] == ["m"]
    assert haproxy.status == "MAINT" and "set server m/spark-1 state maint" in haproxy.asked
    assert not change(haproxy, capsys, state="drain")["changed"]
    assert change(haproxy, capsys, state="ready")["changed"] and haproxy.status == "UP"
    assert not change(haproxy, capsys, state="ready")["changed"]


def test_drain_in_check_mode_and_with_little_patience(haproxy: Haproxy, capsys: pytest.CaptureFixture[str]) -> None:
    assert change(haproxy, capsys, check=True, state="drain")["changed"] and haproxy.status == "UP"
    haproxy.sessions = 10**6
    result = change(haproxy, capsys, state="drain", timeout=0.1)
    assert result["sessions"] > 0 and "failed" not in result


def test_a_spark_that_the_gateway_does_not_know(haproxy: Haproxy, capsys: pytest.CaptureFixture[str]) -> None:
    result = change(haproxy, capsys, servers=["spark-9"], state="drain")
    assert not result["changed"] and result["backends"] == []


def test_a_gateway_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with patch_module_args({"servers": ["s"], "state": "ready", "socket": "/nowhere.sock"}), pytest.raises(SystemExit):
        haproxy_server.main()
    assert "is the gateway deployed" in json.loads(capsys.readouterr().out)["msg"]


@pytest.mark.parametrize("name", ["\x02a", "a\x1b[2J", "a\nb", "\U00099bb1"])
def test_a_host_s_name_that_cannot_be_seen_is_refused(name: str) -> None:
    with pytest.raises(SparkfleetError, match="cannot be a host's name") as refused:
        gateway.settings({name: {"ansible_host": "192.0.2.1"}})
    assert str(refused.value).isprintable()
