"""Every page of the repository: its links, its anchors, its commands; and the docs as a site."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.unit import ROOT, pages

PAGES = pages.pages()
MISSPELLED = "".join(("rec", "ieve"))  # in two parts: codespell reads this file too


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_is_right(path: Path) -> None:
    page = pages.read(path.read_text(encoding="utf-8"))
    assert [*pages.wrong_links(path, page), *pages.wrong_commands(page)] == []


def test_all_pages_are_looked_at() -> None:
    names = {str(path.relative_to(ROOT)) for path in PAGES}
    expected = {"README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs/roles.md", "simulator/README.md"}
    assert names >= expected | {"docs/decisions/index.md", ".github/pull_request_template.md", "roles/vllm/README.md"}
    assert not [name for name in names if name.startswith((".venv", "collections", ".sparkfleet", "dist"))]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[x](roles.md)", ""),
        ("[x](role.md)", "there is no docs/role.md"),
        ("[x](../README.md#where-to-look-next)", ""),
        ("[x](../README.md#where-to-look)", "no such anchor"),
        ("# A `b` c, d-e\n\n# A b c, d-e\n\n[x](#a-b-c-d-e-1)", ""),
        ("# A\n\n[x](#b)", "no such anchor"),
        ("| a |\n| --- |\n| [x](no.md) |", "there is no docs/no.md"),
        ("![x](architecture.png)", "there is no docs/architecture.png"),
        ('<img src="architecture.svg"> <a id="here"></a> [x](#here)', ""),
        ('<img src="picture.svg">', "there is no docs/picture.svg"),
        ("[x](/docs/roles.md)", "it is absolute"),
        ("[x](../../x.md)", "it leaves the repository"),
        ("[x](https://example.org/no#such)", ""),
        ("[x](https://github.com/sparkfleet/sparkfleet/blob/main/docs/no.md)", "there is no docs/no.md"),
        ("[x](https://github.com/sparkfleet/sparkfleet/blob/main/docs/roles.md#no)", "no such anchor"),
    ],
)
def test_a_wrong_link_is_noticed(text: str, wrong: str) -> None:
    found = list(pages.wrong_links(ROOT / "docs" / "d.md", pages.read(text)))
    assert [line.partition(": ")[2] for line in found if wrong] == ([wrong] if wrong else []), found
    assert bool(found) == bool(wrong)


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("sparkfleet status --watch 5   # a comment", ""),
        ("sparkfleet statsu", "invalid choice"),
        ("sparkfleet status --wach", "unrecognized arguments"),
        ("sparkfleet status | sparkfleet no", "invalid choice"),
        ("sparkfleet upgrade", "the following arguments are required"),
        ("sparkfleet plan llama31-8b-fp8 --total-gib 100", ""),
        ("sparkfleet plan llama31-8b-fp9", "no model llama31-8b-fp9"),
        ("sparkfleet deploy -e sparkfleet_modell=x", "did you mean sparkfleet_model?"),
        ("sparkfleet init inventory/lab --yes 192.0.2.1", ""),
        ("ansible-playbook -i inventory/mine site.yml --tags preflight", ""),
        ("ansible-playbook sparkfleet.dgx.verify", ""),
        ("ansible-playbook sites.yml", "there is no sites.yml"),
        ("ansible-playbook sparkfleet.dgx.ask", "there is no playbooks/ask.yml"),
        ("ansible-playbook site.yml --tag preflight --chek", "unrecognized arguments"),
        ("ansible-playbook site.yml --tags prefligt", "no tag prefligt"),
        ("ansible-playbook site.yml -e sparkfleet_modell=x", "did you mean sparkfleet_model?"),
        ("HF_TOKEN=x scripts/setup && scripts/no", "there is no scripts/no"),
        ("scripts/lib.sh", "is not executable"),
        ("scripts/test molecule default", ""),
        ("scripts/test molecule no", "does not take"),
        ("scripts/test slow", "does not take"),
        ("molecule test -s fleet", ""),
        ("molecule test -s flet", "no scenario flet"),
        ("python -m simulator up --sparks 2", ""),
        ("python -m simulator upp", "invalid choice"),
        ("python -m simulator.fleet --only cost", ""),
        ("python -m simulator.fleet --onyl cost", "unrecognized arguments"),
        ("python -m simulator.flet", "no module simulator.flet"),
        ("pytest tests/unit/no", "there is no tests/unit/no"),
        ("sparkflet status", "no program that is known"),
    ],
)
def test_a_wrong_command_is_noticed(command: str, wrong: str) -> None:
    found = list(pages.wrong_commands(pages.read(f"```console\n$ {command}\n```\n")))
    assert bool(found) == bool(wrong) and (not wrong or wrong in found[0]), found


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("`sparkfleet rollback [N]`", ""),
        ("`sparkfleet rolback`", "no verb rolback"),
        ("`sparkfleet switch MODEL [--profil P]`", "switch has no --profil"),
        ("`playbooks/{stop,start}.yml`", ""),
        ("`playbooks/{stop,begin}.yml`", "there is no playbooks/begin.yml"),
        ("`tests/unit/no.py`", "there is no tests/unit/no.py"),
        ("`roles/*/README.md`", ""),
        ("`python -m sparkfleet.no`", "no module sparkfleet.no"),
        ("    .venv/bin/python -m simulator upp\n", "invalid choice"),
        ("```bash\n# a comment\nansible-playbook \\\n  sites.yml\n```", "there is no sites.yml"),
    ],
)
def test_a_wrong_word_is_noticed(text: str, wrong: str) -> None:
    found = list(pages.wrong_commands(pages.read(text)))
    assert bool(found) == bool(wrong) and (not wrong or wrong in found[0]), found


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    """Strict: what is not in the navigation, and a link or an anchor that leads nowhere, is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    built = sorted((tmp_path / "site").rglob("*.html"))
    assert len(built) >= len(list((ROOT / "docs").rglob("*.md"))) - len(list((ROOT / "docs").glob("*.head.md")))
    for path in built:
        text = path.read_text(encoding="utf-8")
        loads = (
            r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//|<link\b[^>]*\bhref=[\"']?(?:https?:)?//"
        )
        assert not re.findall(loads, text), path
        assert 'class="mermaid"' not in text, f"{path}: the theme would load mermaid from elsewhere"


