"""The gateway: its plan, its configuration, the server that is drained, the guard's window that it looks through."""

from __future__ import annotations

import http.client
import json
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gateway_network
import haproxy_server
import jinja2
import pytest
import yaml
from ansible.module_utils.sparkfleet_host import network
from ansible.module_utils.sparkfleet_host.guard import Guard, Settings, Window, open_window
from ansible.module_utils.testing import patch_module_args
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar

from sparkfleet import SparkfleetError, gateway

ROOT = Path(__file__).resolve().parents[2]
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
    assert llama["servers"] == [
        {"name": "spark-1", "address": "192.0.2.11", "port": 8000, "check_port": 9109},
        {"name": "spark-2", "address": "spark-2.lan", "port": 8001, "check_port": 9109},
        {"name": "spark-3", "address": "spark-3", "port": 8000, "check_port": 0},
    ]
    assert oss["servers"] == llama["servers"]
    assert made["drained"] == ["spark-4"]
    assert [item["id"] for item in json.loads(made["models"])["data"]] == [llama["repo"], oss["repo"]]


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


def test_a_bad_key_is_told_by_its_place() -> None:
    assert gateway.keys(["0123456789"]) == ["0123456789"]
    with pytest.raises(SparkfleetError, match="entry 2") as error:
        gateway.keys(["0123456789", "my secret key"])
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


def test_the_engines_of_a_model_have_one_key() -> None:
    keyed = {name: {**values, "sparkfleet_engine_key": "k" * 10} for name, values in HOSTS.items()}
    assert plan(keyed)["engine_keys"] == {"llama31-8b-fp8": "k" * 10, "gpt-oss-120b": "k" * 10}
    assert plan(HOSTS)["engine_keys"] == {}
    keyed["spark-3"]["sparkfleet_engine_key"] = "another-one"
    # A gateway has one key to send: to the Sparks of a model, and to others that have the same.
    made = plan(keyed)
    assert [[item["name"] for item in backend["servers"]] for backend in made["backends"]] == [
        ["spark-1", "spark-2"],
        ["spark-3"],
    ]
    keyed["spark-2"]["sparkfleet_engine_key"] = "s3cret-of-2"
    with pytest.raises(SparkfleetError, match=r"llama31-8b-fp8 \(spark-1, spark-2\)") as error:
        plan(keyed)
    assert "s3cret" not in str(error.value)
    keyed["spark-2"]["sparkfleet_engine_key"] = "two words"
    with pytest.raises(SparkfleetError, match="spark-2: sparkfleet_engine_key has blanks"):
        plan(keyed)


def test_a_floating_address_is_one() -> None:
    assert gateway.floating("192.0.2.4/24") == "192.0.2.4/24"
    for wrong in ("gateway.lan", "fd00::4", "192.0.2.4/40"):
        with pytest.raises(SparkfleetError, match="sparkfleet_gateway_address"):
            gateway.floating(wrong)


def test_a_certificate_names_every_way_to_the_gateway() -> None:
    said = gateway.names("gateway-1", "localhost", "192.0.2.5", "192.0.2.4/24", "")
    assert said == ["DNS:gateway-1", "DNS:localhost", "IP:192.0.2.5", "IP:192.0.2.4"]


GATEWAYS = [{"name": "gateway-1", "address": "192.0.2.5"}, {"name": "gateway-2", "address": "192.0.2.6"}]
INTERFACES = {"lo": ["127.0.0.1/8"], "eth0": ["192.0.2.5/24"], "fabric0": ["10.0.0.5/30"]}


def meet(monkeypatch: pytest.MonkeyPatch, own: str = "192.0.2.5", **more: Any) -> dict[str, Any]:
    monkeypatch.setattr(network, "towards", lambda address: own)
    given = {"name": "gateway-1", "gateways": GATEWAYS, "address": "", "interface": "", **more}
    return gateway_network.look(given, INTERFACES)


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
        ({"own": ""}, "no way leads to 192.0.2.6"),
        ({"gateways": [GATEWAYS[0], {"name": "gateway-2", "address": "127.0.1.1"}]}, "stands for no IPv4 address here"),
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


