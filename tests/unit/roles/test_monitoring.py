"""Monitoring: its plan, and what the distribution's programs make of what the role writes."""

from __future__ import annotations

import contextlib
import http.server
import json
import operator
import os
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template
from ansible_collections.sparkfleet.dgx.plugins.modules import alert_test
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator import sink
from sparkfleet_host import audit, guard, monitoring, sensors

from sparkfleet import SparkfleetError
from sparkfleet.fleet import gateway, receivers
from sparkfleet.monitoring import page, rules, targets
from tests.unit import ROOT
from tests.unit.roles.haproxy import Spark, free_port, running

ROLE = ROOT / "roles" / "monitoring"
HOSTS: dict[str, dict[str, Any]] = {
    "spark-1": {"ansible_host": "192.0.2.11"},
    "spark-2": {"ansible_host": "2001:db8::2", "sparkfleet_port": 8001, "sparkfleet_guard_port": 0},
    "spark-3": {
        "ansible_host": "192.0.2.13",
        "sparkfleet_guard": False,
        "sparkfleet_engines": [{"model": "llama31-8b-fp8"}, {"model": "qwen3-8b-fp8", "port": 8100}],
    },
    "gw-1": {"ansible_host": "192.0.2.1"},
    "gw-2": {"ansible_host": "192.0.2.2"},
    "watch": {"ansible_host": "192.0.2.9"},
}
SPARKS = ["spark-1", "spark-2", "spark-3"]
NOBODY = dict.fromkeys(
    ("email", "email_from", "smtp", "smtp_user", "smtp_password", "webhook", "webhook_token", "ntfy", "ntfy_token"), ""
)


MAIL = {"email": "a@example.org", "email_from": "s@example.org", "smtp": "mail.example.org:25"}


def program(name: str) -> str:
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/bin")
    assert found, f"{name} is needed: apt-get install prometheus prometheus-alertmanager (scripts/test does it)"
    return found


def at(found: Mapping[str, Any], job: str) -> list[str]:
    return [address for item in found["targets"][job] for address in item["targets"]]


# -- the plan ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "where"),
    [
        ({"sparks": SPARKS}, "spark-1"),
        ({"sparks": SPARKS, "gateways": ["gw-1", "gw-2"]}, "gw-1"),
        ({"sparks": SPARKS, "gateways": ["spark-2"], "monitors": ["watch"]}, "watch"),
    ],
)
def test_where_the_monitor_is(groups: dict[str, list[str]], where: str) -> None:
    assert targets.monitor(groups) == targets.plan(groups, HOSTS)["monitor"] == where


def test_targets_are_those_of_the_inventory() -> None:
    found = targets.plan({"sparks": SPARKS, "gateways": ["gw-1", "gw-2"]}, HOSTS)
    assert at(found, "engine") == ["192.0.2.11:8000", "[2001:db8::2]:8001", "192.0.2.13:8000", "192.0.2.13:8100"]
    assert at(found, "guard") == ["192.0.2.11:9109"]
    assert at(found, "gateway") == ["127.0.0.1:8404"]
    assert found["unreached"] == [
        "gw-2: HAProxy's metrics listen on loopback alone, and are not scraped; sparkfleet_gateway_statistics_listen "
        "opens them"
    ]
    assert sorted(item["labels"]["host"] for item in found["targets"]["node"]) == ["gw-1", "gw-2", *SPARKS]


def test_how_many_sparks_are_meant_to_serve_each_model() -> None:
    groups = {"sparks": SPARKS, "gateways": ["gw-1", "gw-2"]}
    # Two have the default, one has two engines.
    assert targets.plan(groups, HOSTS)["meant"] == {"llama31-8b-fp8": 3, "qwen3-8b-fp8": 1}
    hosts = {
        **HOSTS,
        "spark-1": {**HOSTS["spark-1"], "sparkfleet_model": "gpt-oss-20b"},
        "spark-2": {**HOSTS["spark-2"], "sparkfleet_drained": "yes", "sparkfleet_model": "gpt-oss-20b"},
        "gw-2": {**HOSTS["gw-2"], "sparkfleet_gateway_models": ["gpt-oss-120b"]},
    }
    found = targets.plan(groups, hosts)["meant"]
    assert found == {"gpt-oss-20b": 1, "llama31-8b-fp8": 1, "qwen3-8b-fp8": 1, "gpt-oss-120b": 0}
    # As the gateway has them.
    made = gateway.plan(gateway.settings({name: hosts[name] for name in SPARKS}), None, ["gpt-oss-120b"])
    counts = {item["name"]: sum(server["meant"] for server in item["servers"]) for item in made["backends"]}
    assert counts == found
    assert targets.plan({"sparks": SPARKS}, hosts)["meant"] == {}