def test_the_picture_is_whole_and_loads_nothing() -> None:
    text = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    assert re.findall(r"https?://[^\"]*", text) == ["http://www.w3.org/2000/svg"]
    words = re.findall(r"<text [^>]*>([^<]*)</text>", text)
    assert {"Inventory", "Model cards", "Host state", "Plan", "Prepare", "Fetch", "Deploy", "Verify", "Report"} <= {
        *words
    }


def test_the_architecture_names_every_package() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    packages = {path.parent.name for path in (ROOT / "src" / "sparkfleet").glob("*/__init__.py")}
    folders = {
        path.name for path in ROOT.iterdir() if path.is_dir() and path.name in ("playbooks", "roles", "simulator")
    }
    assert rows >= packages | folders, packages - rows
    modules = {path.stem for path in (ROOT / "plugins" / "module_utils" / "sparkfleet_host").glob("[a-z]*.py")}
    named = re.search(r"^## On the host\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    assert named
    assert set(re.findall(r"`([a-z_]+)`", named[1])) <= modules


def test_every_decision_is_listed_in_order() -> None:
    folder = ROOT / "docs" / "decisions"
    index = (folder / "index.md").read_text(encoding="utf-8")
    files = sorted(path.name for path in folder.glob("0*.md"))
    assert re.findall(r"^\| \d{4} \| \[[^]]*\]\(([^)]*)\)", index, re.MULTILINE) == files
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"][-1]["How it is built"][-1]
    assert nav["Decisions"] == ["decisions/index.md", *(f"decisions/{name}" for name in files)]
    for number, name in enumerate(files, 1):
        text = (folder / name).read_text(encoding="utf-8")
        title = text.partition("\n")[0]
        assert title.startswith(f"# {number:04}: ") and name.startswith(f"{number:04}-"), name
        assert f"[{title[8:]}]({name})" in index, name
        parts = [part for part in re.findall(r"^## (.*)", text, re.MULTILINE) if part != "What was tried"]
        assert parts == ["Context", "Decision", "Consequences"], name
        assert re.search(r"^Status: (accepted|replaced by \[\d{4}\].*)$", text, re.MULTILINE), name


def test_words_that_are_not_used_are_noticed(tmp_path: Path) -> None:
    entries = (ROOT / "docs" / ".words").read_text(encoding="utf-8").split("\n")[:-1]
    assert entries == sorted(entries) and all(re.fullmatch(r"[a-z]+->[a-z ]+", entry) for entry in entries)
    page = tmp_path / "page.md"
    page.write_text(
        "".join(f"{entry.partition('->')[0]}\n" for entry in entries) + f"{MISSPELLED}\nplain\n", encoding="utf-8"
    )
    program = Path(sys.executable).with_name("codespell")
    done = subprocess.run([program, page], cwd=ROOT, capture_output=True, text=True, check=False)
    found = re.findall(r":(\d+): ", done.stdout)
    assert done.returncode != 0 and found == [str(number) for number in range(1, len(entries) + 2)], done.stdout


def test_every_module_and_test_that_scripts_mutate_names_is_there() -> None:
    tree = ast.parse((ROOT / "scripts" / "mutate").read_text(encoding="utf-8"))
    assigned = [node for node in tree.body if isinstance(node, ast.AnnAssign) and node.value]
    (table,) = (node.value for node in assigned if ast.unparse(node.target) == "MODULES")
    assert table
    names = {node.value for node in ast.walk(table) if isinstance(node, ast.Constant) and ".py" in str(node.value)}
    tests = {str(name) for name in names if str(name).startswith("test_")}
    assert len(tests) > 10 and [name for name in tests if not list((ROOT / "tests" / "unit").rglob(name))] == []
    found = ast.unparse(table).replace("{HOST}", "plugins/module_utils/sparkfleet_host")
    files = re.findall(r"[\w/]+/\w+\.py", found)
    assert len(files) == 11 and [name for name in files if not (ROOT / name).is_file()] == []
