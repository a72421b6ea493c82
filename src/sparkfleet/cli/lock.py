"""`sparkfleet lock`: writes what the tags and revisions of an inventory stand for, so that deployments use that and
nothing else; shows what has changed upstream since."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparkfleet import SparkfleetError
from sparkfleet.cli.runner import Collector
from sparkfleet.cli.runner import run as run_playbook
from sparkfleet.exit_codes import DRIFT, OK, UNREACHABLE
from sparkfleet.fleet import lock_upstream
from sparkfleet.fleet.dry_run import settled
from sparkfleet.fleet.lock_upstream import Maker, UpstreamError
from sparkfleet.fleet.model_files import Way
from sparkfleet.onboarding import hub_card
from sparkfleet.onboarding.prompts import report_line
from sparkfleet.packaging import debian, sbom, signature
from sparkfleet.paths import ROOT
from sparkfleet.planning import lock
from sparkfleet.planning.lock import Lock
from sparkfleet.reporting import report

EPILOG = """examples:
  sparkfleet lock -i inventory/mine                 write it, or add what it does not have yet
  sparkfleet lock -i inventory/mine --check         exit code 4 if the inventory, registry or Hub differ from it
  sparkfleet lock -i inventory/mine --update        show what has changed upstream, ask, and take it
  sparkfleet lock -i inventory/mine --update qwen3-32b-fp8 --yes
  sparkfleet lock -i inventory/mine --packages spark-1    with the versions of Docker and the like that spark-1 has

Exit codes: 0 done or nothing to do, 2 invalid input or lock, 4 with --check: it differs, 7 registry or Hub not asked.
"""


def add_parser(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser],
    inventory: str,
    extra: Callable[[str], str],
    agrees: Callable[[str], bool],
) -> None:
    """Add the verb. `extra` checks extra variables, `agrees` asks a question."""
    parser = verbs.add_parser(
        "lock",
        help="write which image digests, commits and files deployments use; --check and --update compare with upstream",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-i", "--inventory", default=inventory, help="default: %(default)s")
    parser.add_argument("-e", "--extra-vars", metavar="NAME=VALUE", type=extra, action="append", default=[])
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--check", action="store_true", help="compare with inventory, registry and Hub, write nothing")
    how.add_argument(
        "--update",
        metavar="MODEL",
        nargs="*",
        help="show what has changed upstream, and write it if you agree; without MODEL of all, and without what no "
        "host uses any more",
    )
    parser.add_argument(
        "--platform", default=lock_upstream.PLATFORM, help="of images for several (default: %(default)s)"
    )
    parser.add_argument(
        "--packages",
        metavar="HOSTS",
        help="read on these Sparks which versions of packages they have; others then install those and no others",
    )
    parser.add_argument(
        "-K", "--ask-become-pass", action="store_true", help="with --packages: ask for the sudo password"
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.set_defaults(run=lambda options: run(options, agrees))


def run(options: argparse.Namespace, agrees: Callable[[str], bool]) -> int:
    """Make, compare and write; the exit code. Raises SparkfleetError."""
    hosts = _hosts(options.inventory, options.extra_vars)
    path = _place(options.inventory, hosts)
    renewed: Sequence[str] | None = [] if options.check else options.update
    exists = path.is_file()
    if not exists and (options.check or options.update):
        raise SparkfleetError(f"there is no lock {path}: `sparkfleet lock` writes it")
    # What is renewed altogether is compared even with one that was damaged by an edit: the differences are shown.
    # Otherwise what is not renewed stays, so it must be signed as what is deployed must be.
    key, signers = (_common(hosts, name) for name in (signature.LOCK.key, signature.LOCK.signers))
    whole = options.update == []
    old = Lock.read(path, not whole, "" if whole else signers) if exists else Lock(path=path)
    kept = dataclasses.replace(old, packages={}) if whole and exists and not _trusted(path, signers) else old
    try:
        new = Maker(kept, _make_card, renewed, options.platform, hub_card.way().token).make(hosts)
    except UpstreamError as error:
        print(report.clean(f"sparkfleet: {error}"), file=sys.stderr)
        return UNREACHABLE
    if options.packages is not None:
        new = dataclasses.replace(new, packages={**new.packages, **_packages(options)})
    lines = lock_upstream.changes(old, new)
    written = not options.check and (not exists or new.text() != _text(path)) and _agreed(options, lines, agrees)
    # Before anything is written: a key that does not sign changes nothing.
    made = signature.of(new.text().encode(), key, signature.LOCK) if key and not options.check else b""
    if written:
        new.write()
    signed = _signed(path, made, signers, written)
    _say(options, path, lines, written, signed)
    return DRIFT if options.check and lines else OK


def _make_card(model: str, hub: Way) -> None:
    hub_card.ensure(model, hub, report_line)


def _hosts(inventory_name: str, extra: Sequence[str]) -> dict[str, dict[str, Any]]:
    os.environ.setdefault("ANSIBLE_CONFIG", str(ROOT / "ansible.cfg"))
    from sparkfleet.documents import inventory  # noqa: PLC0415 - Ansible reads its configuration as it is imported

    return settled(inventory.variables(inventory_name, None, extra))


def _place(inventory: str, hosts: dict[str, dict[str, Any]]) -> Path:
    beside = str(lock.beside(Path(inventory).absolute()))
    places = {values.get(lock.VARIABLE) or beside for values in hosts.values()}
    if len(places) > 1:
        raise SparkfleetError(f"{lock.VARIABLE}: hosts have different ones: {', '.join(sorted(places))}")
    return Path(places.pop())


def _packages(options: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Versions of packages by system, of the Sparks that `--packages` names. Raises SparkfleetError where two of one
    system have different ones, or one does not answer."""
    os.environ.setdefault("ANSIBLE_CONFIG", str(ROOT / "ansible.cfg"))
    from sparkfleet.documents import inventory  # noqa: PLC0415 - Ansible reads its configuration as it is imported

    hosts = ",".join(inventory.matching(options.inventory, options.packages))
    collector, found = Collector(lambda host, line: None), dict[str, dict[str, str]]()
    with tempfile.TemporaryDirectory(prefix="sparkfleet-") as folder:
        words = [word for pair in options.extra_vars for word in ("-e", pair)]
        words += ["-l", hosts, "-e", json.dumps({"sparkfleet_sbom_folder": folder})]
        words += ["--ask-become-pass"] if options.ask_become_pass else []
        run_playbook("sbom", options.inventory, words, collector)
        for name, host in sorted(collector.hosts.items()):
            if host.result != "ok":
                raise SparkfleetError(f"--packages: {name}: {host.message or host.result}")
            system, versions = sbom.packages(sbom.read(Path(folder, f"{name}.cdx.json")))
            known = found.setdefault(system, {})
            for package in debian.PREPARED:
                version = versions.get(package)
                if version and known.setdefault(package, version) != version:
                    raise SparkfleetError(
                        f"--packages: {name} has {package} {version}, another with {system} {known[package]}: "
                        "name one of them"
                    )
    if not found:
        raise SparkfleetError(collector.error or f"--packages {options.packages}: no Spark was read")
    return found


