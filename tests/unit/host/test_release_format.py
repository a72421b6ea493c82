"""The format of a release's files and of a switch's journal, and what earlier versions wrote."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import (
    bounded,
    guard,
    release_format,
    releases,
)
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.bounded import BoundsError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.release_format import (
    GROUP_FORMAT,
    ON_DEMAND_FORMAT,
    Engine,
    NewerFormatError,
    check_journal,
    check_lock,
    check_outcome,
    check_plan,
    merged,
    storable,
)
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.releases import (
    NewerReleaseError,
    ReleaseError,
    Store,
)
from hypothesis import given
from hypothesis import strategies as st

from tests.unit import ROOT
from tests.unit.fakes import fake_release

ENGINE = fake_release.an_engine("vllm-m")
OTHER = fake_release.an_engine("vllm-b", 8001)
PLAN, LOCK = fake_release.flat(ENGINE)  # of format 1
DATA = ROOT / "tests" / "unit" / "data" / "format-1"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
OLD_JOURNAL = {  # as commit a6d52a1 wrote it
    **{"id": "abc", "mode": "deploy", "controller": "alice@laptop", "verb": "site.yml", "to": 2, "from": 1},
    **{"model": "new", "from_model": "old", "pid": 1, "boot_id": "b", "began": 1.0, "ended": None, "phase": "waiting"},
    **{"steps": [{"phase": "stopping", "at": 1.0}], "container": "vllm-new", "outcome": None, "error": None},
    **{"restore_error": None, "stopped_at": 1.5, "answering_at": None, "out_of_service_s": None, "verification": None},
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "project", tmp_path / "state", str(tmp_path / "run" / "switch.lock"))


# -- format 2 ----------------------------------------------------------------------------------------------------------


def test_plan_and_lock_are_an_engine_each() -> None:
    plan, lock = fake_release.plan(ENGINE, OTHER), fake_release.lock(ENGINE, OTHER, cache_dir="/opt/hf", more=5)
    assert check_plan(plan) == plan and check_lock(lock) == lock
    assert merged(plan, lock) == (Engine(**ENGINE), Engine(**OTHER))
    first = merged(plan, lock)[0]
    assert (first.url, first.decode_limit) == ("http://127.0.0.1:8000", 0.0)
    limited = {**ENGINE, "memory": {"decode_tok_s_limit": 25}}
    assert Engine(**limited).decode_limit == 25.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"engines": None}, "engines: not an array"),
        ({"engines": []}, "engines: there is none"),
        ({"engines": [ENGINE] * 17}, "engines: more than 16 items"),
        ({"engines": [ENGINE, {**OTHER, "service": "vllm-m"}]}, "two have the service vllm-m"),
        ({"engines": [5]}, "an engine: not an object"),
        ({"engines": [{**ENGINE, "service": "a b"}]}, "service"),
        ({"engines": [{**ENGINE, "service": "a/../b"}]}, "service"),
        ({"engines": [{**ENGINE, "service": "s" * 201}]}, "service"),
        ({"format": 6}, "format 6 was written by a newer version of Sparkfleet"),
        ({"format": 0}, "format"),
        ({"format": True}, "format"),
        ({"format": "2"}, "format"),
    ],
)
def test_what_is_no_list_of_engines(change: dict[str, Any], said: str) -> None:
    for check, whole in ((check_plan, fake_release.plan(ENGINE)), (check_lock, fake_release.lock(ENGINE))):
        with pytest.raises(BoundsError, match=said):
            check({**whole, **change})


def test_a_model_that_drafts_is_part_of_a_lock() -> None:
    draft = {"repo": "org/draft", "revision": "d" * 40}
    drafted = {**ENGINE, "draft": draft}
    assert check_lock(fake_release.lock(drafted))["engines"][0]["draft"] == draft
    assert merged(fake_release.plan(drafted), fake_release.lock(drafted))[0].draft == draft
    for bad in (5, {"repo": "../x", "revision": "d" * 40}, {"repo": "org/draft", "revision": "main"}):
        with pytest.raises(BoundsError, match="draft"):
            check_lock(fake_release.lock({**ENGINE, "draft": bad}))


def test_two_engines_have_two_ports_and_one_order() -> None:
    with pytest.raises(BoundsError, match="two have the port 8000"):
        check_lock(fake_release.lock(ENGINE, {**OTHER, "port": 8000}))
    plan = check_plan(fake_release.plan(ENGINE, OTHER))
    for lock in (fake_release.lock(OTHER, ENGINE), fake_release.lock(ENGINE)):
        with pytest.raises(BoundsError, match="vllm-m, vllm-b in the plan"):
            merged(plan, check_lock(lock))


@given(JSON | st.fixed_dictionaries({"format": st.sampled_from([1, 2, 3, None]), "engines": JSON | st.lists(JSON)}))
def test_any_json_is_a_release_or_refused(data: Any) -> None:
    for check in (check_plan, check_lock, check_outcome, check_journal):
        try:
            made = check(data)
        except BoundsError:
            continue
        assert json.loads(json.dumps(made)) == made


@given(
    st.lists(st.sampled_from(sorted({*ENGINE, "format"})), max_size=3, unique=True),
    st.lists(JSON, min_size=3, max_size=3),
    st.booleans(),
)
def test_a_release_that_is_read_is_whole(keys: list[str], values: list[Any], old: bool) -> None:
    """Whatever one of its fields holds: what passes has the form that everything else relies on."""
    odd = {**ENGINE, **dict(zip(keys, values, strict=False))}
    made = {key: odd.pop("format") for key in ("format",) if key in odd}
    plan, lock = fake_release.flat(odd) if old else (fake_release.plan(odd), fake_release.lock(odd))
    try:
        (engine,) = merged(check_plan({**plan, **made}), check_lock({**lock, **made}))
    except BoundsError:
        return
    assert release_format.SERVICE.fullmatch(engine.service) and 0 < engine.port < 65536
    assert engine.model and engine.repo and engine.decode_limit >= 0
    texts = (engine.profile, engine.revision, engine.image, *(engine.verify[key] for key in ("question", "expect")))
    assert all(isinstance(text, str) for text in texts) and isinstance(engine.verify["max_tokens"], int)


# -- what earlier versions wrote ---------------------------------------------------------------------------------------


@given(
    st.builds(
        fake_release.an_engine,
        st.from_regex(release_format.SERVICE, fullmatch=True),
        st.integers(1, 65535),
        model=st.text(min_size=1, max_size=9),
        repo=st.text(min_size=1, max_size=9),
        revision=st.text(max_size=9),
        memory=st.none() | st.fixed_dictionaries({"decode_tok_s_limit": st.none() | st.floats(0, 1e9)}),
    )
)
def test_a_release_of_format_1_is_the_same_as_one_of_format_2(engine: dict[str, Any]) -> None:
    plan, lock = fake_release.flat(engine, cache_dir="/opt/hf", number=7, created=1.0, sha256={})
    before = copy.deepcopy((plan, lock))
    assert check_plan(plan) == check_plan(fake_release.plan(engine))
    assert check_lock(lock) == check_lock(
        fake_release.lock(engine, cache_dir="/opt/hf", number=7, created=1.0, sha256={}),
    )
    assert merged(check_plan(plan), check_lock(lock)) == (Engine(**engine),) and (plan, lock) == before


@pytest.fixture
def upgraded(store: Store) -> Store:
    """A host with what commit 154d8bb left: release 2 serves, release 1 did before."""
    shutil.copytree(DATA / "releases", store.project_dir / "releases")
    store.state_dir.mkdir()
    for name in ("switch.json", "guard-state.json", "last-release"):
        shutil.copy(DATA / name, store.state_dir)
    releases.link(store.project_dir / "current", "releases/2")
    return store


LLAMA, QWEN = "vllm-llama31-8b-fp8", "vllm-qwen3-8b-fp8"


def test_the_releases_of_a_host_that_is_upgraded(upgraded: Store) -> None:
    files = {path: path.read_bytes() for path in upgraded.project_dir.rglob("*") if path.is_file()}
    assert upgraded.repair_all() == [] and upgraded.set_aside_files() == []
    assert (upgraded.current(), upgraded.previous(), upgraded.next_number()) == (2, 1, 3)
    (engine,) = upgraded.engines(2)
    assert (engine.service, engine.model, engine.repo) == (QWEN, "qwen3-8b-fp8", "Qwen/Qwen3-8B-FP8")
    assert (engine.port, engine.revision, engine.decode_limit) == (8000, "a" * 40, 31.5)
    assert engine.image == "nvcr.io/nvidia/vllm@sha256:" + "1" * 64 and engine.verify["expect"] == "Paris"
    outcomes = [(upgraded.outcome(number) or {})["container_ids"] for number in (1, 2)]
    assert outcomes == [{LLAMA: "ab" * 32}, {QWEN: "cd" * 32}]
    summary = upgraded.summary()
    assert summary["damaged"] == {} and summary["locks"]["1"]["engines"][0]["service"] == LLAMA
    assert summary["switch"]["models"] == ["qwen3-8b-fp8"] and summary["switch"]["from_models"] == ["llama31-8b-fp8"]
    upgraded.seal(2)
    assert files == {path: path.read_bytes() for path in upgraded.project_dir.rglob("*") if path.is_file()}


def test_an_upgrade_stages_no_release_that_is_there(upgraded: Store) -> None:
    compose, (engine,) = upgraded.compose_file(2).read_text(), upgraded.engines(2)
    made = {key: getattr(engine, key) for key in ("service", "model", "profile", "repo", "image", "verify", "memory")}
    plan = {"format": 2, "engines": [{**made, "memory": {"kv_cache_gib": 12.0}}]}
    assert upgraded.find(compose, plan) == 2
    assert upgraded.find(compose, {"format": 2, "engines": [{**made, "profile": "latency"}]}) is None


def test_the_journal_and_the_guard_s_state_of_an_earlier_version(upgraded: Store) -> None:
    journal = upgraded.switch()
    assert journal and journal["outcome"] == "verified" and journal["kept"] == journal["services"] == []
    assert [*journal["container_ids"].values()] == ["cd" * 32]
    assert [found["answer"] for found in journal["verifications"].values()] == ["Paris."]
    assert not {"model", "from_model", "container_id", "verification"} & {*journal}
    upgraded.write_switch(journal)
    assert upgraded.switch() == journal
    state, problem = guard.read_state(upgraded.state_dir, QWEN)
    assert state and problem == "" and state["engines"][QWEN]["restarts_total"] == {"crash": 1}
    assert (state["release"], state["clock"]) == (2, 802.0)


def test_a_release_of_a_newer_version_stays_as_it_is(store: Store) -> None:
    number = store.stage("services: {}\n", fake_release.plan(ENGINE), fake_release.lock(ENGINE))
    folder = store.folder(number)
    for name in ("plan.json", "lock.json"):
        (folder / name).chmod(0o644)
        (folder / name).write_text(json.dumps({"format": 6, "engines": {}}))
    (folder / ".sealed.json").unlink()
    with pytest.raises(NewerReleaseError, match=r"plan\.json: format 6 was written by a newer version of Sparkfleet"):
        store.repair(number)
    assert store.numbers() == [number] and "newer version" in store.repair_all()[0] and store.set_aside_files() == []
    with pytest.raises(NewerReleaseError):
        store.engines(number)
    with pytest.raises(NewerFormatError):
        check_plan({"format": 6})
    assert issubclass(NewerReleaseError, ReleaseError)
    assert "newer version" in store.summary()["damaged"][str(number)] and store.find("services: {}\n", PLAN) is None


def test_a_version_that_would_start_every_engine_does_not_read_a_plan_with_engines_on_demand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a format of its own; that of any other release stays as it was."""
    plain = fake_release.plan(ENGINE)
    in_turn = {**fake_release.plan({**ENGINE, "on_demand": {"port": 8001}}), "format": ON_DEMAND_FORMAT}
    assert check_plan(in_turn)["engines"][0]["on_demand"]["port"] == 8001
    assert check_plan({**in_turn, "format": 2})["engines"][0]["on_demand"]  # of the first versions that had it
    with pytest.raises(BoundsError, match="on_demand: of no engine in a plan of format 5"):
        check_plan({**plain, "format": ON_DEMAND_FORMAT})
    monkeypatch.setattr(release_format, "NEWEST", GROUP_FORMAT)
    assert check_plan(plain)["format"] == 2
    with pytest.raises(NewerFormatError, match="format 5 was written by a newer version of Sparkfleet"):
        check_plan(in_turn)