@pytest.mark.parametrize("meant", [{}, {"llama31-8b-fp8": 2, "123": 0}])
def test_prometheus_takes_the_rules_of_an_inventory(meant: dict[str, int], tmp_path: Path) -> None:
    file = tmp_path / "inventory.yml"
    file.write_text(rules.inventory_file(meant), encoding="utf-8")
    done = subprocess.run([program("promtool"), "check", "rules", file], capture_output=True, text=True, check=False)
    assert f"{len(meant)} rules found" in done.stdout, done.stdout + done.stderr


def test_a_monitor_reaches_itself_on_loopback() -> None:
    assert at(targets.plan({"sparks": ["spark-1"]}, HOSTS), "engine") == ["127.0.0.1:8000"]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"sparkfleet_port": 0}, "spark-1: sparkfleet_port"),
        ({"sparkfleet_node_exporter_port": "x"}, "spark-1: sparkfleet_node_exporter_port 'x' is not a TCP port"),
        ({"ansible_host": "a b"}, "spark-1: sparkfleet_address 'a b' is neither a name nor an address"),
    ],
)
def test_a_bad_value_is_named_with_its_host(variables: dict[str, Any], words: str) -> None:
    with pytest.raises(SparkfleetError) as error:
        targets.plan({"sparks": ["spark-1"], "monitors": ["watch"]}, {**HOSTS, "spark-1": variables})
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"email": "me"}, "sparkfleet_alert_email: 'me' is not an address of mail"),
        ({"email": "a@b.c"}, "sparkfleet_alert_email_from: '' is not an address of mail"),
        ({"email": "a@b.c", "email_from": "a@b.c", "smtp": "mail"}, "sparkfleet_alert_smtp: 'mail' is not HOST:PORT"),
        ({"smtp": "mail:25"}, "sparkfleet_alert_email: missing"),
        ({"webhook": "ftp://secret-in-it"}, "sparkfleet_alert_webhook: is not an address that begins with http"),
        ({"webhook_token": "s"}, "sparkfleet_alert_webhook_token: is for sparkfleet_alert_webhook"),
        ({"ntfy_token": "s"}, "sparkfleet_alert_ntfy_token: is for sparkfleet_alert_ntfy"),
        ({"smtp_password": "secret"}, "sparkfleet_alert_email: missing, to whom mail goes; sparkfleet_alert_smtp_pass"),
        ({**MAIL, "smtp_user": "u"}, "sparkfleet_alert_smtp_password: missing; sparkfleet_alert_smtp_user has no use"),
        ({**MAIL, "smtp_password": "secret"}, "sparkfleet_alert_smtp_user: missing; sparkfleet_alert_smtp_password"),
        *(
            ({**MAIL, "smtp": smtp}, f"sparkfleet_alert_smtp: '{smtp}' is not HOST:PORT of a mail server")
            for smtp in ("::1:25", "fe80::1:587", "[::1]", "[mail]:25", "mail", "a b:25", "[fe80::1%eth0]:25")
        ),
        ({**MAIL, "smtp": "mail:0"}, "sparkfleet_alert_smtp: '0' is not a TCP port"),
        *(
            ({name: f"https{rest}", f"{name}_token": "secret"}, f"sparkfleet_alert_{name}: {words}")
            for name in ("webhook", "ntfy")
            for rest, words in {
                "://%zz/secret": "has neither a name nor an address of a host",
                "://a:port/secret": "has neither a name nor an address of a host",
                "://[::1/secret": "has neither a name nor an address of a host",
                ":///secret": "has neither a name nor an address of a host",
                "://:80/secret": "has neither a name nor an address of a host",
                "://?secret": "has neither a name nor an address of a host",
                "://a:99999/secret": "'99999' is not a TCP port",
                "://host/secret%": "has a character that an address has only as %XX",
                "://host/secret#%zz": "has a character that an address has only as %XX",
                "://secret%zz@host/": "has a character that an address has only as %XX",
                '://"@host/secret': "has a character that an address has only as %XX",
                "://host/secret b": "is not an address that begins with http",
            }.items()
        ),
        ({"webhook": "https://host/x", "webhook_token": "sec\nret"}, "sparkfleet_alert_webhook_token: has a character"),
        ({"ntfy": "https://host/secret#x"}, "sparkfleet_alert_ntfy: has a part after #"),
        ({"ntfy": "https://host/?a=secret"}, "sparkfleet_alert_ntfy: has no topic after the host"),
    ],
)
def test_a_bad_receiver_is_named_without_its_secret(given: dict[str, str], words: str) -> None:
    with pytest.raises(SparkfleetError) as error:
        receivers.configuration({**NOBODY, **given})
    assert str(error.value).startswith(words) and "secret" not in str(error.value)


