"""playbooks/rotate.yml itself, run by ansible-playbook; what acts on a Spark has a stand-in."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.collection import overlay
from tests.unit.fakes import fake_hub
from tests.unit.fakes.fake_hub import Hub
from tests.unit.playbooks import test_rollout

ROTATE = "playbooks/rotate.yml"
OLD, NEW = "hf_the-token-before", "hf_the-token-after"
#: Says what was searched for, and finds it where `found` says.
SEARCH = """
import json, os
from pathlib import Path
from ansible.plugins.action import ActionBase

class ActionModule(ActionBase):
    def run(self, tmp=None, task_vars=None):
        folder, host = Path(os.environ["STAND_IN"]), task_vars["inventory_hostname"]
        with open(folder / "searched", "a") as file:
            file.write(json.dumps([self._task.delegate_to or host, self._task.args["values"]]) + "\\n")
        found = json.loads((folder / "found").read_text()).get(self._task.delegate_to or host, [])
        return {"changed": False, "found": found, "searched": 7, "unfinished": False}
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with fake_hub.serve(Hub(accounts={NEW: "alice"})) as served:
        yield served


@pytest.fixture
def fleet(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> test_rollout.Fleet:
    def with_search(folder: Path, replaced: dict[str, str]) -> Path:
        return overlay(folder, {**replaced, "action/secret_search.py": SEARCH})

    monkeypatch.setattr(test_rollout, "overlay", with_search)
    made = test_rollout.Fleet(tmp_path, 2)
    (tmp_path / "found").write_text("{}")
    token = tmp_path / "hf_token"
    token.write_text(f"{OLD}\n")
    made.inventory(
        sparkfleet_hf_token={"env": "THE_TOKEN"},
        sparkfleet_hf_token_file=str(token),
        sparkfleet_hub_endpoint=hub.url,
    )
    monkeypatch.setenv("THE_TOKEN", NEW)
    return made


def searched(fleet: test_rollout.Fleet) -> list[Any]:
    path = fleet.folder / "searched"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def token(fleet: test_rollout.Fleet, *words: str) -> tuple[int, str]:
    return fleet.run("-e", "sparkfleet_rotate=hub_token", *words, playbook=ROTATE)


def test_a_token_is_replaced_and_every_host_searched_for_the_old_one(fleet: test_rollout.Fleet) -> None:
    code, printed = token(fleet, "-vvv")
    assert code == 0, printed
    assert (fleet.folder / "hf_token").read_text() == f"{NEW}\n"
    assert sorted(searched(fleet)) == [["localhost", [OLD]], ["s1", [OLD]], ["s2", [OLD]]]
    assert "7 places searched, 0 with the old secret" in printed
    assert OLD not in printed and NEW not in printed
    (fleet.folder / "searched").unlink()
    code, printed = token(fleet)
    assert code == 0 and "there was no other secret" in printed and searched(fleet) == []


def test_a_token_that_the_hub_does_not_accept_replaces_none(fleet: test_rollout.Fleet, hub: Hub) -> None:
    hub.accounts.clear()
    code, printed = token(fleet, "-vvv")
    said = " ".join(printed.split())
    assert code == 2 and f"{hub.url} does not accept the new token (401): create a read token" in said, printed
    assert ("/api/whoami-v2", f"Bearer {NEW}") in hub.tokens_seen
    assert OLD not in printed and NEW not in printed and searched(fleet) == []
    assert (fleet.folder / "hf_token").read_text() == f"{OLD}\n"
    hub.tokens_seen.clear()
    code, printed = token(fleet, "-e", "sparkfleet_bundle=/media/bundle")  # there is no Hub to ask
    assert code == 0 and hub.tokens_seen == [] and (fleet.folder / "hf_token").read_text() == f"{NEW}\n", printed


def test_a_copy_that_is_left_is_an_error_that_names_its_place(fleet: test_rollout.Fleet) -> None:
    (fleet.folder / "found").write_text(json.dumps({"s2": ["/home/a/notes"], "localhost": ["/tmp/x"]}))
    code, printed = token(fleet)
    text = " ".join(printed.split())
    assert code == 2 and "s2: the new secret is in use, but copies of the old one are left /home/a/notes" in text
    assert "on this controller /tmp/x" in text and OLD not in printed


def test_nothing_changes_in_check_mode(fleet: test_rollout.Fleet) -> None:
    code, printed = token(fleet, "--check")
    assert code == 0 and "changed=1" in printed, printed
    assert (fleet.folder / "hf_token").read_text() == f"{OLD}\n" and searched(fleet) == []


def test_no_token_and_a_server_with_the_token_itself_are_refused(fleet: test_rollout.Fleet) -> None:
    code, printed = token(fleet, "-e", "sparkfleet_model_source=hub")
    assert code == 2 and "deploy the new one with `sparkfleet rollout`" in " ".join(printed.split())
    code, printed = token(fleet, "-e", "sparkfleet_hf_token=")
    assert code == 2 and "sparkfleet_hf_token is not set" in " ".join(printed.split())
    assert (fleet.folder / "hf_token").read_text() == f"{OLD}\n"


def test_the_engines_key_is_rolled_out_in_waves(fleet: test_rollout.Fleet) -> None:
    code, printed = fleet.run(playbook=ROTATE)
    assert code == 0, printed
    assert fleet.released() == ["s1", "s2"]


def test_the_gateways_know_both_keys_before_the_first_spark_has_the_new_one(fleet: test_rollout.Fleet) -> None:
    fleet.inventory(gateways=("g1",))
    own = {"ansible_become": False, "ansible_python_interpreter": sys.executable}
    _, printed = fleet.run("-e", json.dumps(own), playbook=ROTATE)
    assert fleet.log("gateway_plan"), printed
    calls = [json.loads(line) for line in (fleet.folder / "log").read_text().splitlines()]
    first = next(entry for entry in calls if entry["name"] in ("gateway_plan", "haproxy_server", "release_switch"))
    assert (first["host"], first["name"]) == ("g1", "gateway_plan")
    assert first["rotating"] == {"engine_keys": "", "client": ""}


def test_more_than_the_key_is_not_rolled_out_with_it(fleet: test_rollout.Fleet) -> None:
    code, printed = fleet.run(playbook=ROTATE, fetches={"s2": ["image"]})
    assert code == 2 and "s2: more than the key differs from the inventory" in " ".join(printed.split()), printed
    assert fleet.released() == []


def test_a_client_has_its_key_at_a_gateway(fleet: test_rollout.Fleet) -> None:
    code, printed = fleet.run("-e", "sparkfleet_rotate=client_key sparkfleet_client=web", playbook=ROTATE)
    assert code == 2 and "The inventory has no gateway (group gateways)" in printed, printed