def render(made: dict[str, Any], template: str = "haproxy.cfg.j2", **more: Any) -> str:
    folder = ROOT / "roles" / "gateway"
    values = yaml.safe_load((folder / "defaults" / "main.yml").read_text(encoding="utf-8"))
    values |= {
        "inventory_hostname": "gateway-1",
        "ansible_managed": "",
        "gateway_engine_keys": made["engine_keys"],
        **more,
    }
    options = {"trim_blocks": True, "keep_trailing_newline": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(**options)  # noqa: S701 - no HTML
    text = environment.from_string((folder / "templates" / template).read_text(encoding="utf-8"))
    return text.render(**values, gateway_backends=made["backends"], gateway_models=made["models"])


def test_one_model_takes_everything() -> None:
    text = render(plan({"spark-1": {"ansible_host": "192.0.2.11"}}))
    assert "default_backend llama31-8b-fp8" in text and "json_query" not in text
    assert "server spark-1 192.0.2.11:8000 check port 9109" in text and "uri /ready" in text
    assert "retry-on conn-failure empty-response 503" in text and "option srvtcpka" in text
    assert "on-marked-down" not in text and "option http-buffer-request" in text and "tune.bufsize" in text
    assert "401" not in text and "ssl" not in text and "peers" not in text and "engine_keys" not in text


def test_several_models_are_told_apart() -> None:
    text = render(plan(HOSTS), gateway_keys=["k" * 10], gateway_certificate="self-signed")
    assert "acl path_gpt-oss-120b path_beg /gpt-oss-120b/" in text
    assert "str(gpt-oss-120b) if { var(txn.model) -m str openai/gpt-oss-120b }" in text
    assert "http_auth_bearer -m str -f /etc/haproxy/sparkfleet/keys" in text and "kkkk" not in text
    assert "ssl crt /etc/haproxy/sparkfleet/gateway.pem" in text
    assert "http-check expect string openai/gpt-oss-120b" in text  # no guard there


def test_a_model_by_its_port() -> None:
    text = render(plan(HOSTS, gpt_oss_120b=8081), gateway_certificate="self-signed")
    assert "bind :8081 ssl crt" in text
    assert "http-request set-var(txn.backend) str(gpt-oss-120b) if { dst_port 8081 }" in text


def test_the_engine_s_key_takes_the_place_of_the_client_s() -> None:
    keyed = {name: {**values, "sparkfleet_engine_key": "k" * 10} for name, values in HOSTS.items()}
    text = render(plan(keyed))
    read = '"%[str(gpt-oss-120b),map(/etc/haproxy/sparkfleet/engine_keys)]"'
    assert f"http-request set-header Authorization {read}" in text
    assert f"http-check send meth GET uri /v1/models hdr Authorization {read}" in text  # no guard there
    assert "kkkk" not in text


def test_the_engines_keys_are_lines_of_a_map() -> None:
    """As Ansible makes them of the task."""
    loader = DataLoader()
    tasks = loader.load_from_file(str(ROOT / "roles/gateway/tasks/main.yml"), trusted_as_template=True)
    content = next(task for task in tasks if task["name"] == "Write the keys of engines")["secret_file"]["content"]
    made = Templar(loader, variables={"gateway_engine_keys": {"a": "k1", "b": "k2"}}).template(content)
    assert made.split("\n") == ["a Bearer k1", "b Bearer k2", ""]


def test_gateways_tell_each_other_where_a_session_is() -> None:
    text = render(plan(HOSTS), gateway_peers=GATEWAYS)
    assert "localpeer gateway-1" in text and "    peer gateway-2 192.0.2.6:8405\n" in text
    assert text.count("expire 1h peers gateways") == 2


def test_a_floating_address_goes_from_one_gateway_to_the_next() -> None:
    given = {"gateway_address": "192.0.2.4/24", "gateway_interface": "eth0", "gateway_own": "192.0.2.5"}
    text = render(plan(HOSTS), "keepalived.conf.j2", gateway_peers=GATEWAYS, **given)
    assert "nopreempt" in text and "priority 200" in text and "192.0.2.4/24 dev eth0" in text
    peers = text.partition("unicast_peer {")[2].partition("}")[0].split()
    assert peers == ["192.0.2.6"]
    second = render(plan(HOSTS), "keepalived.conf.j2", gateway_peers=GATEWAYS, inventory_hostname="gateway-2", **given)
    assert "priority 199" in second


class Haproxy(socketserver.ThreadingUnixStreamServer):
    """A runtime socket of a few lines; sessions end one a look."""

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
        elif command.endswith("ready"):
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


@pytest.fixture
def window() -> Iterator[Window]:
    """The guard's, on a port that was free."""
    said: list[str] = []
    watcher: Any = SimpleNamespace(
        guard=Guard(Settings()), looked_at=time.monotonic(), say=said.append, said=said, model="org/served"
    )
    with Window(0, watcher, "127.0.0.1") as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def get(window: Window, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", window.server_address[1], timeout=5)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_ready_is_what_the_guard_knows(window: Window) -> None:
    window.watcher.guard.engine = "serving"
    assert get(window, "/ready") == (200, "serving org/served\n")
    assert get(window, "/ready?model=org/served") == get(window, "/ready?model=org%2Fserved")
    assert get(window, "/ready?model=org/served")[0] == 200
    for query in ("model=org/other", "model=", "model=org/served&model=org/other"):
        assert get(window, f"/ready?{query}")[0] == 503
    assert get(window, "/ready?" + "&".join(f"a{n}=1" for n in range(20)))[0] == 400
    window.watcher.guard.engine = "wedged"
    assert get(window, "/ready") == (503, "wedged\n")
    assert get(window, "/ready?model=org/served") == (503, "wedged\n")
    window.watcher.guard.engine, window.watcher.looked_at = "serving", time.monotonic() - 3600
    assert get(window, "/ready") == (503, "guard-stuck\n")
    assert "sparkfleet_engine_up 1" in get(window, "/metrics")[1]
    assert get(window, "/else")[0] == 404


@pytest.mark.parametrize(("error", "said"), [(ConnectionResetError(), False), (KeyError("x"), True)])
def test_who_hangs_up_is_no_news(
    window: Window, error: Exception, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        raise error
    except type(error):
        window.handle_error(None, ("192.0.2.5", 1))
    assert ("Traceback" in capsys.readouterr().err) is said


def test_a_port_that_is_taken_is_said(window: Window) -> None:
    watcher: Any = window.watcher
    taken = Window(0, watcher)
    assert open_window(watcher, taken.server_address[1]) is False
    assert "Address already in use" in watcher.said[0]
    taken.server_close()
