"""The simulated world's pure parts: stand-ins, inventory, files of a world, and what it leaves on the machine."""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import docker as docker_sdk
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from simulator import __main__ as verbs
from simulator import docker_host, images, keys, matrix, shell, world
from simulator.world import World

from sparkfleet.planning import memory_plan, preflight, variables
from sparkfleet.planning.target import EngineSettings, Settings, Target
from tests.unit import ROOT

ROOTFS = ROOT / "simulator" / "rootfs"
SMI = ROOTFS / "spark/usr/bin/nvidia-smi"
CTK = ROOTFS / "toolkit/usr/bin/nvidia-ctk"


def tool(file: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, file, *arguments], capture_output=True, text=True, check=False)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for worlds, also for child processes."""
    folder = tmp_path / "home"
    monkeypatch.setenv("SPARKFLEET_SIM_HOME", str(folder))
    for name in ("SPARKFLEET_WORLD", "SPARKFLEET_WORLD_MAY_BE_DOWN", "DOCKER_HOST"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def printed() -> list[str]:
    return []


# -- NVIDIA's tools ---------------------------------------------------------------------------------------------


def test_each_model_of_the_hub_has_a_card_and_they_fit_a_spark_together() -> None:
    cards = ROOT / "simulator" / "cards"
    engines = [
        EngineSettings("llama31-8b-fp8", arguments={"gpu_memory_utilization": 0.4}),
        EngineSettings(str(cards / "smollm2-135m.yml"), port=8001),
        EngineSettings(str(cards / "all-minilm-l6-v2.yml"), port=8002),
    ]
    goal = Target.of(Settings(engines=engines))
    assert {engine.card.repo for engine in goal.engines} == set(world.REPOSITORIES)
    total = memory_plan.USUAL_TOTAL_GIB
    plans = [made for _, made in preflight.memory_plans(goal, total, total - memory_plan.USUAL_HOST_GIB)]
    assert all(isinstance(made, memory_plan.Plan) and made.fits for made in plans), plans


def test_stand_ins_can_be_run() -> None:
    files = [
        SMI,
        *(ROOTFS / "toolkit/usr/bin").iterdir(),
        ROOTFS / "spark/usr/local/lib/sparkfleet-sim/bin/runc",
    ]
    assert len(files) == 5
    for file in files:
        assert os.access(file, os.X_OK), file
        assert file.read_bytes().startswith(b"#!/")
    assert subprocess.run([ROOTFS / "toolkit/usr/bin/nvidia-container-runtime-hook"], check=False).returncode == 0


def test_nvidia_smi_plain_and_list() -> None:
    plain = tool(SMI)
    assert plain.returncode == 0 and "NVIDIA GB10" in plain.stdout and "Driver Version: 580.142" in plain.stdout
    assert "Not Supported" in plain.stdout
    assert re.fullmatch(r"GPU 0: NVIDIA GB10 \(UUID: GPU-[^)]+\)\n", tool(SMI, "-L").stdout)


@pytest.mark.parametrize(
    ("form", "lines"),
    [
        ("csv,noheader", ["NVIDIA GB10, 580.142, 12.1, [N/A], 0 %, 4.52 W"]),
        ("csv,noheader,nounits", ["NVIDIA GB10, 580.142, 12.1, [N/A], 0, 4.52"]),
        (
            "csv",
            [
                "name, driver_version, compute_cap, memory.total, utilization.gpu, power.draw",
                "NVIDIA GB10, 580.142, 12.1, [N/A], 0 %, 4.52 W",
            ],
        ),
    ],
)
def test_nvidia_smi_query(form: str, lines: list[str]) -> None:
    fields = "name,driver_version,compute_cap,memory.total,utilization.gpu,power.draw"
    assert tool(SMI, f"--query-gpu={fields}", f"--format={form}").stdout.splitlines() == lines


def test_nvidia_smi_has_what_is_asked_of_a_spark() -> None:
    fields = "index,uuid,memory.used,memory.free,temperature.gpu"
    answer = tool(SMI, f"--query-gpu={fields}", "--format=csv,noheader")
    assert answer.returncode == 0
    assert re.fullmatch(r"0, GPU-\S+, \[N/A\], \[N/A\], \d+\n", answer.stdout)


def test_nvidia_smi_refuses_an_unknown_field() -> None:
    answer = tool(SMI, "--query-gpu=name,colour", "--format=csv,noheader")
    assert answer.returncode == 2 and 'Field "colour"' in answer.stderr and answer.stdout == ""


def test_nvidia_ctk_version() -> None:
    assert "NVIDIA Container Toolkit CLI version 1.19.0" in tool(CTK, "--version").stdout


def test_nvidia_ctk_merges(tmp_path: Path) -> None:
    config = tmp_path / "docker" / "daemon.json"
    configure = ("runtime", "configure", "--runtime=docker", f"--config={config}")

    shown = tool(CTK, *configure, "--dry-run")
    assert json.loads(shown.stdout)["runtimes"]["nvidia"] == {"args": [], "path": "nvidia-container-runtime"}
    assert not config.exists()

    made = tool(CTK, *configure)
    assert made.returncode == 0 and str(config) in made.stderr
    assert json.loads(config.read_text()) == json.loads(shown.stdout)

    before = {"log-driver": "journald", "runtimes": {"crun": {"path": "/usr/bin/crun"}}, "dns": ["192.0.2.1"]}
    config.write_text(json.dumps(before))
    tool(CTK, *configure, "--set-as-default")
    after = json.loads(config.read_text())
    assert after.pop("default-runtime") == "nvidia"
    assert after["runtimes"].pop("nvidia")["path"] == "nvidia-container-runtime"
    assert after == before

    text = config.read_text()
    tool(CTK, *configure)
    assert config.read_text() == text


def test_nvidia_ctk_reads_an_empty_file(tmp_path: Path) -> None:
    config = tmp_path / "daemon.json"
    config.write_text("\n")
    assert tool(CTK, "runtime", "configure", f"--config={config}").returncode == 0
    assert list(json.loads(config.read_text())) == ["runtimes"]


def test_nvidia_ctk_refuses_another_runtime(tmp_path: Path) -> None:
    config = tmp_path / "daemon.json"
    answer = tool(CTK, "runtime", "configure", "--runtime=containerd", f"--config={config}")
    assert answer.returncode == 2 and "containerd" in answer.stderr and not config.exists()


@pytest.mark.parametrize("verb", [["create", "--bundle"], ["run", "-b"], ["state"]])
def test_runc_drops_the_memlock_limit_alone(verb: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [
        {"type": "RLIMIT_MEMLOCK", "hard": 1, "soft": 1},
        {"type": "RLIMIT_STACK", "hard": 2, "soft": 2},
    ]
    spec = {"process": {"args": ["true"], "rlimits": limits}, "root": {"path": "rootfs"}}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(spec))
    started: list[list[str]] = []
    words = [*verb, str(tmp_path), "id"]
    monkeypatch.setattr(os, "execv", lambda path, argv: started.append(argv))
    monkeypatch.setattr(sys, "argv", ["runc", *words])
    runpy.run_path(str(ROOTFS / "spark/usr/local/lib/sparkfleet-sim/bin/runc"))
    assert started[0][1:] == words and started[0][0].endswith("bin/runc")
    expected = limits if verb == ["state"] else limits[1:]
    assert json.loads(config.read_text()) == {**spec, "process": {"args": ["true"], "rlimits": expected}}


@pytest.mark.parametrize("service", ["docker", "containerd"])
def test_the_runc_above_comes_first(service: str) -> None:
    text = (ROOTFS / f"spark/etc/systemd/system/{service}.service.d/simulator.conf").read_text()
    assert "Environment=PATH=/usr/local/lib/sparkfleet-sim/bin:" in text


def test_memory_is_a_sparks() -> None:
    known = {line.split()[0]: int(line.split()[1]) for line in world.MEMINFO.splitlines()}
    assert 119.6 < known["MemTotal:"] / 2**20 < 119.8
    assert known["MemFree:"] <= known["MemAvailable:"] < known["MemTotal:"]
    assert 114.9 < known["MemAvailable:"] / 2**20 < 115.5


# -- inventory ----------------------------------------------------------------------------------------------------


def write_world(name: str = "demo") -> World:
    made = World(name)
    sparks = {f"spark-{n}": {"flavour": "dgxos", "ssh": 40000 + n, "http": 41000 + n} for n in (1, 2)}
    made._save({"world": name, "engine": "none", "sparks": sparks})
    made._tokens()
    return made


def script(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "inventory/simulated/sparks.py", "--list"],
        capture_output=True,
        text=True,
        check=False,
        env={key: value for key, value in os.environ.items() if key != "SPARKFLEET_GATEWAYS"} | environment,
    )


def test_inventory(home: Path) -> None:
    made = write_world()
    answer = script()
    data = json.loads(answer.stdout)
    shared = data["sparks"]["vars"]
    assert data["sparks"]["hosts"] == ["spark-1", "spark-2"]
    assert data["_meta"]["hostvars"]["spark-2"] == {
        "ansible_port": 40002,
        "sparkfleet_address": f"sparkfleet-{made.name}-spark-2",
        "sparkfleet_simulated_url": "http://127.0.0.1:41002",
    }
    assert shared["ansible_host"] == "127.0.0.1" and shared["ansible_user"] == "nvidia"
    assert shared["ansible_ssh_private_key_file"] == str(made.folder / "ssh/id_ed25519")
    assert f"UserKnownHostsFile={made.folder / 'ssh/known_hosts'}" in shared["ansible_ssh_common_args"]
    assert "StrictHostKeyChecking" not in answer.stdout
    group = yaml.safe_load((ROOT / "inventory/simulated/group_vars/sparks.yml").read_text(encoding="utf-8"))
    assert variables.unknown([*shared, *data["_meta"]["hostvars"]["spark-2"], *group]) == []
    assert "gateways" not in data
    assert json.loads(script(SPARKFLEET_GATEWAYS="spark-2,spark-9").stdout)["gateways"] == {"hosts": ["spark-2"]}
    several = json.loads(script(SPARKFLEET_GATEWAYS="spark-2,spark-1").stdout)["gateways"]
    assert several == {"hosts": ["spark-2", "spark-1"], "vars": {"sparkfleet_gateway_address": "127.0.0.1"}}


def test_a_spark_that_does_not_trust_the_ca_of_its_internet_has_it_in_the_inventory(home: Path) -> None:
    made = write_world()
    state = made.state()
    state["sparks"]["spark-2"]["trusting"] = False
    made._save(state)
    hosts = json.loads(script().stdout)["_meta"]["hostvars"]
    assert "sparkfleet_ca_file" not in hosts["spark-1"]
    assert hosts["spark-2"]["sparkfleet_ca_file"] == str(made.folder / "ca" / "ca.pem")


def test_inventory_keeps_the_token_to_itself(home: Path) -> None:
    made = write_world()
    answer = script()
    token = (made.folder / "hf_token").read_text().strip()
    assert token.startswith("hf_") and token not in answer.stdout + answer.stderr
    variables = json.loads(answer.stdout)["sparks"]["vars"]
    group = (ROOT / "inventory/simulated/group_vars/sparks.yml").read_text()
    looked_up = re.search(r"sparkfleet_hf_token:.*ansible\.builtin\.file', (\w+)\)", group)
    assert looked_up and Path(variables[looked_up[1]]).read_text().strip() == token


def test_inventory_of_another_world(home: Path) -> None:
    write_world("other")
    assert "/worlds/other/" in script(SPARKFLEET_WORLD="other").stdout
    answer = script()
    assert answer.returncode == 1 and answer.stdout == ""
    assert answer.stderr == "the simulated world 'demo' is not up: python -m simulator up --world demo\n"


def test_inventory_of_a_world_that_may_be_down(home: Path) -> None:
    answer = script(SPARKFLEET_WORLD_MAY_BE_DOWN="1")
    assert answer.returncode == 0 and json.loads(answer.stdout)["sparks"] == {"hosts": []}


# -- files of a world ---------------------------------------------------------------------------------------------


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.delenv("SPARKFLEET_SIM_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert world.home() == Path("/h/.cache/sparkfleet")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert world.home() == Path("/x/sparkfleet")
    monkeypatch.setenv("SPARKFLEET_SIM_HOME", "~/s")
    assert world.home() == Path("/h/s")


def test_state(home: Path) -> None:
    made = World("demo")
    assert made.state() == {}
    made._save({"sparks": {"spark-1": {"ssh": 1}}})
    assert World("demo").state() == {"sparks": {"spark-1": {"ssh": 1}}}
    assert World("other").state() == {}
    file = home / "worlds/demo/state.json"
    assert mode(file) == 0o600 and mode(file.parent) == 0o700
    assert made.container_name("spark-1") == "sparkfleet-demo-spark-1"


def test_write_private_narrows_and_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("old and longer")
    file.chmod(0o644)
    world.write_private(file, "new")
    assert file.read_text() == "new" and mode(file) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_tokens_are_made_once(home: Path) -> None:
    made = World("demo")
    tokens = made._tokens()
    assert made._tokens() == tokens and World("other")._tokens() != tokens
    allowed, refused = ((made.folder / name).read_text().strip() for name in ("hf_token", "hf_token_without_access"))
    assert tokens[allowed]["accepted"] == [world.REPOSITORY] and tokens[refused]["accepted"] == []
    assert len(tokens) == 2
    for name in ("tokens.json", "hf_token", "hf_token_without_access"):
        assert mode(made.folder / name) == 0o600


def test_known_hosts(home: Path) -> None:
    made = write_world()
    keys.ensure(made.folder)
    made._write_known_hosts(made.state())
    key = (made.folder / "ssh/host_ed25519.pub").read_text().strip()
    assert (made.folder / "ssh/known_hosts").read_text() == f"[127.0.0.1]:40001 {key}\n[127.0.0.1]:40002 {key}\n"


def test_keys(tmp_path: Path) -> None:
    keys.ensure(tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    keys.ensure(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    for name in ("ssh/id_ed25519", "ssh/host_ed25519", "ca/server.key"):
        assert mode(tmp_path / name) == 0o600
    private = serialization.load_ssh_private_key(files[tmp_path / "ssh/id_ed25519"], password=None)
    public = private.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    assert files[tmp_path / "ssh/id_ed25519.pub"] == public + b"\n"

    authority, server = (x509.load_pem_x509_certificate(files[tmp_path / "ca" / f"{n}.pem"]) for n in ("ca", "server"))
    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == set(keys.NAMES)
    assert server.not_valid_before_utc < server.not_valid_after_utc


def test_certificates_cover_what_nginx_serves() -> None:
    served = re.findall(r"server_name (\S+);", (ROOTFS / "internet/etc/nginx/nginx.conf").read_text())
    assert set(served) == set(keys.NAMES)


def test_dnsmasq() -> None:
    lines = world.dnsmasq("172.20.255.254", "172.20.255.253").splitlines()
    assert "address=/nvcr.io/172.20.255.254" in lines
    assert "address=/nvidia.github.io/172.20.255.254" in lines
    assert "address=/huggingface.co/172.20.255.253" in lines
    assert "server=127.0.0.11" in lines and "no-resolv" in lines and "listen-address=172.20.255.254" in lines


def test_put() -> None:
    sent: list[tuple[str, bytes]] = []
    container: Any = SimpleNamespace(put_archive=lambda path, data: sent.append((path, data)))
    world.put(container, {"etc/simulator/a": b"one", "etc/simulator/b": b"\0two", "etc/c": b""}, mode=0o640)
    assert [path for path, _ in sent] == ["/"]
    with tarfile.open(fileobj=io.BytesIO(sent[0][1])) as archive:
        members = {item.name: item for item in archive}
        assert archive.getnames() == ["etc", "etc/simulator", "etc/simulator/a", "etc/simulator/b", "etc/c"]
        assert members["etc/simulator"].isdir() and members["etc/simulator"].mode == 0o755
        file = archive.extractfile("etc/simulator/b")
        assert file and file.read() == b"\0two"
        assert members["etc/simulator/b"].mode == 0o640 and members["etc/simulator/b"].uid == 0


def test_put_keeps_files_private_unless_told() -> None:
    sent: list[bytes] = []
    container: Any = SimpleNamespace(put_archive=lambda path, data: sent.append(data))
    world.put(container, {"key": b"x"})
    with tarfile.open(fileobj=io.BytesIO(sent[0])) as archive:
        assert archive.getmember("key").mode == 0o600


def test_free_port_can_be_bound() -> None:
    with socket.socket() as holder, socket.socket() as user:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = world.free_port()
        assert port != holder.getsockname()[1] and port >= 1024
        user.bind(("127.0.0.1", port))


# -- readiness ----------------------------------------------------------------------------------------------------


@pytest.fixture
def registry() -> Iterator[int]:
    """Port of a registry whose nvidia/vllm:25.09-py3 is that of sim-1, and not that of sim-0."""
    digests = {"25.09-py3": "sha256:1", "sim-1": "sha256:1", "sim-0": "sha256:0"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/v2/" else 404)
            self.end_headers()

        def do_HEAD(self) -> None:
            digest = digests.get(self.path.removeprefix("/v2/nvidia/vllm/manifests/"))
            self.send_response(200 if digest else 404)
            if digest:
                self.send_header("Docker-Content-Digest", digest)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


def test_registry(registry: int) -> None:
    assert world.registry_answers(registry) and not world.registry_answers(world.free_port())
    assert world.registry_serves(registry, "nvidia/vllm:25.09-py3", "sim-1")
    assert not world.registry_serves(registry, "nvidia/vllm:25.09-py3", "sim-0")
    assert not world.registry_serves(registry, "nvidia/vllm:25.09-py3", "sim-2")
    assert not world.registry_serves(registry, "absent:25.09-py3", "sim-1")


@pytest.mark.parametrize(
    ("greeting", "answers"), [(b"SSH-2.0-OpenSSH\r\n", True), (b"HTTP/1.1 400", False), (b"", False)]
)
def test_ssh_answers(greeting: bytes, answers: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(greeting)

        thread = threading.Thread(target=greet)
        thread.start()
        assert world.ssh_answers(server.getsockname()[1]) is answers
        thread.join()


def test_ssh_does_not_answer_where_nobody_listens() -> None:
    assert not world.ssh_answers(world.free_port())


def test_until_gives_up(monkeypatch: pytest.MonkeyPatch, printed: list[str]) -> None:
    clock = iter(range(0, 1000, 7))
    monkeypatch.setattr(world, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda seconds: None))
    with pytest.raises(shell.SimulatorError, match="spark-1 is not ready after 120 s"):
        World("demo", printed.append)._until(lambda: False, "spark-1")
    assert "waiting for spark-1: 14 s" in printed


# -- verbs on a fake engine ---------------------------------------------------------------------------------------


class FakeEngine:
    """As much of docker.DockerClient as down(), container() and throttle() use; records what was removed."""

    def __init__(self, volumes: list[str]) -> None:
        self.removed: list[str] = []
        self.ran: list[str] = []
        self.names = ["sparkfleet-demo-spark-1", "sparkfleet-demo-internet"]
        self.containers = SimpleNamespace(list=self._containers, get=self._get)
        self.networks = SimpleNamespace(list=lambda filters: [self._item("sparkfleet-demo")])
        self.volumes = SimpleNamespace(list=self._volumes)
        self._all_volumes = volumes

    def _item(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, remove=lambda **options: self.removed.append(name), exec_run=self._exec)

    def _exec(self, command: list[str]) -> SimpleNamespace:
        self.ran.append(" ".join(command))
        return SimpleNamespace(exit_code=0, output=b"")

    def _containers(self, all: bool, filters: dict[str, str]) -> list[SimpleNamespace]:
        assert filters == {"label": "sparkfleet.sim.world=demo"}
        return [self._item(name) for name in self.names]

    def _volumes(self, filters: dict[str, str]) -> list[SimpleNamespace]:
        assert filters == {"label": "sparkfleet.sim.world=demo"}
        return [self._item(name) for name in self._all_volumes]

    def _get(self, name: str) -> SimpleNamespace:
        if name not in self.names:
            raise docker_sdk.errors.NotFound(name)
        return self._item(name)


@pytest.fixture
def engine_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeEngine]:
    def make(volumes: list[str] | None = None) -> FakeEngine:
        engine = FakeEngine(volumes or [])
        monkeypatch.setattr(docker_host, "connect", lambda: engine)
        return engine

    return make


def test_down_takes_its_own_alone(home: Path, engine_of: Callable[..., FakeEngine]) -> None:
    engine = engine_of(["sparkfleet-demo-spark-1-docker", "sparkfleet-demo-spark-1-containerd"])
    made, other = write_world("demo"), write_world("demo2")
    made.down()
    assert sorted(engine.removed) == [
        "sparkfleet-demo",
        "sparkfleet-demo-internet",
        "sparkfleet-demo-spark-1",
        "sparkfleet-demo-spark-1-containerd",
        "sparkfleet-demo-spark-1-docker",
    ]
    assert not made.folder.exists() and other.state()


def test_throttle_shapes_each_name_apart(home: Path, engine_of: Callable[..., FakeEngine]) -> None:
    engine = engine_of()
    made = write_world()
    made._save({**made.state(), "address": "172.20.255.254", "hub_address": "172.20.255.253"})
    made.throttle(100, 20)
    classes = {line.split()[8]: line for line in engine.ran if " class add " in line}
    filters = {line.split()[-1]: line for line in engine.ran if " filter add " in line}
    assert "rate 100mbit" in classes["1:1"] and "src 172.20.255.254/32" in filters["1:1"]
    assert "rate 20mbit" in classes["1:2"] and "src 172.20.255.253/32" in filters["1:2"]

    engine.ran.clear()
    made.throttle(None, None)
    assert engine.ran == ["tc qdisc del dev eth0 root"]


def test_errors_name_value_and_remedy(
    home: Path, engine_of: Callable[..., FakeEngine], capsys: pytest.CaptureFixture[str]
) -> None:
    engine_of()
    assert verbs.main(["status", "--world", "absent"]) == 1
    assert capsys.readouterr().err == "simulator: world absent is not up: python -m simulator up --world absent\n"
    write_world()
    assert verbs.main(["reboot", "spark-9"]) == 1
    message = capsys.readouterr().err
    assert "world demo has no host spark-9: it has spark-1, spark-2, internet" in message


def test_another_engine_needs_another_world(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker_host, "ensure", lambda home, say: None)
    write_world()
    with pytest.raises(shell.SimulatorError, match="world demo was made with --engine none"):
        World("demo", lambda text: None).up(1, "dgxos", "vllm")


@pytest.mark.parametrize(
    ("arguments", "said_of"),
    [
        (["up", "--sparks", "0"], "'0' is not a number of Sparks from 1 to 64"),
        (["up", "--sparks", "many"], "'many' is not a number"),
        (["up", "--world", "../x"], "'../x' is not a world's name"),
        (["up", "--flavour", "macos"], "'macos'"),
        ([], "VERB"),
    ],
)
def test_bad_arguments(arguments: list[str], said_of: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        verbs.main(arguments)
    assert raised.value.code == 2 and said_of in capsys.readouterr().err


# -- images -------------------------------------------------------------------------------------------------------


def test_an_image_is_named_after_what_goes_into_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Dockerfile", "internet", "rootfs"):
        source = ROOT / "simulator" / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name)
        else:
            shutil.copy2(source, tmp_path / name)
    original = images._hash()
    monkeypatch.setattr(images, "FOLDER", tmp_path)
    assert images._hash() == original
    seen = {original}
    changed = tmp_path / "rootfs/spark/usr/bin/nvidia-smi"
    changed.write_text(changed.read_text() + "# more\n")
    seen.add(images._hash())
    changed.chmod(0o700)
    seen.add(images._hash())
    (tmp_path / "rootfs/spark/new").write_text("")
    seen.add(images._hash())
    assert len(seen) == 4


# -- Docker on this machine ---------------------------------------------------------------------------------------


def test_ensure_uses_the_engine_that_answers(home: Path, monkeypatch: pytest.MonkeyPatch, printed: list[str]) -> None:
    client = object()
    monkeypatch.setattr(docker_host, "connect", lambda: client)
    monkeypatch.setattr(docker_host, "shutil", SimpleNamespace(which=lambda name: f"/usr/bin/{name}"))
    monkeypatch.setattr(docker_host, "_install", lambda *arguments: pytest.fail("installs"))
    assert docker_host.ensure(home, printed.append) is client


@pytest.mark.parametrize(
    ("host", "user", "apt", "expected"),
    [
        ("tcp://192.0.2.1:2375", 0, True, "DOCKER_HOST=tcp://192.0.2.1:2375"),
        (None, 1000, True, "apt-get install docker.io"),
        (None, 0, False, "apt-get install docker.io"),
    ],
)
def test_ensure_says_what_to_do(
    host: str | None, user: int, apt: bool, expected: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if host:
        monkeypatch.setenv("DOCKER_HOST", host)
    monkeypatch.setattr(docker_host, "connect", lambda: None)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    which = SimpleNamespace(which=lambda name: "/usr/bin/apt-get" if apt else None)
    monkeypatch.setattr(docker_host, "shutil", which)
    monkeypatch.setattr(docker_host, "_install", lambda *arguments: pytest.fail("installs"))
    with pytest.raises(shell.SimulatorError, match=re.escape(expected)):
        docker_host.ensure(home, lambda text: None)


@pytest.fixture
def dpkg(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The packages of a machine on which apt installs what it is asked for, and runc with docker.io."""
    installed = {"bash", "python3"}

    def run(command: list[str], what: str, say: Callable[[str], None]) -> str:
        if "install" in command:
            names = command[command.index("-y") + 1 :]
            installed.update(names, {"runc"} if "docker.io" in names else ())
        return ""

    monkeypatch.setattr(docker_host, "run", run)
    monkeypatch.setattr(docker_host, "_all_installed", lambda: set(installed))
    return installed


