"""A machine's NVIDIA GPU in the simulated world: detection, what a Spark gets, what its containers get."""

from __future__ import annotations

import json
import os
import runpy
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import docker as docker_sdk
import pytest
import yaml
from simulator import __main__ as verbs
from simulator import cuda_image, docker_host, gpu, shell, world
from simulator.world import World

from tests.unit import ROOT

RUNC = ROOT / "simulator/gpu_rootfs/usr/local/lib/sparkfleet-sim/gpu/runc"
DATA = ROOT / "tests/unit/data"
H200 = gpu.Gpu(
    "NVIDIA H200",
    "580.159.04",
    143155,
    142600,
    ("/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm"),
    {"/usr/lib/libcuda.so.580.159.04": "/usr/local/nvidia/lib64/libcuda.so.580.159.04"},
    "found in /dev",
)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a GPU and a driver in a folder of its own, of which the linker knows nothing."""
    root = tmp_path / "root"
    for name in ("nvidia1", "nvidia0", "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-caps", "nvidiafb"):
        (root / "dev").mkdir(parents=True, exist_ok=True)
        (root / "dev" / name).touch()
    libraries = root / "usr/local/nvidia/lib64"
    libraries.mkdir(parents=True)
    for name in ("libcuda", "libnvidia-ml", "libnvidia-ptxjitcompiler", "libnvidia-glcore", "libGLX_nvidia"):
        (libraries / f"{name}.so.580.159.04").touch()
        (libraries / f"{name}.so.1").symlink_to(f"{name}.so.580.159.04")
    monkeypatch.setattr(gpu, "_linked", list)
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    smi(tmp_path, monkeypatch, "echo NVIDIA H200, 580.159.04, 143771, 616, 143156")
    return root


def smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    file = tools / "nvidia-smi"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    return file


def test_a_gpu_is_found_with_the_driver_files_that_computing_needs(machine: Path) -> None:
    found, text = gpu.find(machine)
    assert found is not None and text == "GPU: NVIDIA H200, driver 580.159.04, 139.8 GiB (found in /dev)"
    assert found.devices == tuple(
        f"/dev/{name}" for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools")
    )
    assert (found.total_mib, found.free_mib) == (143155, 143155)
    places = sorted(found.files.values())
    assert [Path(place).name for place in places] == [
        "nvidia-smi",
        "libcuda.so.580.159.04",
        "libnvidia-ml.so.580.159.04",
        "libnvidia-ptxjitcompiler.so.580.159.04",
    ]
    assert all(Path(file).exists() for file in found.files)
    assert gpu.Gpu.of(json.loads(json.dumps(found.state()))) == found


def test_no_gpu_is_no_word_about_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_linked", list)
    assert gpu.find(tmp_path) == (None, "")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()  # the driver without a GPU
    assert gpu.find(tmp_path) == (None, "")


def test_docker_elsewhere_has_not_this_gpu(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "tcp://192.0.2.1:2375")
    assert gpu.find(machine) == (None, "")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo No devices were found; exit 6", "does not answer (No devices were found)"),
        ("echo 'NVIDIA GB10, 580.142, [N/A], [N/A], [N/A]'", "does not answer (it reports [N/A] as memory)"),
        ("exit 9", "does not answer (no answer)"),
    ],
)
def test_a_driver_that_does_not_answer_is_said(
    script: str, said: str, machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi(tmp_path, monkeypatch, script)
    found, text = gpu.find(machine)
    assert found is None and text == f"GPU: /dev/nvidia0 is there, but its driver {said}; the engine runs on the CPU"


def test_a_driver_without_libraries_is_said(machine: Path) -> None:
    (machine / "usr/local/nvidia/lib64/libcuda.so.580.159.04").unlink()
    found, text = gpu.find(machine)
    assert found is None and "its driver has no libcuda.so; the engine runs on the CPU" in text


def test_what_the_toolkit_wrote_down_counts(machine: Path) -> None:
    library = machine / "lib/libcuda.so.570.1"
    other = machine / "lib/libnvidia-ml.so.570.1"
    for file in (library, other):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    spec = {
        "cdiVersion": "0.5.0",
        "kind": "nvidia.com/gpu",
        "devices": [
            {"name": "0", "containerEdits": {"deviceNodes": [{"path": "/dev/nvidia0"}]}},
            {"name": "all", "containerEdits": {"deviceNodes": [{"path": "/dev/nvidia0"}, {"path": "/dev/dri/card1"}]}},
        ],
        "containerEdits": {
            "deviceNodes": [{"path": "/dev/nvidiactl"}, {"path": "/dev/nvidia-uvm"}],
            "mounts": [{"hostPath": str(path), "containerPath": str(path)} for path in (library, other)]
            + [{"hostPath": "/usr/share/egl/egl.json", "containerPath": "/usr/share/egl/egl.json"}],
        },
    }
    folder = machine / "etc/cdi"
    folder.mkdir(parents=True)
    (folder / "broken.yaml").write_text("{")
    (folder / "nvidia.yaml").write_text(yaml.safe_dump(spec))
    found, text = gpu.find(machine)
    assert found is not None and text.endswith(f"(as in {folder / 'nvidia.yaml'})")
    assert found.devices == ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia0")
    assert found.files == {
        str(library): "/usr/local/nvidia/lib64/libcuda.so.570.1",
        str(other): "/usr/local/nvidia/lib64/libnvidia-ml.so.570.1",
    }


def test_memory_of_a_spark_is_the_gpus() -> None:
    lines = gpu.meminfo(world.MEMINFO, H200).splitlines()
    before = world.MEMINFO.splitlines()
    known = {line.split()[0]: int(line.split()[1]) for line in lines}
    assert known["MemTotal:"] == 143155 * 1024 and known["MemAvailable:"] == known["MemFree:"] == 142600 * 1024
    assert [len(line) for line in lines] == [len(line) for line in before]
    assert lines[3:] == before[3:]


# -- the runc of a Spark with a GPU -------------------------------------------------------------------------------


@pytest.fixture
def runc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs the wrapper on a configuration; what is left of it. Null devices stand for the GPU's."""
    described = tmp_path / "gpu.json"
    described.write_text(json.dumps({"devices": ["/dev/null", "/dev/zero", "/dev/shm"], "folder": gpu.FOLDER}))

    def run(spec: dict[str, Any], *, with_gpu: bool = True, verb: str = "create") -> dict[str, Any]:
        file = tmp_path / "config.json"
        file.write_text(json.dumps(spec))
        started: list[tuple[str, list[str], str]] = []
        monkeypatch.setenv("PATH", f"{RUNC.parent}:/usr/sbin:/usr/bin")
        monkeypatch.setattr(os, "execvp", lambda name, argv: started.append((name, argv, os.environ["PATH"])))
        words = ["--root", "/run/runc", verb, "--bundle", str(tmp_path), "id"]
        monkeypatch.setattr(sys, "argv", ["runc", *words])
        source = RUNC.read_text().replace(
            '"/etc/simulator/gpu.json"', repr(str(described if with_gpu else tmp_path / "no"))
        )
        copy = tmp_path / "gpu" / "runc"
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(source)
        monkeypatch.setenv("PATH", f"{copy.parent}:/usr/sbin:/usr/bin")
        runpy.run_path(str(copy))
        # The next runc of PATH, so that it cannot start itself.
        assert started == [("runc", ["runc", *words], "/usr/sbin:/usr/bin")]
        left: dict[str, Any] = json.loads(file.read_text())
        return left

    return run


