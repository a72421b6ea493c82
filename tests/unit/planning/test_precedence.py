"""The order in which settings win: model, profile, group, host, command line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible.inventory.manager import InventoryManager
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template
from ansible.vars.manager import VariableManager
from plugins.action.spark_plan import ActionModule

from sparkfleet import SparkfleetError
from sparkfleet.planning.target import Settings, Target
from sparkfleet.planning.variables import settle

#: max_num_seqs of the model llama31-8b-fp8, of its profile low_latency, and what the others say.
MODEL, PROFILE, GROUP, HOST, COMMAND = 64, 16, 40, 41, 42


def merged(
    folder: Path, *, profile: str = "throughput", group: str = "", host: str = "", command: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What is given to vLLM for spark-1 of an inventory with these lines, as the action plugin sees it."""
    (folder / "group_vars").mkdir()
    (folder / "host_vars").mkdir()
    (folder / "hosts.yml").write_text("sparks: {hosts: {spark-1: {}}}\n", "utf-8")
    (folder / "group_vars" / "sparks.yml").write_text(group or "{}", "utf-8")
    (folder / "host_vars" / "spark-1.yml").write_text(host or "{}", "utf-8")
    loader = DataLoader()
    inventory = InventoryManager(loader, sources=[str(folder / "hosts.yml")])
    manager = VariableManager(loader, inventory)
    manager._extra_vars = {name: trust_as_template(value) for name, value in (command or {}).items()}
    variables = manager.get_vars(host=inventory.get_host("spark-1"))
    action = ActionModule(
        SimpleNamespace(args={}, async_val=0, action="spark_plan"),
        *(None, None, loader, Templar(loader, variables=variables), None),
    )
    values = {**action._values(variables), "sparkfleet_profile": profile}
    return dict(Target.of(Settings.of(settle(values))).engines[0].arguments)


def line(value: object, name: str = "max_num_seqs") -> str:
    return f"sparkfleet_vllm_{name}: {value}\n"


@pytest.mark.parametrize(
    ("given", "wins"),
    [
        ({}, MODEL),
        ({"profile": "low_latency"}, PROFILE),
        ({"profile": "low_latency", "group": line(GROUP)}, GROUP),
        ({"profile": "low_latency", "group": line(GROUP), "host": line(HOST)}, HOST),
        (
            {
                "profile": "low_latency",
                "group": line(GROUP),
                "host": line(HOST),
                "command": {"sparkfleet_vllm_max_num_seqs": str(COMMAND)},  # -e gives strings
            },
            COMMAND,
        ),
    ],
)
def test_the_stronger_wins(tmp_path: Path, given: dict[str, Any], wins: int) -> None:
    assert merged(tmp_path, **given)["max_num_seqs"] == wins


def test_arguments_merge_one_by_one(tmp_path: Path) -> None:
    """A host that sets one argument keeps what its group says of another."""
    found = merged(
        tmp_path,
        profile="low_latency",
        group=line(0.8, "gpu_memory_utilization") + line(4096, "max_model_len"),
        host=line("false", "enable_prefix_caching") + line("{mode: 3}", "compilation_config"),
        command={"sparkfleet_vllm_max_model_len": "2048", "seqs": "7", "sparkfleet_vllm_max_num_seqs": "{{ seqs }}"},
    )
    assert found["gpu_memory_utilization"] == 0.8
    assert found["max_model_len"] == 2048
    assert found["max_num_seqs"] == 7
    assert found["enable_prefix_caching"] is False
    assert found["compilation_config"] == {"mode": 3}
    assert found["max_num_batched_tokens"] == 8192  # of the profile


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("max_num_seqs", "many", "sparkfleet_vllm_max_num_seqs: must be a whole number from 1 to 65536, not 'many'"),
        ("max_num_seq", "8", "sparkfleet_vllm_max_num_seq: did you mean sparkfleet_vllm_max_num_seqs?"),
        ("gpu_memory_utilization", "1.2", "sparkfleet_vllm_gpu_memory_utilization: must be a share from 0.01 to 1"),
    ],
)
def test_wrong_values_name_the_variable(tmp_path: Path, name: str, value: str, complaint: str) -> None:
    with pytest.raises(SparkfleetError) as raised:
        merged(tmp_path, command={f"sparkfleet_vllm_{name}": value})
    assert complaint in str(raised.value)