# -- fields, each ------------------------------------------------------------------------------------------------------


def with_(data: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """`data` with another member; `path` is a.b."""
    first, _, rest = path.partition(".")
    return {**data, first: with_(data.get(first) or {}, rest, value) if rest else value}


@pytest.mark.parametrize(
    ("path", "good", "bad"),
    [
        ("model", ["m" * 1000], ["", None, "m" * 1001]),
        ("repo", ["r"], ["", None]),
        ("service", ["s"], ["", None]),
        ("verify", [], [None, []]),
        ("verify.question", ["", "q"], [None, 5]),
        ("verify.expect", ["e"], [None]),
        ("verify.prompt", ["p"], [None]),
        ("verify.prompt_expect", ["e"], [None]),
        ("verify.max_tokens", [1, 1 << 20], [0, (1 << 20) + 1, "x"]),
        ("memory", [None, {}, {"decode_tok_s_limit": None}], [5, []]),
        ("memory.decode_tok_s_limit", [0, 25.5], [-1, "x"]),
    ],
)
def test_the_form_of_a_plan(path: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert check_plan(with_(PLAN, path, value))
    for value in bad:
        with pytest.raises(BoundsError, match=path.rpartition(".")[2]):
            check_plan(with_(PLAN, path, value))
    questions = {key: value for key, value in PLAN["verify"].items() if key != "max_tokens"}
    assert check_plan({**PLAN, "verify": questions})


@pytest.mark.parametrize(
    ("path", "good", "bad"),
    [
        ("port", [1, 65535], [0, 65536, None]),
        ("service", ["s" * 200], ["s" * 201, None]),
        *((key, [None, "x" * 4096], ["x" * 4097, 5]) for key in ("model", "profile", "repo", "revision", "image")),
        ("controller", [None, "alice@laptop"], [5]),
        ("sha256", [{}, {"plan.json": "a" * 64}], [None, {"plan.json": "x"}]),
        ("sha256", [], [{name: "a" * 64} for name in ("", "a\0b", "\ud800", "../x", "lock.json", "x" * 100_000)]),
    ],
)
def test_the_form_of_a_lock(path: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert check_lock(with_(LOCK, path, value))
    for value in bad:
        with pytest.raises(BoundsError, match=path):
            check_lock(with_(LOCK, path, value))


@pytest.mark.parametrize(
    ("path", "good", "bad"),
    [
        ("state", ["verified", "failed"], [None, "fine"]),
        ("at", [0, 1.5], [None, -1, "x"]),
        ("verified_at", [None, 0], [-1, "x"]),
        *((key, [None, ""], [5]) for key in ("failure", "message", "container_id")),
        ("container_ids", [{}, {"a": "b"}], [None, [], {"a": 5}, {str(number): "x" for number in range(17)}]),
    ],
)
def test_the_form_of_an_outcome(path: str, good: list[Any], bad: list[Any]) -> None:
    outcome = {"state": "failed", "at": 1.0}
    for value in good:
        assert check_outcome(with_(outcome, path, value))
    for value in bad:
        with pytest.raises(BoundsError, match=path):
            check_outcome(with_(outcome, path, value))


ERROR = {"message": "vllm ended"}
STEP = {"phase": "p", "at": 1.0}


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=10)
    | st.sampled_from([b"bytes", {1, 2}, 10**400, "\ud800", "x" * 70_000, float("nan"), object()]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=8,
)


@given(
    odd=st.dictionaries(st.sampled_from(sorted(release_format._JOURNAL)), ANY, max_size=5),
    error=st.dictionaries(st.sampled_from(["failure", "log", "state", "exit_code", "checks", "message"]), ANY),
)
def test_whatever_is_in_a_journal_it_is_written_and_understood(
    odd: dict[str, Any], error: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("store")
    store = Store(folder / "project", folder / "state", str(folder / "lock"))
    journal = {**OLD_JOURNAL, "error": {"message": "vllm ended", **error}, **odd, "phase": "waiting"}
    for write in (store.write_switch, store.spare_switch):
        write(journal)
        read = store.switch()
        assert read and (read["to"], read["phase"]) == (OLD_JOURNAL["to"], "waiting") and not store.switch_damage()
        if "error" not in odd:
            assert read["error"] and isinstance(read["error"]["message"], str)
        written = [path for path in (folder / "state" / "switch.json", folder / "switch-spare.json") if path.exists()]
        assert all(path.stat().st_size < 9 * bounded.MIB for path in written)


@pytest.mark.parametrize("character", ["x", "\x00", "\ud800", "\u20ac", "\U0001f600"])
def test_a_journal_with_long_logs_is_understood(store: Store, character: str) -> None:
    """A switch that was cut is ended only if its journal is."""
    error = {"message": character * 1_000_000, "failure": "start-timeout", "log": [character * 4000] * 10_500}
    journal = {**OLD_JOURNAL, "error": error, "restore_error": error, "verification": {"answer": character * 10**7}}
    journal["left"] = [character * 5000]
    store.write_switch({**journal, "phase": "restoring"})
    read = store.switch()
    assert read and read["phase"] == "restoring" and read["error"]["failure"] == "start-timeout"
    assert read["error"]["message"].startswith(character) and len(read["error"]["log"]) == 400
    assert (store.state_dir / "switch.json").stat().st_size <= bounded.STATE_FILE


def test_a_journal_that_nests_without_end_is_written(store: Store) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    circle: dict[str, Any] = {}
    circle["circle"] = circle
    store.write_switch({**OLD_JOURNAL, "verification": circle, "more": deep})
    assert (store.switch() or {})["phase"] == OLD_JOURNAL["phase"]
    while deep:
        deep = deep.pop()


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("to", [0, 10**9], [None, -1, 10**9 + 1]),
        ("from", [None, 0, 10**9], [-1, 10**9 + 1]),
        ("pid", [0, 10**9], [None, -1]),
        ("phase", ["p"], [None, 5]),
        ("outcome", [None, "verified"], [5]),
        ("began", [0, 1.5], [None, -1]),
        ("ended", [None, 1.5], ["x"]),
        (
            "steps",
            [[], [STEP] * 1000, [{"phase": "p" * 100, "at": 0}]],
            [[STEP] * 1001, [{"phase": "p" * 101, "at": 0}]],
        ),
        ("steps", [], [[{"phase": "p"}], [{"at": 1}], [5], None]),
        ("error", [None, ERROR, {**ERROR, "log": ["x"] * 10_000}], [[], {}, {**ERROR, "log": ["x"] * 10_001}]),
        ("error", [{**ERROR, "exit_code": -(1 << 31)}], [{**ERROR, "exit_code": -(1 << 31) - 1}]),
        ("error", [{**ERROR, "checks": [{}] * 100}], [{**ERROR, "checks": [{}] * 101}, {**ERROR, "checks": [5]}]),
        ("restore_error", [{**ERROR, "failure": None, "state": "x"}], [{**ERROR, "failure": 5}, {**ERROR, "log": [5]}]),
        ("restore_error", [{**ERROR, "restart_count": 2}], [{**ERROR, "restart_count": "x"}]),
        *((key, [[], ["m"] * 16], [None, [5], ["m"] * 17]) for key in ("models", "from_models", "kept", "services")),
        ("container_ids", [{"a": "b"}], [[], {"a": 5}]),
        ("verifications", [{"a": {}}], [[], {"a": 5}, {str(number): {} for number in range(17)}]),
    ],
)
def test_the_form_of_a_journal(key: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert check_journal({**OLD_JOURNAL, key: value})[key] == value
    for value in bad:
        with pytest.raises(BoundsError, match=key):
            check_journal({**OLD_JOURNAL, key: value})


def test_what_a_journal_lacks_is_its_own() -> None:
    """A guard reads many in its life."""
    check_journal({"to": 3})["troubles"].append("the disk is full")
    storable({"to": 3, "troubles": 5})["troubles"].append("the disk is full")
    assert check_journal({"to": 3})["troubles"] == []


def test_what_a_journal_lacks() -> None:
    texts = ("id", "mode", "controller", "verb", "boot_id", "phase", "container", "verify", "asking")
    nothing = ("from", "outcome", "ended", "stopped_at", "answering_at", "out_of_service_s", "error", "restore_error")
    lists = ("models", "from_models", "services", "kept", "steps", "left", "reclaimed", "repaired", "troubles")
    assert check_journal({"to": 3, "more": 5}) == {
        **{"to": 3, "more": 5, "pid": 0, "keep": 0, "start_timeout": 0.0, "verify_seconds": 0.0, "began": 0.0},
        **{"joined": False, "container_ids": {}, "verifications": {}, "measured": {}},
        **{key: [] for key in lists},
        **dict.fromkeys(texts, ""),
        **dict.fromkeys(nothing),
    }


def test_a_journal_of_format_1_whose_container_is_no_text_is_refused() -> None:
    with pytest.raises(BoundsError, match="container"):
        check_journal({"to": 3, "from": 2, "model": "m", "container": {"a": 1}, "container_id": "x"})


def test_what_an_engine_is_asked_is_a_list_of_kinds() -> None:
    made = fake_release.an_engine("vllm-m", verify={**fake_release.VERIFY, "kinds": ["chat", "of a later version"]})
    (engine,) = check_plan(fake_release.plan(made))["engines"]
    assert engine["verify"]["kinds"] == ["chat", "of a later version"]
    before = {key: value for key, value in fake_release.VERIFY.items() if key != "kinds"}
    (engine,) = check_plan(fake_release.plan({**made, "verify": before}))["engines"]
    assert engine["verify"]["kinds"] == []
    for kinds in ("chat", [5], ["x" * 101], ["x"] * 101, None):
        with pytest.raises(BoundsError, match=r"verify\.kinds"):
            check_plan(fake_release.plan({**made, "verify": {**before, "kinds": kinds}}))