def recorded(name: str) -> dict[str, Any]:
    """The configuration of a container as Docker 26 gave it to runc on a simulated Spark."""
    spec: dict[str, Any] = json.loads((DATA / name).read_text(encoding="utf-8"))
    return spec


def test_a_container_that_asks_gets_devices_and_driver(runc: Callable[..., dict[str, Any]]) -> None:
    before = recorded("runc-gpus-all.json")
    after = runc(before)
    null = Path("/dev/null").stat().st_rdev
    number = {"type": "c", "major": os.major(null), "minor": os.minor(null)}
    added = after["linux"]["devices"][len(before["linux"].get("devices") or []) :]
    assert [device["path"] for device in added] == ["/dev/null", "/dev/zero"]  # /dev/shm is no device
    assert added[0] == {"path": "/dev/null", **number, "fileMode": 0o666, "uid": 0, "gid": 0}
    assert {"allow": True, **number, "access": "rwm"} in after["linux"]["resources"]["devices"]
    assert after["mounts"][:-1] == before["mounts"]
    assert after["mounts"][-1] == {
        "destination": "/usr/local/nvidia",
        "source": "/usr/local/nvidia",
        "type": "bind",
        "options": ["rbind", "rprivate", "ro", "nosuid", "nodev"],
    }
    assert after["process"]["env"] == [*before["process"]["env"], "LD_LIBRARY_PATH=/usr/local/nvidia/lib64"]
    for spec in (before, after):
        del spec["process"]["env"]
        spec["linux"].pop("devices", None)
        del spec["mounts"], spec["linux"]["resources"]["devices"]
    assert after == before