def test_the_lists_of_units_are_the_same() -> None:
    own = yaml.safe_load((ROLE / "vars" / "main.yml").read_text(encoding="utf-8"))
    assert own["monitoring_units"] == list(monitoring.UNITS) and own["monitoring_folders"] == list(monitoring.FOLDERS)
    assert {f"{name}.j2" for name in monitoring.UNITS} <= {path.name for path in (ROLE / "templates").iterdir()}


# -- what the programs make of it --------------------------------------------------------------------------------------


def rendered(template: str, **values: Any) -> str:
    """What Ansible makes of a template of the role."""
    loader = DataLoader()
    loader.set_basedir(str(ROLE / "tasks"))
    parts = (ROLE / "vars", ROLE / "defaults", ROOT / "roles" / "sparkfleet" / "defaults")
    known: dict[str, Any] = {"inventory_hostname": "spark-1", "ansible_managed": ""}
    for part in reversed(parts):
        known |= loader.load_from_file(str(part / "main.yml"), trusted_as_template=True)
    source = trust_as_template(f"{{{{ lookup('template', '{ROLE / 'templates' / template}') }}}}")
    return str(Templar(loader, variables={**known, **values}).template(source))


EVERYONE = {
    **NOBODY,
    **{"email": "a@example.org, b@example.org", "email_from": "s@example.org", "smtp": "mail.example.org:587"},
    **{
        "smtp_user": "u",
        "smtp_password": "p\"'{{ x }}",
        "webhook": "https://h.example.org/a?b=1",
        "webhook_token": "t",
    },
    **{"ntfy": "https://ntfy.example.org/sparks", "ntfy_token": "tk"},
}