def _common(hosts: dict[str, dict[str, Any]], name: str) -> str:
    found = {str(values.get(name) or "") for values in hosts.values()}
    if len(found) > 1:
        raise SparkfleetError(f"{name}: hosts have different ones: {', '.join(sorted(found))}")
    return found.pop() if found else ""


def _trusted(path: Path, signers: str) -> bool:
    """Whether a lock is as it was written, and signed by one who may. What it says of packages, which neither registry
    nor Hub knows, is of no use otherwise."""
    try:
        Lock.read(path, signers=signers)
    except SparkfleetError:
        return False
    return True


def _signed(path: Path, made: bytes, signers: str, written: bool) -> str | None:
    """Put the signature in its place; what is to be said of it. One of what was there before is none of this lock."""
    if made:
        return f"{signature.write(path, made)}: written"
    if written and signature.beside(path).exists():
        signature.beside(path).unlink()
        return f"{signature.beside(path)}: removed, as it is of the lock before; {signature.LOCK.key} makes a new one"
    if written and signers:
        return f"it is not signed, and {signature.LOCK.signers} wants a signature: {signature.LOCK.key} makes it"
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _agreed(options: argparse.Namespace, lines: Sequence[str], agrees: Callable[[str], bool]) -> bool:
    """Whether it may be written: what is only added need not be confirmed."""
    if options.update is None or options.yes:
        return True
    for line in lines:
        report_line(line)
    if not agrees("Take this into the lock?"):
        raise SparkfleetError("the lock was not changed")
    return True


def _say(options: argparse.Namespace, path: Path, lines: Sequence[str], written: bool, signed: str | None) -> None:
    if options.json:
        print(json.dumps({"verb": "lock", "path": str(path), "changes": list(lines), "written": written}, indent=2))
        return
    if options.update is None or options.yes:
        for line in lines:
            print(report.clean(line))
    if written:
        print(report.clean(f"{path}: written"))
    else:
        print(report.clean(f"{path}: {'differs' if lines else 'unchanged'}"))
    if signed:
        print(report.clean(signed))