@pytest.fixture
def removals(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What remove() would take away; nothing is."""
    taken: list[str] = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        assert command[:3] == ["apt-get", "purge", "-y"]
        taken.extend(command[4:])
        return SimpleNamespace(returncode=0, stderr="")

    # The modules as docker_host sees them, so that nothing else in this process meets them.
    monkeypatch.setattr(docker_host, "subprocess", SimpleNamespace(run=run))
    rmtree = SimpleNamespace(rmtree=lambda folder, ignore_errors: taken.append(folder))
    monkeypatch.setattr(docker_host, "shutil", rmtree)
    return taken


def test_what_was_installed_is_removed_and_nothing_else(
    home: Path, dpkg: set[str], removals: list[str], printed: list[str]
) -> None:
    docker_host._install(home, ["docker.io"], printed.append)
    dpkg.add("vim")  # someone else, meanwhile
    docker_host._install(home, ("mmdebstrap",), printed.append)
    assert json.loads((home / "installed.json").read_text()) == ["docker.io", "mmdebstrap", "runc"]
    docker_host.remove(home, printed.append)
    packages = [name for name in removals if not name.startswith("/")]
    assert packages == ["docker.io", "mmdebstrap", "runc"] and "/var/lib/docker" in removals
    removals.clear()
    docker_host.remove(home, printed.append)
    assert removals == []


def test_a_docker_that_was_there_keeps_its_data(
    home: Path, dpkg: set[str], removals: list[str], printed: list[str]
) -> None:
    docker_host._install(home, ("mmdebstrap",), printed.append)
    docker_host.remove(home, printed.append)
    assert removals == ["mmdebstrap"]


def test_stop_spares_a_process_that_is_not_dockerd(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    monkeypatch.setattr(docker_host, "_restore_network", lambda before: None)
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(pid))
    home.mkdir()
    (home / "dockerd.pid").write_text(str(os.getpid()))
    docker_host.remove(home, lambda text: None)
    assert killed == [] and not (home / "dockerd.pid").exists()


def test_stop_ends_the_dockerd_that_was_started(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker_host, "_restore_network", lambda before: None)
    copy = tmp_path / "dockerd"
    shutil.copy2(shutil.which("sleep") or "/bin/sleep", copy)
    process = subprocess.Popen([copy, "60"])
    waiter = threading.Thread(target=process.wait)
    waiter.start()
    try:
        home.mkdir()
        (home / "dockerd.pid").write_text(str(process.pid))
        docker_host.remove(home, lambda text: None)
        waiter.join(5)
        assert process.returncode == -signal.SIGTERM
    finally:
        process.kill()
        waiter.join(5)


# -- running commands ---------------------------------------------------------------------------------------------


def test_run_shows_signs_of_life(printed: list[str]) -> None:
    assert (
        shell.run(["sh", "-c", "sleep 0.3; echo out; echo err >&2"], "waiting", printed.append, every=0.1)
        == "out\nerr\n"
    )
    assert printed and printed[0].startswith("waiting: ")


def test_run_fails_with_the_last_lines() -> None:
    with pytest.raises(shell.SimulatorError) as raised:
        shell.run(["sh", "-c", "seq 1 40; exit 3"], "counting", lambda text: None)
    lines = str(raised.value).splitlines()
    assert lines[0] == "counting failed (exit code 3):" and lines[1] == "26" and lines[-1] == "40"


def test_packet_filter_without_docker_keeps_what_others_added() -> None:
    rules = """*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:DOCKER - [0:0]
-A INPUT -p tcp --dport 22 -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
COMMIT
"""
    kept = docker_host.without_docker(rules, before="*filter\n:FORWARD ACCEPT [0:0]\nCOMMIT\n")
    assert kept.splitlines() == [
        "*filter",
        ":INPUT ACCEPT [0:0]",
        ":FORWARD ACCEPT [0:0]",
        "-A INPUT -p tcp --dport 22 -j ACCEPT",
        "COMMIT",
    ]
    assert ":FORWARD DROP" in docker_host.without_docker(rules, before=":FORWARD DROP [0:0]")


COUNTS = "unreachable=0    failed=0    skipped=63   rescued=0    ignored=0   "
RECAP = f"""
PLAY RECAP *********************************************************************
localhost                  : ok=1    changed=0    {COUNTS}
spark-1                    : ok=7    changed=1    {COUNTS}
"""
PLANNED = "spark-1    llama31-8b-fp8 (throughput) on NVIDIA GB10, 115.2 of 119.7 GiB of memory available"


@pytest.mark.parametrize(
    ("said", "quoted"),
    [
        (
            f"{PLANNED}\nspark-1    prepare: change /opt/hf: owner nobody to root\nspark-1    deploy: start it\n",
            "prepare: change /opt/hf: owner nobody to root",
        ),
        (
            f"{PLANNED}; nothing to change\n",
            "llama31-8b-fp8 (throughput) on NVIDIA GB10, 115.2 of 119.7 GiB of memory available; nothing to change",
        ),
        (f"{PLANNED}\nspark-1    prepare: {'long; ' * 30}\n", f"prepare: {chr(32).join(['long;'] * 16)} …"),
        ("", "failed=0"),
    ],
)
def test_the_page_of_the_matrix_quotes_what_a_run_found_and_no_recap(said: str, quoted: str) -> None:
    assert matrix.quote(said + RECAP, "failed=0") == f"`{quoted}`"


def test_the_page_of_the_matrix_quotes_the_line_with_the_words() -> None:
    said = f"{PLANNED}; nothing to change\nspark-1    12 s  release 3 does not serve: no answer [answer-empty]\n{RECAP}"
    assert matrix.quote(said, "[answer-empty]") == "`release 3 does not serve: no answer [answer-empty]`"
    assert matrix.quote(said, "not there") == "`not there`"


def test_a_brief_matrix_has_a_row_of_each_place() -> None:
    found = matrix.rows()
    some = [row for row in found if matrix.brief(row)]
    assert {row.where for row in some} == {row.where for row in found}
    assert {*matrix.BRIEF} == {row.name for row in some}
    assert len(some) <= 20