def test_libraries_of_the_image_stay_where_they_are_searched(runc: Callable[..., dict[str, Any]]) -> None:
    asking = recorded("runc-gpus-all.json")
    asking["process"]["env"].insert(0, "LD_LIBRARY_PATH=/usr/local/cuda/lib64")
    environment = runc(asking)["process"]["env"]
    assert [word for word in environment if word.startswith("LD_LIBRARY_PATH=")] == [
        "LD_LIBRARY_PATH=/usr/local/nvidia/lib64:/usr/local/cuda/lib64"
    ]


def test_a_container_that_does_not_ask_gets_none(runc: Callable[..., dict[str, Any]]) -> None:
    plain = recorded("runc-plain.json")
    assert runc(plain) == plain
    named = {**plain, "process": {**plain["process"], "env": [*plain["process"]["env"], "NVIDIA_VISIBLE_DEVICES=all"]}}
    assert runc(named) == named  # without the hook, the variable of an image is no more than that


def test_nothing_is_handed_on_without_a_gpu_or_for_other_verbs(runc: Callable[..., dict[str, Any]]) -> None:
    asking = recorded("runc-gpus-all.json")
    assert runc(asking, with_gpu=False) == asking
    assert runc(asking, verb="state") == asking


@pytest.mark.parametrize("service", ["docker", "containerd"])
def test_the_runc_above_comes_first_on_a_spark_with_a_gpu(service: str) -> None:
    folder = f"etc/systemd/system/{service}.service.d"
    (ours,) = (gpu.ROOTFS / folder).iterdir()
    (usual,) = (ROOT / "simulator/rootfs/spark" / folder).iterdir()
    assert ours.name > usual.name  # systemd takes the last setting
    path, before = (
        next(line for line in file.read_text().splitlines() if line.startswith("Environment=PATH="))
        for file in (ours, usual)
    )
    assert path == before.replace("PATH=", "PATH=/usr/local/lib/sparkfleet-sim/gpu:")
    assert RUNC.stat().st_mode & stat.S_IXUSR


# -- a world ------------------------------------------------------------------------------------------------------


