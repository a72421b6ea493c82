"""What GitHub reads (workflows, forms, updates), and what a release is made of. GitHub itself cannot be run here."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tomllib
import yaml

import sparkfleet
from tests.unit import ROOT, pages

FOLDER = ROOT / ".github"
WORKFLOWS = sorted((FOLDER / "workflows").glob("*.yml"))


def load(path: Path) -> dict[str, Any]:
    """A workflow; YAML 1.1 reads its key `on` as true."""
    found: dict[Any, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {"on" if key is True else key: value for key, value in found.items()}


CI, RELEASE = load(FOLDER / "workflows" / "ci.yml"), load(FOLDER / "workflows" / "release.yml")


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def runs(job: dict[str, Any]) -> list[list[str]]:
    """The commands of a job, once for each entry of its matrix."""
    matrix = job.get("strategy", {}).get("matrix", {})
    entries = matrix.get("include") or [
        {name: value} for name, values in matrix.items() for value in values if name != "include"
    ]
    found: list[list[str]] = []
    for step in job["steps"]:
        for entry in entries or [{}]:
            line = step.get("run", "")
            for name, value in entry.items():
                line = line.replace(f"${{{{ matrix.{name} }}}}", value)
            found += [words for words in pages.commands(line) if words not in found]
    return found


def test_workflows_are_all_looked_at() -> None:
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "release.yml"]


@pytest.mark.parametrize("workflow", [CI, RELEASE], ids=["ci", "release"])
def test_each_job_has_a_limit_and_actions_of_a_major_version(workflow: dict[str, Any]) -> None:
    assert set(workflow) <= {"name", "on", "permissions", "concurrency", "jobs"}
    for name, job in workflow["jobs"].items():
        assert set(job) <= {"name", "runs-on", "timeout-minutes", "permissions", "strategy", "steps"}, name
        assert 0 < job["timeout-minutes"] <= 60 and job["runs-on"] == "ubuntu-24.04", name
    for step in steps(workflow):
        assert ("uses" in step) != ("run" in step), step
        if "uses" in step:
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"]), step
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"] == {"persist-credentials": False}
        # What someone names (a branch, a title, a tag) is never pasted into a shell.
        assert not re.search(r"\$\{\{(?! matrix\.)", step.get("run", "")), step


def test_permissions_are_the_least() -> None:
    assert CI["permissions"] == {"contents": "read"} and not any("permissions" in job for job in CI["jobs"].values())
    assert RELEASE["permissions"] == {}
    assert [job.get("permissions") for job in RELEASE["jobs"].values()] == [{"contents": "write"}]
    assert "pull_request_target" not in CI["on"] and "pull_request" in CI["on"]
    assert RELEASE["on"] == {"push": {"tags": ["v*"]}}


def test_every_part_of_scripts_test_is_a_job() -> None:
    folders = {path.parent.name for path in (ROOT / "molecule").glob("*/molecule.yml")}
    assert folders == set(pages.scenarios()) and len(pages.scenarios()) == len(folders)
    assert list(CI["jobs"]) == ["lint", "unit", "molecule"]
    assert CI["jobs"]["molecule"]["strategy"]["matrix"]["scenario"] == pages.scenarios()
    called = {
        name: [words for words in runs(job) if words[0].startswith("scripts/")] for name, job in CI["jobs"].items()
    }
    assert called["lint"] == [["scripts/test", "lint"]] and called["unit"] == [["scripts/test", "unit"]]
    assert called["molecule"] == [["scripts/test", "molecule", name] for name in pages.scenarios()]
    for job in (*CI["jobs"].values(), *RELEASE["jobs"].values()):
        for words in runs(job):
            assert words[0] in ("sudo", "apt-get", "gh") or pages.wrong(words) == "", words


def test_every_version_is_tested_in_a_pair_that_exists() -> None:
    matrix = CI["jobs"]["unit"]["strategy"]["matrix"]["include"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    meta = yaml.safe_load((ROOT / "meta" / "runtime.yml").read_text(encoding="utf-8"))
    assert {pair["python"] for pair in matrix} == {"3.11", "3.12", "3.13"} and project["requires-python"] == ">=3.11"
    assert {pair["core"] for pair in matrix} == {"2.19", "2.20", "2.21"}
    assert meta["requires_ansible"].startswith(">=2.19")
    for pair in matrix:
        assert not (pair["python"] == "3.11" and pair["core"] != "2.19"), f"{pair}: ansible-core needs a newer Python"
    (step,) = (step for step in CI["jobs"]["unit"]["steps"] if step.get("run") == "scripts/test unit")
    assert step["env"] == {"SPARKFLEET_ANSIBLE_CORE": "${{ matrix.core }}"}
    assert "SPARKFLEET_ANSIBLE_CORE" in (ROOT / "scripts" / "lib.sh").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_a_form_asks_what_is_needed(name: str) -> None:
    form = yaml.safe_load((FOLDER / "ISSUE_TEMPLATE" / f"{name}.yml").read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(form)
    asked = {item["id"]: item for item in form["body"] if item["type"] != "markdown"}
    assert len(asked) == len([item for item in form["body"] if item["type"] != "markdown"])
    for item in asked.values():
        assert item["type"] in ("textarea", "input", "dropdown") and item["attributes"]["label"]
    if name == "bug":
        assert asked["diagnose"]["validations"]["required"] and asked["version"]["validations"]["required"]
    text = yaml.safe_dump(form, width=10**6)
    quoted = re.findall(r"`(sparkfleet [^`]*)`", text)
    assert [problem for words in quoted if (problem := pages.wrong_words(words))] == []
    assert "sparkfleet diagnose" in quoted or name != "bug"


def test_links_of_the_forms_lead_somewhere() -> None:
    text = (FOLDER / "ISSUE_TEMPLATE" / "config.yml").read_text(encoding="utf-8")
    links = [item["url"] for item in yaml.safe_load(text)["contact_links"]]
    assert len(links) == 2
    assert list(pages.wrong_links(FOLDER / "x.md", pages.Page(links=links))) == []


def test_dependabot_looks_at_actions_and_pins() -> None:
    found = yaml.safe_load((FOLDER / "dependabot.yml").read_text(encoding="utf-8"))
    assert found["version"] == 2
    assert [entry["package-ecosystem"] for entry in found["updates"]] == ["github-actions", "pip"]
    assert all(entry["directory"] == "/" and entry["schedule"]["interval"] for entry in found["updates"])


def test_hooks_run_what_the_project_pins() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert repository["repo"] == "local"
    assert [hook["id"] for hook in repository["hooks"]] == ["ruff", "ruff-format", "yamllint", "codespell"]
    for hook in repository["hooks"]:
        program = hook["entry"].split()[0]
        assert hook["language"] == "system" and program.startswith(".venv/bin/"), hook["id"]
        assert re.search(rf"^{program.rpartition('/')[2]}==", pinned, re.MULTILINE), hook["id"]


def test_all_that_is_needed_for_tests_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in lines)
    assert lines == sorted(lines, key=str.lower)
    pinned = {re.sub("[._-]+", "-", line.partition("==")[0]).lower() for line in lines}
    wanted = {*project["dependencies"], *project["optional-dependencies"]["test"]}
    assert {re.sub("[._-]+", "-", name).lower() for name in wanted} <= pinned


def versions() -> dict[str, str]:
    changelog = yaml.safe_load((ROOT / "changelogs" / "changelog.yaml").read_text(encoding="utf-8"))["releases"]
    newest = max(changelog, key=lambda version: [int(part) for part in version.split(".")])
    return {
        "the package": sparkfleet.__version__,
        "galaxy.yml": yaml.safe_load((ROOT / "galaxy.yml").read_text(encoding="utf-8"))["version"],
        "pyproject.toml": tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"],
        "changelog.yaml": newest,
    }


def test_versions_agree_and_the_changelog_is_rendered() -> None:
    found = versions()
    assert found["galaxy.yml"] == found["pyproject.toml"]
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## v{found['changelog.yaml']}".replace(".", "\\.") in text


def checkout(folder: Path) -> Path:
    """What scripts/release reads before it builds anything, in a folder of its own."""
    for name in ("scripts/release", "scripts/lib.sh", "galaxy.yml", "pyproject.toml", "changelogs/changelog.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "changelogs" / "fragments").mkdir()
    return folder


def refused(folder: Path, *words: str) -> str:
    """What scripts/release says as it ends before it has set anything up."""
    done = subprocess.run([folder / "scripts" / "release", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not (folder / ".venv").exists() and not (folder / "dist").exists()
    return done.stderr


def test_a_release_of_another_version_is_refused(tmp_path: Path) -> None:
    folder, version = checkout(tmp_path), versions()["galaxy.yml"]
    for words in ((), ("0.2.0",), ("v0.2",), (f"v{version}", "x"), ("v0.2.0; id",)):
        assert "usage: scripts/release vX.Y.Z" in refused(folder, *words)
    assert f"galaxy.yml says version {version}, the tag 9.9.9" in refused(folder, "v9.9.9")
    galaxy = (folder / "galaxy.yml").read_text(encoding="utf-8").replace(f"version: {version}", "version: 9.9.9")
    (folder / "galaxy.yml").write_text(galaxy, encoding="utf-8")
    assert f"pyproject.toml says version {version}, the tag 9.9.9" in refused(folder, "v9.9.9")
    project = (folder / "pyproject.toml").read_text(encoding="utf-8").replace(f'"{version}"', '"9.9.9"', 1)
    (folder / "pyproject.toml").write_text(project, encoding="utf-8")
    assert "changelog.yaml has no release 9.9.9" in refused(folder, "v9.9.9")
    (folder / "changelogs" / "fragments" / "x.yml").write_text("---\n", encoding="utf-8")
    assert "changes that are in no release" in refused(folder, "v9.9.9")


@pytest.mark.parametrize(
    "words", [["slow"], ["fast", "x"], ["molecule", "no"], ["molecule", "default", "x"], ["unit", "x"]]
)
def test_scripts_test_says_what_it_takes(words: list[str]) -> None:
    done = subprocess.run([ROOT / "scripts" / "test", *words], capture_output=True, text=True, check=False)
    assert (
        done.returncode == 1 and "usage: scripts/test [all | fast | lint | unit | versions | molecule [" in done.stderr
    )
    assert "|".join(pages.scenarios()) in done.stderr
    assert not pages.accepted_by_test(words)


def test_a_series_of_ansible_is_a_series(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    command = ["bash", "-c", "source scripts/lib.sh && setup test"]
    environment = {"PATH": "/usr/bin:/bin", "SPARKFLEET_ANSIBLE_CORE": "2.21.*/;s/x/y"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "is a series of ansible-core" in done.stderr
