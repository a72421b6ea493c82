"""The action spark_plan with a model of the Hub: the card is made on the way, once, and said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible import constants
from ansible.errors import AnsibleActionFail
from plugins.action import spark_plan

from sparkfleet import paths
from sparkfleet.fleet import model_files
from sparkfleet.planning import catalog
from tests.unit.fakes.authority import Authority
from tests.unit.fakes.fake_hub import Hub, serve
from tests.unit.planning.test_model_config import FOLDER

FILES = {"config.json": (FOLDER / "Qwen--Qwen3-8B.json").read_bytes(), "model.safetensors": b"w" * 5000}


class Looked(Exception):
    """The plugin has come as far as looking at the host."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve(Hub(repo="acme/tiny", files=dict(FILES), large=("model.safetensors",))) as served:
        yield served


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(catalog, "STATE", tmp_path / "state")
    monkeypatch.setattr(model_files, "CACHE", paths.CACHE)
    monkeypatch.setattr(constants, "DEFAULT_LOCAL_TMP", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)


def run(hub: Hub, **more: Any) -> tuple[list[str], dict[str, Any]]:
    """Lines that it printed, and what the host is inspected for."""
    plugin: Any = object.__new__(spark_plan.ActionModule)
    said: list[str] = []
    asked: dict[str, Any] = {}
    plugin._task = SimpleNamespace(
        args={"status": more.pop("status", False), "trial_weights": more.pop("trial", "")},
        check_mode=False,
        async_val=0,
        diff=False,
    )
    plugin._task.action = "spark_plan"
    plugin._connection = SimpleNamespace(_shell=SimpleNamespace(tmpdir=None), has_pipelining=True)
    plugin._early_needs_tmp_path = lambda: False
    plugin._templar = SimpleNamespace(template=lambda value: value)
    plugin._display = SimpleNamespace(display=said.append)

    def execute(module_args: dict[str, Any], **_: Any) -> None:
        asked.update(module_args)
        raise Looked

    plugin._execute_module = execute
    variables = {"inventory_hostname": "spark-1", "sparkfleet_model": hub.repo, "sparkfleet_hub_endpoint": hub.url}
    with pytest.raises(Looked):
        plugin.run(task_vars={**variables, **more})
    return said, asked


def test_a_model_of_the_hub_is_planned_at_the_commit_of_its_card(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said, asked = run(hub)
    assert (asked["engines"][0]["repo"], asked["engines"][0]["revision"]) == ("acme/tiny", hub.commit)
    assert len(said) == 1 and said[0].startswith("acme/tiny: a card was made from the Hub")
    assert run(hub)[0] == []
    hub.files["README.md"] = b"new"
    assert run(hub)[0] == []  # the same run asked before
    (tmp_path / "next").mkdir()
    monkeypatch.setattr(constants, "DEFAULT_LOCAL_TMP", str(tmp_path / "next"))
    (line,) = run(hub)[0]
    revision = asked["engines"][0]["revision"]
    assert f"main on the Hub is {hub.commit[:12]} by now; the card stays at {revision[:12]}" in line
    said, again = run(hub)
    assert said == [] and again["engines"][0]["revision"] == revision


def test_the_hub_of_the_controller_comes_first(hub: Hub) -> None:
    _, asked = run(hub, sparkfleet_hub_endpoint="http://127.0.0.1:9", sparkfleet_controller_hub=hub.url)
    assert asked["engines"][0]["revision"] == hub.commit


def test_a_hub_that_is_not_reached_is_bad_input_that_says_so(hub: Hub) -> None:
    with pytest.raises(AnsibleActionFail, match=r"spark-1: no card for acme/tiny@main: .*cannot be reached"):
        run(hub, sparkfleet_hub_endpoint="http://127.0.0.1:9")


def test_a_private_ca_is_read_here_and_given_to_the_inspection(hub: Hub, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    with serve(Hub(repo="acme/private", files=dict(FILES), large=("model.safetensors",)), pair=authority.server) as own:
        _, asked = run(own, sparkfleet_ca_file=str(authority.ca), sparkfleet_image="registry.example:5000/vllm:1")
    assert asked["ca"] == authority.pem and asked["registries"] == ["registry.example:5000"]
    assert asked["engines"][0]["revision"] == own.commit
    _, asked = run(hub)
    assert asked["ca"] == "" and asked["registries"] == ["docker.io"]
    with pytest.raises(AnsibleActionFail, match="spark-1: sparkfleet_ca_file: /nowhere is not there"):
        run(hub, sparkfleet_ca_file="/nowhere")


def test_whom_alerts_go_to_is_checked_before_the_host_is_inspected(hub: Hub) -> None:
    wrong: dict[str, Any] = {"sparkfleet_monitoring": True, "sparkfleet_alert_smtp_user": "sparks"}
    groups = {"sparks": ["spark-1"], "monitors": ["watch"]}
    with pytest.raises(AnsibleActionFail, match="spark-1: sparkfleet_alert_email: missing"):
        run(hub, groups={"sparks": ["spark-1"]}, **wrong)
    # Of the host that monitors it, too.
    with pytest.raises(AnsibleActionFail, match="spark-1: watch: sparkfleet_alert_email: missing"):
        run(hub, sparkfleet_monitoring=True, groups=groups, hostvars={"watch": wrong})
    run(hub, groups=groups, hostvars={"watch": wrong})
    run(hub, **{**wrong, "sparkfleet_monitoring": False})


@pytest.mark.parametrize("more", [{"status": True}, {"sparkfleet_bundle": "/nowhere"}])
def test_nobody_is_asked_for_status_or_with_a_bundle(hub: Hub, more: dict[str, Any]) -> None:
    with pytest.raises(AnsibleActionFail, match="acme/tiny has no card yet"):
        run(hub, **more)
    assert hub.asked == []


def test_a_trial_is_of_the_model_that_is_named_whatever_the_host_serves(hub: Hub) -> None:
    engines = [{"model": "qwen3-8b-fp8"}]
    _, asked = run(hub, sparkfleet_model="llama31-8b-fp8", sparkfleet_engines=engines, trial="dummy")
    assert [engine["repo"] for engine in asked["engines"]] == [catalog.load("llama31-8b-fp8").repo]
    _, asked = run(hub, sparkfleet_model="llama31-8b-fp8", sparkfleet_engines=engines)
    assert [engine["repo"] for engine in asked["engines"]] == [catalog.load("qwen3-8b-fp8").repo]


def test_a_host_is_asked_for_the_draft_of_an_engine(hub: Hub) -> None:
    _, asked = run(hub, sparkfleet_model="gemma4-31b-nvfp4")
    (engine,) = asked["engines"]
    draft = {"repo": "google/gemma-4-31B-it-assistant", "revision": "main", "remote_code": False}
    assert engine["draft"] == draft