def refused(text: str, folder: Path) -> str:
    """What amtool says against a configuration; "" for nothing."""
    file = folder / "alertmanager.yml"
    file.write_text(text, encoding="utf-8")
    done = subprocess.run([program("amtool"), "check-config", file], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.parametrize(
    "given",
    [
        NOBODY,
        EVERYONE,
        {**NOBODY, "ntfy": "http://192.0.2.3/x?y=1"},
        {**NOBODY, **MAIL, "smtp": "[2001:db8::1]:587"},
        {**NOBODY, "webhook": "https://user:pass%20word@[2001:db8::1]:8443/a%2Fb?x=100%#part"},
        {**NOBODY, "webhook": "http://h"},
    ],
)
def test_alertmanager_takes_its_configuration(given: dict[str, str], tmp_path: Path) -> None:
    text = rendered("alertmanager.yml.j2", monitoring_receivers=receivers.configuration(given))
    assert refused(text, tmp_path) == ""
    (receiver,) = yaml.safe_load(text)["receivers"]
    if given["smtp_password"]:
        assert receiver["email_configs"][0]["auth_password"] == given["smtp_password"]
    if given["ntfy"]:
        assert receiver["webhook_configs"][-1]["url"].endswith("template=alertmanager")


PARTS = st.sampled_from(
    [
        *"/:?#[]@%&=.-_{}\"'\\|^`<>;,!*+ ",
        "http://",
        "https://",
        "//",
        "::1",
        "[::1]",
        "%41",
        "%zz",
        ":80",
        ":x",
        "h",
        "a.b",
        "1",
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(PARTS, max_size=6).map("".join), st.sampled_from(["webhook", "ntfy", "smtp"]))
def test_what_is_not_refused_alertmanager_takes(tmp_path_factory: pytest.TempPathFactory, text: str, name: str) -> None:
    values = {**MAIL, name: text} if name == "smtp" else {name: f"http://{text}"}
    try:
        made = receivers.configuration({**NOBODY, **values})
    except SparkfleetError as error:
        assert "\n" not in str(error) and str(error).startswith("sparkfleet_alert_")
        return
    receiver = {"name": "owner", **made}
    config = json.dumps({"route": {"receiver": "owner"}, "receivers": [receiver]})
    assert refused(config, tmp_path_factory.getbasetemp()) == ""


def test_node_exporter_listens_where_it_is_told() -> None:
    text = rendered("sparkfleet-node-exporter.service.j2", monitoring_addresses=["192.0.2.11", "2001:db8::1"])
    listens = [word.partition("=")[2] for word in text.split() if word.startswith("--web.listen-address")]
    assert listens == ["127.0.0.1:9113", "192.0.2.11:9113", "[2001:db8::1]:9113"]
    assert "textfile" not in text
    assert "--collector.textfile.directory=/run/sparkfleet-sensors" in rendered(
        "sparkfleet-node-exporter.service.j2", monitoring_spark=True
    )


@pytest.mark.parametrize("name", monitoring.UNITS)
def test_an_audit_knows_a_unit_that_was_edited(name: str, tmp_path: Path) -> None:
    text = rendered(f"{name}.j2", monitoring_program="0" * 64)
    unit = tmp_path / name
    unit.write_text(text, encoding="utf-8")
    assert text.startswith("# Made by Sparkfleet.") and not audit.edited(unit)
    unit.write_text(text.replace("User=prometheus", "User=root"), encoding="utf-8")
    assert audit.edited(unit)


ENGINE = """# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="org/m"} 3.0
vllm:kv_cache_usage_perc{engine="0",model_name="org/m"} 0.25
python_info{version="3"} 1
"""
#: vLLM describes its cache in 41 labels.
ENGINE += "vllm:cache_config_info{" + ",".join(f'option_{number}="x"' for number in range(41)) + "} 1\n"
GUARD = guard.metrics(
    {
        **{"at": time.time(), "release": 2},
        "engines": {
            "vllm-m": {
                **{"engine": "serving", "restarts_total": {"crash": 1}, "given_up": None, "slow": False},
                "canary": {"at": 1.0, "ok": True, "seconds": 0.1},
            }
        },
    }
)


@contextlib.contextmanager
def exporter(text: str) -> Iterator[str]:
    """Something to scrape; its address."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *words: Any) -> None:
            """Nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def prometheus(folder: Path, found: Mapping[str, Sequence[str]]) -> Iterator[Any]:
    """Prometheus itself with the role's configuration, faster; a function that asks it."""
    (folder / "rules").mkdir()
    (folder / "targets").mkdir()
    for name in ("recording", "alerts"):
        shutil.copy(ROLE / "files" / f"{name}.yml", folder / "rules")
    for job, addresses in found.items():
        group = [{"targets": [address], "labels": {"host": "spark-1"}} for address in addresses]
        (folder / "targets" / f"{job}.json").write_text(json.dumps(group), encoding="utf-8")
    port = free_port()
    text = rendered("prometheus.yml.j2", monitoring_folder=str(folder), sparkfleet_prometheus_port=port)
    text = text.replace("interval: 15s", "interval: 500ms").replace("timeout: 10s", "timeout: 500ms")
    (folder / "prometheus.yml").write_text(text, encoding="utf-8")
    argv = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    process = subprocess.Popen(
        [program("prometheus"), *argv, f"--web.listen-address=127.0.0.1:{port}"],
        stdout=subprocess.DEVNULL,
        stderr=(folder / "log").open("w"),
    )

    def ask(expr: str, seconds: float = 20) -> list[dict[str, Any]]:
        """An instant query, again until it has an answer."""
        end, answer = time.monotonic() + seconds, []
        url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': expr})}"
        while not answer and time.monotonic() < end:
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as got:
                answer = json.load(got)["data"]["result"]
            time.sleep(0.2)
        return list(answer)

    try:
        yield ask
    finally:
        process.terminate()
        process.wait(20)


def labels(sample: Mapping[str, Any]) -> dict[str, str]:
    return {key: value for key, value in sample["metric"].items() if key not in ("instance", "__name__", "job")}


def test_prometheus_takes_what_the_role_writes_and_joins_its_labels(tmp_path: Path) -> None:
    gpu = sensors.metrics(sensors.gpus("41, 4.52, 208, 0, 0x0000000000000020\n"), {"31": time.time()})
    with exporter(ENGINE) as engine, exporter(GUARD) as watch, exporter(gpu) as node:
        found = {"engine": [engine], "guard": [watch], "node": [node], "gateway": []}
        with prometheus(tmp_path, found) as ask:
            (running,) = ask("sparkfleet:requests_running")
            assert labels(running) == {"host": "spark-1", "model": "org/m"} and running["value"][1] == "3"
            (served,) = ask("sparkfleet_engine_up")
            assert labels(served) == {"host": "spark-1", "service": "vllm-m"}
            # Of an engine nothing is taken but vLLM's own.
            assert ask('count({job="engine",__name__=~"python_.*"})', 0.3) == []
            firing = {item["metric"]["alertname"] for item in ask('ALERTS{alertname="SparkfleetGpuXid"}')}
            assert firing == {"SparkfleetGpuXid"}
            (throttled,) = ask("sparkfleet_gpu_throttled == 1")
            assert labels(throttled) == {"host": "spark-1", "gpu": "0", "reason": "sw-thermal-slowdown"}


class Routes:
    """Alertmanager with the role's configuration, and a mail server and a web server that keep what they are sent."""

    def __init__(self, folder: Path, given: Mapping[str, str]) -> None:
        self.kept = folder / "kept"
        self.web, self.mail = sink.serve(self.kept, 0, 0)
        self.url = f"http://127.0.0.1:{self.web.server_address[1]}"
        smtp = f"127.0.0.1:{self.mail.server_address[1]}"
        filled = {key: text.format(url=self.url, smtp=smtp) for key, text in given.items()}
        config = folder / "alertmanager.yml"
        told = receivers.configuration({**NOBODY, **filled})
        config.write_text(rendered("alertmanager.yml.j2", monitoring_receivers=told), encoding="utf-8")
        self.port = free_port()
        words = [f"--config.file={config}", f"--storage.path={folder}/data", "--cluster.listen-address="]
        self.process = subprocess.Popen(
            [program("prometheus-alertmanager"), *words, f"--web.listen-address=127.0.0.1:{self.port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                alert_test.ask(self.port, "/-/ready")
                return
            time.sleep(0.1)
        raise AssertionError("Alertmanager does not start")

    def messages(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in self.kept.read_text().splitlines()] if self.kept.exists() else []

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(10)
        for server in (self.web, self.mail):
            server.shutdown()
            server.server_close()


def test_an_alert_arrives_by_each_way(tmp_path: Path) -> None:
    """At a mail server, a webhook and a topic of ntfy, all real programs but what is behind them."""
    given = {"email": "ops@example.org", "email_from": "sparks@example.org", "smtp": "{smtp}"}
    given |= {"webhook": "{url}/hook", "webhook_token": "a-token-of-the-hook", "ntfy": "{url}/topic"}
    routes = Routes(tmp_path, given)
    try:
        assert alert_test.send(routes.port, "ann@desk", 20.0) == (["email", "webhook"], [])
        found = {message["way"]: message for message in routes.messages()}
    finally:
        routes.end()
    assert {*found} == {"mail", "/hook", "ntfy"}
    assert json.loads(found["/hook"]["body"])["alerts"][0]["labels"]["alertname"] == "SparkfleetTest"
    assert found["/hook"]["key"] == "Bearer a-token-of-the-hook" and found["ntfy"]["key"] == ""
    mail = found["mail"]["body"]
    assert "To: ops@example.org" in mail and "From: sparks@example.org" in mail and "SparkfleetTest" in mail


def test_an_engine_that_is_down_hides_its_own_warnings_alone(tmp_path: Path) -> None:
    def fired(alertname: str, severity: str, host: str = "spark-1", **more: str) -> dict[str, Any]:
        return {"labels": {"alertname": alertname, "severity": severity, "host": host, **more}}

    down, also = "vllm-a", "vllm-b"
    alerts = [fired("SparkfleetEngineDown", "critical", service=down)]
    # Without a guard there is no service.
    alerts.append(fired("SparkfleetEngineDown", "critical", host="spark-2", instance="spark-2:8000"))
    hidden = [
        fired(name, "warning", service=down)
        for name in ("SparkfleetEngineRestarts", "SparkfleetEngineStartSlow", "SparkfleetSlowEngine")
    ]
    seen = [fired(alert["labels"]["alertname"], "warning", service=also) for alert in hidden]
    for host in ("spark-1", "spark-2"):
        for name in ("SparkfleetEngineStuck", "SparkfleetQueueing", "SparkfleetSlowFirstToken"):
            seen.append(fired(name, "warning", host=host, model="o/b"))
    seen.append(fired("SparkfleetSlowEngine", "warning", host="spark-3", service=down))
    routes = Routes(tmp_path, NOBODY)
    try:
        alert_test.ask(routes.port, "/api/v2/alerts", [*alerts, *hidden, *seen])
        found = json.loads(alert_test.ask(routes.port, "/api/v2/alerts"))
    finally:
        routes.end()
    key = operator.itemgetter("alertname", "host")
    suppressed = [item["labels"] for item in found if item["status"]["inhibitedBy"]]
    assert len(found) == len(alerts) + len(hidden) + len(seen)
    assert sorted(suppressed, key=key) == sorted((alert["labels"] for alert in hidden), key=key)


def test_a_password_is_not_sent_without_tls(tmp_path: Path) -> None:
    given = {"email": "ops@example.org", "email_from": "sparks@example.org", "smtp": "{smtp}"}
    given |= {"smtp_user": "sparks", "smtp_password": "a-password-of-mail"}
    routes = Routes(tmp_path, given)
    try:
        assert alert_test.send(routes.port, "", 3.0) == ([], ["email"])
        assert routes.messages() == []
    finally:
        routes.end()


#: What vLLM 0.32 calls what the page is made of.
SERVING = (
    ENGINE
    + """# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="org/m"} 1.0
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="org/m"} 500.0
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.1",model_name="org/m"} 7.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="org/m"} 9.0
"""
)
MEMORY = "node_memory_MemTotal_bytes 1.28e+11\nnode_memory_MemAvailable_bytes 9e+09\n"


def test_every_expression_of_the_page_has_an_answer(tmp_path: Path) -> None:
    """Of Prometheus with the role's configuration and rules, before HAProxy, the guard's and the sensors' own text."""
    gpu = sensors.metrics(sensors.gpus("41, 4.52, 208, 0, 0x0000000000000020\n"), {})
    spark = Spark("spark-1")
    place = {"ansible_host": "127.0.0.1", "sparkfleet_port": spark.port, "sparkfleet_guard_port": spark.port}
    hosts = {"spark-1": {**place, "sparkfleet_model": "llama31-8b-fp8"}}
    (tmp_path / "gateway").mkdir()
    (tmp_path / "prometheus").mkdir()
    try:
        with (
            running(tmp_path / "gateway", hosts) as gateway,
            exporter(SERVING) as engine,
            exporter(GUARD) as watch,
            exporter(gpu + MEMORY) as node,
        ):
            found = {"engine": [engine], "guard": [watch], "node": [node]}
            found["gateway"] = [f"127.0.0.1:{gateway.statistics}"]
            with prometheus(tmp_path / "prometheus", found) as ask:
                answers = {name: ask(expr) for name, expr in page.expressions().items()}
    finally:
        spark.close()
    assert [name for name, answer in answers.items() if not answer] == []
    # By host where the page says so, and with the labels that it reads.
    for query in page.QUERIES:
        given = {
            frozenset(sample["metric"]) - {"__name__", "job", "instance"}
            for sample in answers[f"status page: {query.name}"]
        }
        wanted = {"state": {"host", "service", "state"}, "gateway": {"host", "proxy"}}.get(query.name)
        wanted = wanted or ({"host"} if "by (host)" in query.expr or query.name == "memory_free" else None)
        wanted = wanted or ({"model"} if "by (model)" in query.expr else set())
        assert given == {frozenset(wanted)}, query.name
