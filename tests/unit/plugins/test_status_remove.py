"""What runs on a Spark for `status` and `remove`, against a Docker engine of a few lines."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import spark_remove
from ansible.module_utils.testing import patch_module_args
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import status
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.docker import Docker
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.releases import Store, write_json

from tests.unit.fakes import fake_release
from tests.unit.fakes.fake_engine import Engine
from tests.unit.fakes.fake_vllm import Vllm

LABELS = {"com.docker.compose.project": "sparkfleet", "com.docker.compose.service": "vllm-m"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "project", tmp_path / "state", str(tmp_path / "lock"))


def deploy(store: Store, engine: Engine, vllm: Vllm, state: str = "running") -> None:
    """A release is current, and its container is in this state."""
    made = fake_release.an_engine("vllm-m", int(vllm.url.rpartition(":")[2]), repo="org/m", image="i:1")
    store.commit(store.stage("services: {}\n", fake_release.plan(made), fake_release.lock(made)), 100.0)
    engine.routes["GET", "/containers/json"] = [
        {"Id": "abc", "Names": ["/vllm-m"], "State": state, "Labels": LABELS},
    ]


def test_a_host_that_serves(store: Store, engine: Engine, docker: Docker, vllm: Vllm) -> None:
    deploy(store, engine, vllm)
    found = status.inspect_host(store, docker, 0)
    assert found["engine"] == "serving" and found["healthy"] is True
    assert found["containers"] == [{"name": "vllm-m", "service": "vllm-m", "state": "running"}]
    assert found["releases"]["current"] == 1 and "generation_tokens" in found["engines"][0]["figures"]


def test_tokens_a_second_are_measured_where_requests_run(
    store: Store, engine: Engine, docker: Docker, vllm: Vllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    deploy(store, engine, vllm)
    paused: list[float] = []

    def pause(seconds: float) -> None:
        paused.append(seconds)
        vllm.counters["generation_tokens"] += 300.0

    clock = iter((10.0, 12.0))
    monkeypatch.setattr(status, "time", SimpleNamespace(sleep=pause, monotonic=lambda: next(clock)))
    assert status.inspect_host(store, docker, 0)["engines"][0]["tokens_per_second"] == 0.0 and not paused
    vllm.counters["num_requests_running"] = 3.0
    assert status.inspect_host(store, docker, 0)["engines"][0]["tokens_per_second"] == 150.0
    assert paused == [status.PACE_SECONDS]


@pytest.mark.parametrize(
    ("state", "guard", "expected"),
    [
        ("running", {"engine": "wedged"}, "wedged"),
        ("exited", {"engine": "stopped"}, "stopped"),
        ("exited", {"engine": "given-up", "given_up": {"at": 1.0, "reason": "3 restarts"}}, "given-up"),
        ("running", None, "serving"),
    ],
)
def test_what_the_guard_knows_counts(
    store: Store,
    engine: Engine,
    docker: Docker,
    vllm: Vllm,
    state: str,
    guard: dict[str, Any] | None,
    expected: str,
) -> None:
    deploy(store, engine, vllm, state)
    if guard:
        write_json(store.state_dir / "guard-state.json", guard)
    assert status.inspect_host(store, docker, 0)["engine"] == expected


def test_an_engine_that_loads_or_is_healed(store: Store, engine: Engine, docker: Docker, vllm: Vllm) -> None:
    vllm.faults.add("sick")
    deploy(store, engine, vllm)
    assert status.inspect_host(store, docker, 0)["engine"] == "loading"
    write_json(store.state_dir / "guard-state.json", {"engine": "healing"})
    assert status.inspect_host(store, docker, 0)["engine"] == "healing"


def test_a_host_without_anything(store: Store, engine: Engine, docker: Docker, tmp_path: Path) -> None:
    engine.routes["GET", "/containers/json"] = []
    found = status.inspect_host(store, docker, 0)
    assert found["engine"] == "missing" and found["releases"]["current"] is None
    assert status.inspect_host(store, Docker(str(tmp_path / "none.sock")), 0)["engine"] == "docker-down"


def test_each_engine_of_a_release_has_a_row(store: Store, engine: Engine, docker: Docker, vllm: Vllm) -> None:
    first = fake_release.an_engine("vllm-m", int(vllm.url.rpartition(":")[2]), repo="org/m", image="i:1")
    both = (first, fake_release.an_engine("vllm-b", 1))
    store.commit(store.stage("services: {}\n", fake_release.plan(*both), fake_release.lock(*both)), 100.0)
    labels = {**LABELS, "com.docker.compose.service": "vllm-b"}
    engine.routes["GET", "/containers/json"] = [
        {"Id": "abc", "Names": ["/vllm-m"], "State": "running", "Labels": LABELS},
        {"Id": "def", "Names": ["/vllm-b"], "State": "exited", "Labels": labels},
    ]
    guards = {"vllm-m": {"engine": "serving"}, "vllm-b": {"given_up": {"at": 1.0, "reason": "3 restarts"}}}
    write_json(store.state_dir / "guard-state.json", {"at": 1.0, "engines": guards})
    found = status.inspect_host(store, docker, 0)
    rows = [(row["service"], row["state"], row["healthy"], row["guard"]) for row in found["engines"]]
    assert rows == [
        ("vllm-m", "serving", True, guards["vllm-m"]),
        ("vllm-b", "given-up", False, guards["vllm-b"]),
    ]
    assert (found["engine"], found["healthy"], found["log"]) == ("given-up", False, [])
    assert {key: found["engines"][0][key] for key in ("model", "profile", "repo", "image", "port")} == {
        key: first[key] for key in ("model", "profile", "repo", "image", "port")
    }
    store.write_switch({"to": 2, "from": 1, "phase": "waiting", "kept": ["vllm-m"], "began": 1.0})
    with store.exclusive():
        found = status.inspect_host(store, docker, 0)
    assert [row["state"] for row in found["engines"]] == ["serving", "switching"] and found["engine"] == "switching"


def test_an_engine_on_demand_sleeps_until_it_is_stopped(
    store: Store, engine: Engine, docker: Docker, vllm: Vllm
) -> None:
    both = (
        fake_release.an_engine("vllm-m", int(vllm.url.rpartition(":")[2]), repo="org/m"),
        fake_release.an_engine("vllm-b", 1, on_demand={"port": 8002}),
    )
    store.commit(store.stage("services: {}\n", fake_release.plan(*both), fake_release.lock(*both)), 100.0)
    labels = {**LABELS, "com.docker.compose.service": "vllm-b"}
    engine.routes["GET", "/containers/json"] = [
        {"Id": "abc", "Names": ["/vllm-m"], "State": "running", "Labels": LABELS},
        {"Id": "def", "Names": ["/vllm-b"], "State": "exited", "Labels": labels},
    ]
    found = status.inspect_host(store, docker, 0)
    assert [row["state"] for row in found["engines"]] == ["serving", "asleep"]
    assert (found["engine"], found["healthy"]) == ("serving", True)
    assert found["engines"][1]["on_demand"] == {"port": 8002} and "on_demand" not in found["engines"][0]
    store.halt(True)
    found = status.inspect_host(store, docker, 0)
    assert [row["state"] for row in found["engines"]] == ["serving", "stopped"] and found["engine"] == "stopped"


def test_the_log_names_the_engine_where_there_are_several(
    store: Store, engine: Engine, docker: Docker, vllm: Vllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status.engine, "read_log", lambda docker, service, *_: [f"token=hf_abcdefghijkl {service}"])
    deploy(store, engine, vllm)
    assert status.inspect_host(store, docker, 5)["log"] == ["token=*** vllm-m"]
    both = (fake_release.an_engine("vllm-m"), fake_release.an_engine("vllm-b", 8001))
    store.commit(store.stage("b\n", fake_release.plan(*both), fake_release.lock(*both)), 100.0)
    assert status.inspect_host(store, docker, 5)["log"] == ["vllm-m  token=*** vllm-m", "vllm-b  token=*** vllm-b"]


def test_an_engine_of_a_release_that_cannot_be_read_is_found_by_its_container(
    store: Store, engine: Engine, docker: Docker, vllm: Vllm
) -> None:
    deploy(store, engine, vllm)
    (store.folder(1) / "lock.json").unlink()
    engine.routes["GET", "/containers/json"][0]["Ports"] = [{"PublicPort": int(vllm.url.rpartition(":")[2])}]
    found = status.inspect_host(store, docker, 0)
    assert [(row["service"], row["model"], row["state"]) for row in found["engines"]] == [("vllm-m", None, "serving")]


@pytest.fixture
def remove(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, Any]]:
    """Run the module on a host where everything is there."""
    for folder in ("project", "state", "compiled", "hf/models--org--m", "hf/.sparkfleet/models--org--m"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file").write_text("x")
    (tmp_path / "hf/.sparkfleet/models--org--m/fetching.json").write_text('{"files": {}}')
    for file in ("unit", "guard.json", "token"):
        (tmp_path / file).write_text("x")
    engine.routes |= {
        ("GET", "/containers/json"): [{"Id": "abc", "Names": ["/vllm-m"], "State": "running", "Labels": LABELS}],
        ("GET", "/version"): {"Version": "28.0.0"},
        ("GET", "/networks"): [{"Id": "net", "Name": "sparkfleet_default"}],
        ("GET", "/images/sparkfleet/host-python:1/json"): {"Id": "img"},
        ("POST", "/containers/abc/stop"): {},
        ("DELETE", "/containers/abc"): {},
        ("DELETE", "/networks/net"): {},
        ("DELETE", "/images/sparkfleet/host-python:1"): [],
    }
    monkeypatch.setattr(spark_remove, "UNIT", tmp_path / "unit")
    monkeypatch.setattr(spark_remove, "CHECKS", [])
    monkeypatch.setattr(spark_remove, "SETTINGS_FILE", str(tmp_path / "guard.json"))
    monkeypatch.setattr(spark_remove, "STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(spark_remove, "remove_unit", (tmp_path / "unit").unlink)
    monkeypatch.setattr(spark_remove, "Docker", lambda timeout: Docker(str(engine.server_address), timeout))

    def run(check: bool = False, **arguments: Any) -> dict[str, Any]:
        folders = {"project_dir": "project", "cache_dir": "hf", "compile_cache_dir": "compiled", "token_file": "token"}
        given = {key: str(tmp_path / name) for key, name in folders.items()}
        with patch_module_args({**given, **arguments, "_ansible_check_mode": check}), pytest.raises(SystemExit):
            spark_remove.main()
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    return run


def names(folder: Path) -> list[str]:
    return [
        *("service unit", "container vllm-m", "network sparkfleet_default", "image sparkfleet/host-python:1"),
        *(f"{folder}/{name}/" for name in ("project", "state", "compiled")),
        f"{folder}/guard.json",
    ]


def test_remove_shows_all_and_removes_nothing_in_check_mode(
    remove: Callable[..., dict[str, Any]], engine: Engine, tmp_path: Path
) -> None:
    shown = remove(check=True)
    assert shown["changed"] is True
    assert shown["removed"] == names(tmp_path)
    assert all(method == "GET" for method, *_ in engine.seen)
    assert (tmp_path / "project" / "file").exists()


def test_remove_takes_the_firewall_off(
    remove: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit, rules, tools = tmp_path / "firewall.service", tmp_path / "firewall.nft", tmp_path / "bin"
    for file in (unit, rules):
        file.write_text("x", encoding="utf-8")
    tools.mkdir()
    (tools / "systemctl").write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/asked\n', encoding="utf-8")
    (tools / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setattr(spark_remove.firewall, "UNIT", unit)
    monkeypatch.setattr(spark_remove.firewall, "RULES", rules)
    assert "service firewall.service" in remove(check=True)["removed"] and unit.exists()
    assert "service firewall.service" in remove()["removed"] and not unit.exists() and not rules.exists()
    asked = (tmp_path / "asked").read_text(encoding="utf-8").splitlines()
    assert asked == ["disable --now firewall.service", "daemon-reload"]


def test_remove_takes_the_private_ca_away(
    remove: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = spark_remove.trust.Store(tmp_path / "ca", tmp_path / "etc", tmp_path / "docker", str(tmp_path / "missing"))
    monkeypatch.setattr(spark_remove.trust, "Store", lambda: found)
    assert "CA of sparkfleet_ca_file" not in remove(check=True)["removed"]
    file = tmp_path / "ca" / "sparkfleet-0123.crt"
    file.parent.mkdir()
    file.write_text("x")
    assert "CA of sparkfleet_ca_file" in remove(check=True)["removed"] and file.exists()
    assert "CA of sparkfleet_ca_file" in remove()["removed"] and not file.exists()


def test_remove_keeps_models_and_token_unless_asked(
    remove: Callable[..., dict[str, Any]], engine: Engine, tmp_path: Path
) -> None:
    assert remove()["removed"] == names(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "token", "docker.sock"}
    done = [(method, path.partition("?")[0]) for method, path, *_ in engine.seen if method != "GET"]
    assert done == [
        ("POST", "/containers/abc/stop"),
        ("DELETE", "/containers/abc"),
        ("DELETE", "/networks/net"),
        ("DELETE", "/images/sparkfleet/host-python:1"),
    ]


def test_remove_takes_what_is_asked_for(remove: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    removed = remove(models=True, token=True)["removed"]
    assert f"{tmp_path}/hf/models--org--m/" in removed and f"{tmp_path}/token" in removed
    assert not (tmp_path / "token").exists() and not list((tmp_path / "hf").glob("models--*"))


def test_remove_leaves_models_that_sparkfleet_did_not_download(
    remove: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    hub = tmp_path / "hf"
    listings = {"models--org--checked": {"files": {}, "downloaded_bytes": 0}}
    listings["models--org--link"] = {"files": {}, "downloaded_bytes": 5}
    (hub / "models--org--byhand").mkdir()
    (hub / "models--org--checked").mkdir()
    (hub / "models--org--link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    for name, listing in listings.items():
        (hub / ".sparkfleet" / name).mkdir()
        (hub / ".sparkfleet" / name / f"{'a' * 40}.json").write_text(json.dumps(listing))
    removed = remove(models=True)["removed"]
    assert sorted(name for name in removed if "/hf/" in name) == [
        *(f"{hub}/.sparkfleet/models--org--link/", f"{hub}/.sparkfleet/models--org--m/", f"{hub}/models--org--m/"),
    ]
    assert sorted(path.name for path in hub.glob("models--*")) == [
        *("models--org--byhand", "models--org--checked", "models--org--link"),
    ]
    assert (tmp_path / "elsewhere").exists()


def test_remove_takes_the_images_of_every_engine_and_release(
    remove: Callable[..., dict[str, Any]], engine: Engine, tmp_path: Path
) -> None:
    store = Store(tmp_path / "project", tmp_path / "state", str(tmp_path / "lock"))
    both = (fake_release.an_engine("a", image="x:1"), fake_release.an_engine("b", 8001, image="x:2"))
    store.stage("services: {}\n", fake_release.plan(*both), fake_release.lock(*both))
    store.folder(2).mkdir()
    plan, lock = fake_release.flat(fake_release.an_engine("c", image="x:3"))
    write_json(store.folder(2) / "plan.json", plan)
    write_json(store.folder(2) / "lock.json", lock)
    store.folder(3).mkdir()  # damaged: what it needs is not known
    for name in ("x:1", "x:2", "x:3"):
        engine.routes["GET", f"/images/{name}/json"] = {"Id": name}
    removed = remove(check=True, images=True)["removed"]
    assert [name for name in removed if name.startswith("image x")] == ["image x:1", "image x:2", "image x:3"]


@pytest.mark.parametrize("check", [True, False])
def test_remove_does_nothing_while_docker_is_down(
    remove: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, check: bool
) -> None:
    monkeypatch.setattr(spark_remove, "Docker", lambda timeout: Docker(str(tmp_path / "none.sock"), timeout))
    monkeypatch.setattr(spark_remove.shutil, "which", lambda name: f"/usr/bin/{name}")
    printed = remove(check=check)
    assert printed["failed"] is True and printed["failure"] == "docker"
    assert "nothing was removed. Start it (`systemctl start docker`)" in printed["msg"]
    assert (tmp_path / "unit").exists() and (tmp_path / "project").exists()
    monkeypatch.setattr(spark_remove.shutil, "which", lambda name: None)  # there never was a Docker
    assert f"{tmp_path}/project/" in remove(check=check)["removed"]


def test_remove_stops_at_what_cannot_be_removed_and_says_what_went(
    remove: Callable[..., dict[str, Any]], engine: Engine, tmp_path: Path
) -> None:
    engine.routes["DELETE", "/networks/net"] = lambda handler: handler.answer(403, {"message": "has active endpoints"})
    printed = remove()["msg"]
    assert printed == (
        "cannot remove network sparkfleet_default: has active endpoints; removed so far: service unit, container vllm-m"
    )
    assert (tmp_path / "project" / "file").exists()