class FakeDocker:
    """As much of docker.DockerClient as creating a Spark uses; records what it was asked for."""

    def __init__(self) -> None:
        self.created: dict[str, Any] = {}
        self.files: dict[str, int] = {}
        self.ran: list[list[str]] = []
        self.api = SimpleNamespace(
            create_host_config=lambda **options: dict(options),
            create_endpoint_config=lambda **options: options,
            create_container=self._create,
        )
        self.containers = SimpleNamespace(get=self._get)
        self.volumes = SimpleNamespace(create=lambda name, labels: SimpleNamespace(name=name))

    def _create(self, image: str, **options: Any) -> dict[str, str]:
        self.created = {"image": image, **options}
        return {"Id": "made"}

    def _get(self, name: str) -> SimpleNamespace:
        if name != "made":
            raise docker_sdk.errors.NotFound(name)
        return SimpleNamespace(name=name, start=lambda: None, exec_run=self._run)

    def _run(self, command: list[str]) -> SimpleNamespace:
        self.ran.append(command)
        return SimpleNamespace(exit_code=0, output=b"")


def spark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: dict[str, Any]) -> FakeDocker:
    """A Spark of a world, made on a fake engine."""
    fake = FakeDocker()
    monkeypatch.setenv("SPARKFLEET_SIM_HOME", str(tmp_path))
    monkeypatch.setattr(world.images, "build", lambda *arguments: "image")

    def put(container: Any, files: dict[str, bytes], mode: int = 0o600) -> None:
        fake.files |= dict.fromkeys(files, mode)
        for name, content in files.items():
            (tmp_path / Path(name).name).write_bytes(content)

    monkeypatch.setattr(world, "put", put)
    made = World("demo", lambda text: None)
    world.keys.ensure(made.folder)
    known = {"flavour": "dgxos", "store": "graph", "ssh": 1, "http": 2}
    made._spark(fake, "spark-1", {"address": "192.0.2.1", "sparks": {"spark-1": known}, **state}, tmp_path)  # type: ignore[arg-type]
    return fake


def test_a_spark_gets_the_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = spark(monkeypatch, tmp_path, {"gpu": H200.state()})
    limits = made.created["host_config"]
    assert limits["devices"] == [f"{path}:{path}:rwm" for path in H200.devices]
    place = "/usr/local/nvidia/lib64/libcuda.so.580.159.04"
    assert limits["binds"]["/usr/lib/libcuda.so.580.159.04"] == {"bind": place, "mode": "ro"}
    assert made.files["usr/local/lib/sparkfleet-sim/gpu/runc"] == 0o755
    assert made.files["etc/systemd/system/docker.service.d/simulator.gpu.conf"] == 0o644
    assert json.loads((tmp_path / "gpu.json").read_text()) == {
        "devices": list(H200.devices),
        "folder": "/usr/local/nvidia",
    }
    assert "MemTotal:       146590720 kB" in (tmp_path / "meminfo").read_text()
    assert made.ran == [["ldconfig", "-n", "/usr/local/nvidia/lib64"]]


