"""The units of systemd, rendered as the role does it and judged by systemd itself."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import audit, hardening, http
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.cache import MANIFEST_BYTES, manifest_path

from tests.unit import ROOT

ROLE = ROOT / "roles" / "guard"
#: What systemd-analyze calls exposure, 0 to 10. The guard is root with Docker's socket, whatever its unit says.
LIMITS = {"sparkfleet-guard.service": 3.0, "sparkfleet-integrity.service": 2.0}

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every unit of the role, written by Ansible."""
    return render(tmp_path_factory.mktemp("units"))


def render(folder: Path, **variables: str) -> Path:
    names = sorted(path.name.removesuffix(".j2") for path in (ROLE / "templates").glob("*.j2"))
    tasks = [
        {
            "ansible.builtin.template": {
                "src": f"{ROLE}/templates/{name}.j2",
                "dest": f"{folder}/{name}",
                "mode": "0644",
            },
            "vars": {"role_path": str(ROLE), **variables},
        }
        for name in names
    ]
    play = {
        "hosts": "localhost",
        "gather_facts": False,
        "vars_files": [
            str(ROOT / "roles" / "sparkfleet" / "defaults" / "main.yml"),
            *(str(ROLE / part / "main.yml") for part in ("defaults", "vars")),
        ],
        "tasks": tasks,
    }
    file = folder / "play.yml"
    file.write_text(yaml.safe_dump([play]), encoding="utf-8")
    argv = [
        "ansible-playbook",
        "-i",
        "localhost,",
        "-c",
        "local",
        "-e",
        f"ansible_python_interpreter={sys.executable}",
        str(file),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def exposure(unit: Path) -> float:
    argv = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    found = re.search(r"Overall exposure level for \S+: (\d+\.\d+)", done.stdout)
    assert found, done.stdout + done.stderr
    print(done.stdout)
    return float(found[1])


def values(unit: Path, name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", unit.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_check_of_model_files_sees_no_secrets(units: Path, tmp_path: Path) -> None:
    hidden = values(units / "sparkfleet-integrity.service", "InaccessiblePaths")
    for path in ("/root", "/etc/sparkfleet", "/etc/sparkfleet/hf_token", "/opt/sparkfleet/.env", "/run/docker.sock"):
        assert f"-{path}" in hidden
    assert str(Path(http.KEY_FILE).parent) == "/etc/sparkfleet"
    # What it needs itself stays in sight, wherever it is.
    elsewhere = {
        "sparkfleet_cache_dir": "/root/hf",
        "sparkfleet_project_dir": "/srv/x",
        "sparkfleet_hf_token_file": "/srv/x/lib/token",
    }
    unit = render(tmp_path, **elsewhere) / "sparkfleet-integrity.service"
    assert {"-/srv/x/.env", "-/srv/x/releases", "-/srv/x/lib/token"} <= set(values(unit, "InaccessiblePaths"))
    assert "-/root" not in values(unit, "InaccessiblePaths") and values(unit, "ReadWritePaths") == ["/root/hf"]


def test_no_manifest_takes_more_memory_than_the_check_may_use(units: Path, tmp_path: Path) -> None:
    """Or the kernel ends it, and what it found is lost."""
    place = manifest_path(tmp_path, "a/b", "c" * 40)
    place.parent.mkdir(parents=True)
    place.write_bytes(b'{"files":[' + b"{}," * ((MANIFEST_BYTES - 15) // 3) + b"0]}")
    code = f"""if True:
        import resource, sys
        from sparkfleet_host import integrity
        code = integrity.main(["--cache-dir", {str(tmp_path)!r}, "--result", {str(tmp_path / "result")!r}])
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        sys.exit(code)"""
    environment = {"PYTHONPATH": str(ROOT / "plugins" / "module_utils")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120, env=environment
    )
    assert done.returncode == 1 and "the manifest is damaged" in done.stdout, done.stdout + done.stderr
    [limit] = values(units / "sparkfleet-integrity.service", "MemoryMax")
    assert int(done.stdout.split()[-1]) < int(limit.removesuffix("M")) * 1024 * 0.9


def test_the_check_of_model_files_ends(units: Path) -> None:
    """A oneshot has no limit of its own."""
    assert values(units / "sparkfleet-integrity.service", "TimeoutStartSec") == ["12h"]


@needs_systemd
@pytest.mark.parametrize("name", LIMITS)
def test_units_expose_little(units: Path, name: str) -> None:
    assert exposure(units / name) <= LIMITS[name]


@needs_systemd
@pytest.mark.parametrize(
    "properties",
    [hardening.switch("/opt/sparkfleet", "/var/lib/sparkfleet"), hardening.share()],
    ids=["switch", "share"],
)
def test_transient_units_expose_little(tmp_path: Path, properties: list[str]) -> None:
    unit = tmp_path / "sparkfleet-x.service"
    unit.write_text("[Service]\nExecStart=/bin/true\n" + "\n".join(properties) + "\n", encoding="utf-8")
    assert exposure(unit) <= 3.0


@needs_systemd
def test_systemd_understands_every_line(units: Path) -> None:
    files = [str(path) for path in units.glob("sparkfleet-*")]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *files], capture_output=True, text=True, check=False, timeout=60
    )
    printed = [line for line in done.stderr.splitlines() if "sparkfleet" in line]
    assert [line for line in printed if "is not executable" not in line] == []


def test_the_role_has_the_same_properties_as_transient_units() -> None:
    kept = yaml.safe_load((ROLE / "vars" / "main.yml").read_text(encoding="utf-8"))
    assert kept["guard_hardening"] == list(hardening.COMMON)


def test_an_audit_knows_a_unit_that_was_edited(units: Path, tmp_path: Path) -> None:
    firewall = ROOT / "roles" / "firewall" / "files" / "sparkfleet-firewall.service"
    for unit in (*units.glob("sparkfleet-*"), firewall):
        text = unit.read_text(encoding="utf-8")
        assert text.startswith("# Made by Sparkfleet.") and not audit.edited(unit)
        copy = tmp_path / unit.name
        for other in (text.replace("[Unit]\n", "[Unit]\n\n"), f"{text}[Service]\nUser=x\n", f"{text}#", f"#\n{text}"):
            copy.write_text(other, encoding="utf-8")
            assert audit.edited(copy)
        copy.write_text("[Unit]\nDescription=Of an earlier version\n", encoding="utf-8")
        assert not audit.edited(copy)
    assert not audit.edited(tmp_path / "gone")


@needs_systemd
def test_the_firewall_s_unit_may_do_little() -> None:
    assert exposure(ROOT / "roles" / "firewall" / "files" / "sparkfleet-firewall.service") <= 2.5