def test_a_spark_without_a_gpu_is_as_ever(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = spark(monkeypatch, tmp_path, {})
    assert made.created["host_config"]["devices"] == [] and made.ran == []
    assert not any("gpu" in name for name in made.files)
    assert (tmp_path / "meminfo").read_text() == world.MEMINFO
    assert all(name.startswith("sparkfleet-demo-") for name in made.created["host_config"]["binds"])


@pytest.mark.parametrize(
    ("words", "engine", "asked"),
    [([], "vllm", True), (["--gpu", "off"], "vllm", False), ([], "none", False), ([], "fault", False)],
)
def test_a_gpu_is_looked_for_where_the_engine_can_use_it(
    words: list[str], engine: str, asked: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    looked: list[str] = []

    def find() -> tuple[gpu.Gpu, str]:
        looked.append("")
        return H200, "GPU: NVIDIA H200"

    def stop(self: World, client: object) -> None:
        raise shell.SimulatorError("far enough")

    monkeypatch.setenv("SPARKFLEET_SIM_HOME", str(tmp_path))
    monkeypatch.setattr(docker_host, "ensure", lambda home, say: None)
    monkeypatch.setattr(world.images, "prepare", lambda *arguments: None)
    monkeypatch.setattr(gpu, "find", find)
    monkeypatch.setattr(World, "_network", stop)
    monkeypatch.setattr(cuda_image, "ensure", lambda client, say: "image")
    assert verbs.main(["up", "--engine", engine, *words]) == 1
    assert bool(looked) is asked


# -- the engine's image -------------------------------------------------------------------------------------------


class FakeImages:
    """As much of docker.DockerClient as making the engine's image uses."""

    def __init__(self, *names: str) -> None:
        self.names = set(names)
        self.pulled: list[str] = []
        self.refuses = False
        self.images = SimpleNamespace(get=self._get, pull=self._pull)
        self.containers = SimpleNamespace(create=self._create)
        self.commits: list[dict[str, Any]] = []
        self.removed = 0

    def _get(self, name: str) -> SimpleNamespace:
        if name not in self.names:
            raise docker_sdk.errors.ImageNotFound(name)
        return SimpleNamespace(id=f"sha256:{name}")

    def _pull(self, repository: str, tag: str) -> SimpleNamespace:
        if self.refuses:
            raise docker_sdk.errors.APIError("500", explanation="no such host")
        self.pulled.append(f"{repository}:{tag}")
        self.names.add(f"{repository}:{tag}")
        return self._get(f"{repository}:{tag}")

    def _create(self, image: str, command: list[str]) -> SimpleNamespace:
        return SimpleNamespace(commit=self._commit, remove=self._remove)

    def _commit(self, repository: str, tag: str, conf: dict[str, Any]) -> None:
        self.names.add(f"{repository}:{tag}")
        self.commits.append(conf)

    def _remove(self, v: bool) -> None:
        self.removed += 1


def ensure(fake: FakeImages) -> str:
    client: Any = fake
    return cuda_image.ensure(client, lambda text: None)


def test_upstreams_image_is_pulled_and_made_to_start_as_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARKFLEET_SIM_ENGINE_IMAGE", raising=False)
    fake = FakeImages()
    made = ensure(fake)
    assert fake.pulled == ["vllm/vllm-openai:v0.25.1"] and fake.removed == 1
    assert fake.commits[0]["Entrypoint"] == ["/usr/bin/env"]
    assert "VLLM_ALLOW_LONG_MAX_MODEL_LEN=1" in fake.commits[0]["Env"]
    assert ensure(fake) == made and len(fake.pulled) == len(fake.commits) == 1


def test_an_image_of_this_machine_is_used_as_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARKFLEET_SIM_ENGINE_IMAGE", "mine:1")
    fake = FakeImages("mine:1", "mine:2")
    made = ensure(fake)
    monkeypatch.setenv("SPARKFLEET_SIM_ENGINE_IMAGE", "mine:2")
    assert ensure(fake) != made and fake.pulled == []
    monkeypatch.setenv("SPARKFLEET_SIM_ENGINE_IMAGE", "absent:1")
    with pytest.raises(shell.SimulatorError, match=r"no image absent:1 \(SPARKFLEET_SIM_ENGINE_IMAGE\)"):
        ensure(fake)


def test_without_an_image_the_engine_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARKFLEET_SIM_ENGINE_IMAGE", raising=False)
    monkeypatch.setattr(gpu, "find", lambda: (H200, "GPU: NVIDIA H200"))
    fake = FakeImages()
    client: Any = fake
    said: list[str] = []
    assert World("demo", said.append)._gpu(client) == {"gpu": H200.state()}
    fake = client = FakeImages()
    fake.refuses = True
    assert World("demo", said.append)._gpu(client) == {}
    assert said[-1] == (
        "vllm/vllm-openai:v0.25.1 cannot be pulled (no such host); the engine runs on the CPU. "
        "SPARKFLEET_SIM_ENGINE_IMAGE names an image that has vLLM"
    )
