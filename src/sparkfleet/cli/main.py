"""The command ``sparkfleet``: plans and cards here, verbs as playbooks through ansible-runner."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from sparkfleet_host.bounded import GIB, printable
from sparkfleet_host.release_format import DUMMY, WEIGHTS

from sparkfleet import (
    SparkfleetError,
    __version__,
    operator_name,
    paths,
)
from sparkfleet.cli import bench, card, lock, summary, tune
from sparkfleet.cli.runner import Collector, default_inventory, run
from sparkfleet.diagnosis import audit
from sparkfleet.documents import yaml_text
from sparkfleet.exit_codes import DOWN, INTERRUPTED, OK, RESTORED, of_error
from sparkfleet.fleet import (
    dry_run,
    outage,
)
from sparkfleet.onboarding import hub_card, init
from sparkfleet.onboarding.prompts import report_line
from sparkfleet.packaging import advisories, sbom
from sparkfleet.paths import ROOT
from sparkfleet.planning import (
    calibration,
    catalog,
    memory_plan,
    preflight,
    vllm_versions,
)
from sparkfleet.planning import lock as locks
from sparkfleet.planning.target import EngineSettings, EngineTarget, Settings, Target
from sparkfleet.reporting import (
    event_log,
    history,
    html_report,
    report,
    status_page,
)
from sparkfleet.reporting.host_result import HostResult
from sparkfleet.reporting.live import Live, Page, columns, terminal
from sparkfleet.reporting.progress import Board
from sparkfleet.user_paths import expanded, output

#: Exit codes: bad input, as argparse has it; a plan that does not fit.
BAD_INPUT = 2
DOES_NOT_FIT = 3
#: Of a host's memory.
LEAST_GIB, MOST_GIB = 0.1, 100_000


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    if argv is None:  # as a command: a reader that has seen enough (`| head`) ends it quietly
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    parser = _parser()
    for word in sys.argv[1:] if argv is None else argv:
        if "\0" in word or not _is_text(word):
            print(f"sparkfleet: argument {word[:80]!a} is not text: it has a NUL or is not UTF-8", file=sys.stderr)
            return BAD_INPUT
    options, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(options, "words") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # hosts of `init` behind an option
        options.words += rest
    try:
        return int(options.run(options))
    except SparkfleetError as error:
        print(report.clean(f"sparkfleet: {error}"), file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(
            "sparkfleet: interrupted. Jobs on the hosts continue: `sparkfleet status` shows them, and the "
            "same command joins it.",
            file=sys.stderr,
        )
        return INTERRUPTED


def _is_text(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """argparse's message, with control characters removed from quoted arguments."""
        super().error(report.clean(message))


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _Parser(
        prog="sparkfleet", description="DGX Sparks with a verified vLLM endpoint."
    )
    parser.add_argument("--version", action="version", version=f"sparkfleet {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument(
        "model",
        metavar="MODEL|FILE|ORG/NAME",
        help=f"one of {', '.join(catalog.names())}, a card's path, or a model of the Hub",
    )
    model.add_argument("--profile", default="throughput", help="profile of the card (default: %(default)s)")
    model.add_argument(
        "--set",
        metavar="ARGUMENT=VALUE",
        action="append",
        default=[],
        help="an argument of vllm serve that overrides the card's, such as max_model_len=65536; may be repeated",
    )

    plan = verbs.add_parser(
        "plan", parents=[model], help="show whether a model fits a Spark, and how it performs there"
    )
    plan.add_argument("--total-gib", type=_gib, help=f"total memory (default: {memory_plan.USUAL_TOTAL_GIB})")
    plan.add_argument(
        "--available-gib", type=_gib, help=f"available memory (default: all but {memory_plan.USUAL_HOST_GIB} GiB)"
    )
    plan.add_argument(
        "--reserve-gib", type=_gib_or_none, default=4.0, help="memory that the plan leaves to the host (default: 4)"
    )
    plan.add_argument(
        "--kv-gib", type=_gib, help="size of the KV cache as vLLM logs it (default: what is left of the budget)"
    )
    plan.add_argument("--engine", metavar="VERSION", help="vLLM version (default: that of the card's image)")
    plan.add_argument("--json", action="store_true", help="for programs")
    plan.set_defaults(run=_plan)

    models = verbs.add_parser("models", help="list the catalogue")
    models.add_argument("--json", action="store_true", help="for programs")
    models.set_defaults(run=_models)

    show = verbs.add_parser("compose", parents=[model], help="print the compose file for a model")
    show.add_argument(
        "--source",
        choices=("local", "hub"),
        default="local",
        help="local: fetched first and served offline; hub: the server downloads (default: %(default)s)",
    )
    show.set_defaults(run=_compose)
    card.add_parser(verbs)
    lock.add_parser(verbs, default_inventory(), _extra, _agrees)
    init.add_parser(verbs)
    tune.add_parser(verbs, default_inventory(), _extra)
    _add_verbs(verbs)
    return parser


#: Verbs that run a playbook, with their help text.
PLAYBOOKS = {
    "preflight": "inspect the hosts, print all findings, change nothing",
    "deploy": "bring the hosts to the state in the inventory (site.yml)",
    "verify": "verify the endpoints with questions whose answers are known",
    "switch": "change the model or profile; roll back if it does not verify",
    "upgrade": "change the image; roll back if it does not verify",
    "bench": "measure how fast what a Spark serves is; `bench compare A B`: whether two differ by more than noise",
    "trial": "measure what a model needs and how fast it is on a Spark, without its weights; what served serves again",
    "rollout": "deploy in waves that stop at the first failure",
    "rotate": "replace a key or the token by the one that the inventory has now, without a failed request",
    "rollback": "return to the previous release, or to one by number",
    "start": "start the deployed release",
    "stop": "stop it; it stays stopped across reboots",
    "restart": "restart the engine and verify it",
    "status": "show what each host serves",
    "logs": "show the engine's last log lines",
    "history": "show what happened on each host and who did it: releases, switches, restarts, runs from here",
    "report": "write a report of the fleet as an HTML file: memory, speed, alerts, verification, drift, costs, history",
    "drift": "show differences from the inventory; exit code 4 if there are any",
    "audit": "show how secure the hosts are, graded, with remedies; exit code 5 at findings of a grade",
    "bundle": "create a folder with everything that Sparks without internet need (sparkfleet_bundle)",
    "test-alert": "send an alert by every way that is configured, and say by which it arrived",
    "sbom": "list what this controller has, and with FOLDER what each Spark runs, in CycloneDX; exit code 5 "
    "with known vulnerabilities",
    "diagnose": "find out what is wrong, with causes and remedies; writes an archive for a bug report",
    "remove": "remove Sparkfleet from the hosts; shows first what would be removed",
}


#: Verbs that may stop a serving engine: on more than one host only in waves, or when confirmed.
INTERRUPTING = frozenset(("deploy", "switch", "upgrade", "rollback", "stop", "restart", "rollout", "bundle", "trial"))
#: What `rotate` replaces.
ROTATED = ("engine-key", "client-key", "hub-token")
#: Verbs that show only their result.
SILENT = frozenset(("status", "logs", "history", "report"))


def _add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-i", "--inventory", default=default_inventory(), help="default: %(default)s")
    common.add_argument("-l", "--limit", metavar="HOSTS", help="only these hosts of the inventory")
    common.add_argument("-e", "--extra-vars", metavar="NAME=VALUE", type=_extra, action="append", default=[])
    common.add_argument("-C", "--check", action="store_true", help="report what would change, change nothing")
    common.add_argument("-K", "--ask-become-pass", action="store_true", help="ask for the sudo password")
    common.add_argument("--json", action="store_true", help="one JSON document on standard output")
    for verb, text in PLAYBOOKS.items():
        parser = verbs.add_parser(verb, parents=[common], help=text, description=text)
        parser.set_defaults(run=_verb, verb=verb)
        if verb in INTERRUPTING:
            parser.add_argument(
                "--yes", action="store_true", help="do not ask; several serving Sparks may stop at the same time"
            )
        if verb == "switch":
            parser.add_argument(
                "model",
                nargs="?",
                type=_word,
                help="a card's name or path, or a model of the Hub (ORG/NAME); without it only the profile changes",
            )
            parser.add_argument("--profile", type=_word)
        elif verb == "trial":
            parser.add_argument("model", type=_word, help="a card's name or path, or a model of the Hub (ORG/NAME)")
            parser.add_argument("--profile", type=_word)
            parser.add_argument(
                "--weights",
                choices=WEIGHTS,
                default=DUMMY,
                help="dummy: only configuration and tokenizer are fetched; real: those on the Spark (default: dummy)",
            )
        elif verb == "bench":
            bench.add_arguments(parser)
        elif verb == "rotate":
            parser.add_argument("what", choices=ROTATED)
            parser.add_argument("client", nargs="?", type=_word, help="name of the client in sparkfleet_gateway_keys")
            parser.add_argument(
                "--overlap",
                metavar="SECONDS",
                type=_seconds,
                help="how long both keys of a client are valid (default: 60)",
            )
        elif verb == "audit":
            parser.add_argument(
                "--fail-on", choices=audit.GRADES, default="high", help="grade from which on it fails (default: high)"
            )
            parser.add_argument("--sarif", metavar="FILE", type=_word, help="write the findings there as SARIF 2.1.0")
        elif verb == "upgrade":
            parser.add_argument("image", type=_word)
        elif verb == "verify":
            parser.add_argument(
                "--deep",
                dest="depth",
                action="store_const",
                const="deep",
                help="ask for all that the models are for, such as a long context; takes minutes",
            )
        elif verb == "bundle":
            parser.add_argument("folder", type=_word, help="destination; an existing one is completed")
        elif verb == "sbom":
            parser.set_defaults(run=_sbom)
            parser.add_argument(
                "folder",
                nargs="?",
                type=_word,
                help="where to write HOST.cdx.json of each Spark and controller.cdx.json; without it that of this "
                "controller is printed",
            )
            parser.add_argument(
                "--advisories",
                metavar="FILE",
                type=_word,
                help="known vulnerabilities in the OSV format: a file or folder",
            )
        elif verb == "rollout":
            parser.add_argument("--dry", action="store_true", help="show plan, input and waves; contacts no host")
        elif verb == "rollback":
            parser.add_argument(
                "release", nargs="?", type=_count, help="number of a release (default: the previous one)"
            )
        elif verb == "status":
            parser.set_defaults(run=_status)
            parser.add_argument(
                "-w",
                "--watch",
                metavar="SECONDS",
                nargs="?",
                type=_seconds,
                const=5.0,
                help="repeat at this interval (default: 5)",
            )
        elif verb == "report":
            parser.set_defaults(run=_report)
            parser.add_argument(
                "-o",
                "--output",
                metavar="FILE",
                type=_word,
                default="sparkfleet-report.html",
                help="default: %(default)s",
            )
            parser.add_argument("--hours", type=_hours, default=24.0, help="of figures (default: 24)")
            parser.add_argument("--price", type=_price, help="of a kWh, to show what the GPUs' energy cost")
        elif verb in ("logs", "history"):
            parser.add_argument("host", nargs="?", help="the same as --limit HOST")
        if verb == "logs":
            parser.add_argument("-n", "--lines", type=_count, default=100, help="default: %(default)s")
        elif verb == "remove":
            parser.add_argument("--yes", action="store_true", help="do not ask")
            for what in ("models", "images", "token"):
                parser.add_argument(f"--{what}", action="store_true", help=f"the {what} too")


def _arguments(options: argparse.Namespace) -> list[str]:
    """The arguments for ansible-playbook."""
    if options.verb == "switch" and not (options.model or options.profile):
        raise SparkfleetError("switch needs a model, a --profile or both (`sparkfleet models` lists them)")
    if options.verb == "rotate" and (options.what == "client-key") != bool(options.client):
        raise SparkfleetError("rotate client-key needs the name of a client, engine-key and hub-token have none")
    if options.verb == "rotate" and options.overlap is not None and options.what != "client-key":
        raise SparkfleetError("--overlap is of rotate client-key: an engine's old key ends with its Spark's turn")
    words = [word for pair in options.extra_vars for word in ("-e", pair)]
    words += _limit(options)
    words += ["--check", "--diff"] if options.check else []
    words += ["--ask-become-pass"] if options.ask_become_pass else []
    writes = options.verb in ("bundle", "sbom")
    folder = str(output("FOLDER", options.folder, folder=True).absolute()) if writes else None
    given = {
        "sparkfleet_model": getattr(options, "model", None),
        "sparkfleet_profile": getattr(options, "profile", None),
        "sparkfleet_image": getattr(options, "image", None),
        "sparkfleet_trial_weights": getattr(options, "weights", None),
        **(bench.variables(options) if options.verb == "bench" else {}),
        "sparkfleet_rotate": options.what.replace("-", "_") if options.verb == "rotate" else None,
        "sparkfleet_audit_fail_on": getattr(options, "fail_on", None),
        "sparkfleet_client": getattr(options, "client", None),
        "sparkfleet_overlap": getattr(options, "overlap", None),
        "sparkfleet_report_hours": getattr(options, "hours", None),
        "sparkfleet_release": getattr(options, "release", None),
        "sparkfleet_verify": getattr(options, "depth", None),
        "sparkfleet_logs_lines": getattr(options, "lines", None),
        f"sparkfleet_{options.verb}_folder": folder,
        **{f"sparkfleet_remove_{name}": getattr(options, name, None) or None for name in ("models", "images", "token")},
    }
    for name, value in given.items():
        if value is not None:
            words += ["-e", json.dumps({name: value})]
    return words + (["--tags", "preflight"] if options.verb == "preflight" else [])


#: What vLLM colours its log with.
_COLOUR = re.compile(r"\x1b\[[0-9;]{0,32}m")
#: A limit that Ansible may be given as it is: names and wildcards, separated by commas.
_SIMPLE = re.compile(r"[A-Za-z0-9_.*?-]+(,[A-Za-z0-9_.*?-]+)*")


def _limit(options: argparse.Namespace) -> list[str]:
    """`--limit` for ansible-playbook. What excludes or intersects (`!spark-3`, `sparks:&rack1`) is resolved to names
    first. Never more hosts than were named: localhost may be one of the Sparks. Raises SparkfleetError for one that has
    a part that matches nothing, which Ansible only warns of, or is not a pattern."""
    limit = options.limit if options.limit is not None else getattr(options, "host", None)
    if limit is None:
        return []
    os.environ.setdefault("ANSIBLE_CONFIG", str(ROOT / "ansible.cfg"))
    from sparkfleet.documents import inventory  # noqa: PLC0415 - Ansible reads its configuration as it is imported

    matching = inventory.matching(options.inventory, limit)
    return ["--limit", limit if _SIMPLE.fullmatch(limit) else ",".join(matching)]


def _dry(options: argparse.Namespace) -> int:
    os.environ.setdefault("ANSIBLE_CONFIG", str(ROOT / "ansible.cfg"))
    from sparkfleet.documents import inventory  # noqa: PLC0415 - Ansible reads its configuration as it is imported

    hosts = inventory.variables(options.inventory, options.limit, options.extra_vars)
    beside = locks.found([options.inventory])
    paper = dry_run.make({name: {locks.VARIABLE: beside, **values} for name, values in hosts.items()})
    print(
        json.dumps(paper.as_dict(), indent=2) if options.json else dry_run.page(paper), end="\n" if options.json else ""
    )
    return 0 if paper.fits else DOES_NOT_FIT


def _verb(options: argparse.Namespace) -> int:
    if getattr(options, "dry", False):
        return _dry(options)
    if options.verb == "bench" and options.of[:1] == [bench.COMPARE]:
        return bench.compare(options)
    words = _arguments(options)
    sarif = output("--sarif", options.sarif) if getattr(options, "sarif", None) else None
    if options.verb == "remove" and not options.check:
        if not options.yes:
            preview = Collector(lambda host, line: None)
            run("remove", options.inventory, [*words, "--check"], preview)
            for host in preview.hosts.values():
                gone = ", ".join(host.removed) if host.removed else host.message or "nothing is there"
                print(report.clean(f"{host.name}: {gone}"))
            if not any(host.removed for host in preview.hosts.values()):
                return 0
            if not _agrees("Remove this?"):
                raise SparkfleetError("nothing was removed")
        words += ["-e", json.dumps({"sparkfleet_confirm": True})]
    confirmed = ["-e", json.dumps({outage.VARIABLE: True})]
    hosts, board, made = _run(options, words + (confirmed if getattr(options, "yes", False) else []))
    at_once = next((host for host in hosts if host.failure == "all-at-once" and host.message), None)
    if at_once and not options.json and sys.stdin.isatty() and sys.stdout.isatty():
        print(report.clean(at_once.message))
        if not _agrees("All at once?"):
            raise SparkfleetError("nothing was changed")
        hosts, board, made = _run(options, words + confirmed)
    code = _show(options, hosts, board, made)
    if sarif and "error" not in made and not _write(sarif, audit.sarif({host.name: host.audit for host in hosts})):
        return code or BAD_INPUT
    return code


def _write(path: Path, text: str) -> bool:
    """Whether a file could be written; if not, why is said, and what was shown before stays the result."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        report_line(f"sparkfleet: {path} cannot be written: {error.strerror}")
        return False
    return True


def _agrees(question: str) -> bool:
    """Ask for confirmation. Raises SparkfleetError without a terminal."""
    try:
        return input(f"{question} [yes/no] ").strip().lower() in ("y", "yes")
    except EOFError:
        raise SparkfleetError(f"cannot ask '{question}' without a terminal: use --yes; nothing was changed") from None


def _run(options: argparse.Namespace, words: Sequence[str]) -> tuple[list[HostResult], Board, dict[str, Any]]:
    """Run the playbook of a verb, shown and logged: its hosts, the board, and the result as plain data."""
    about = {"inventory": options.inventory, "limit": options.limit}
    with event_log.keep(paths.STATE, options.verb, options.check, options.extra_vars, **about) as log:
        board = Board(log)
        with Live(None if options.json or options.verb in SILENT else terminal(), board, options.verb) as live:
            collector = Collector(live.show, log, board)
            try:
                code = run(options.verb, options.inventory, words, collector)
            except BaseException as error:
                log.end(of_error(error), board.seconds(), collector.cut())
                raise
            live.stand = not sys.stdout.isatty()  # what comes next goes elsewhere
        hosts = _sorted(collector)
        for host in hosts if options.verb == "history" else ():
            host.summary = host.shown = None  # of what is served now
        made: dict[str, Any] = {"verb": options.verb, "exit_code": code, "hosts": [host.as_dict() for host in hosts]}
        made.update({"error": collector.error} if collector.error else {})
        if options.verb == "history":
            chosen = None if _limit(options) == [] else [host.name for host in hosts]
            made["runs"] = history.runs(paths.STATE / event_log.FOLDER, options.inventory, chosen)
        if options.verb == "rollout" and not options.check and not collector.error:
            made["rollout"] = summary.of_rollout(hosts, board)
        log({"event": "summary", **made})
        results = {host.name: host.result for host in hosts}
        log.end(code, board.seconds(), collector.cut() if collector.error else results)
    if log.path:
        made["events"] = str(log.path)
    if log.problem:
        report_line(f"sparkfleet: {log.problem}")
    return hosts, board, made


def _sorted(collector: Collector) -> list[HostResult]:
    return [collector.hosts[name] for name in sorted(collector.hosts, key=report.natural)]


def _show(options: argparse.Namespace, hosts: list[HostResult], board: Board, made: dict[str, Any]) -> int:
    """The result of a verb, for people or for programs; the exit code."""
    if options.json:
        now = {"now": _now(options)} if "rollout" in made else {}
        print(json.dumps({**made, **now}, indent=2))
    elif "error" in made:
        raise SparkfleetError(made["error"])
    elif options.verb == "history":
        print(report.clean(history.page({host.name: host.history or [] for host in hosts}, made["runs"])), end="")
        for host in hosts:
            if host.history is None:
                print(report.clean(f"{host.name}: {host.message or host.result}"))
    elif options.verb == "logs":
        for host in hosts:
            lines = [f"== {host.name}", *host.log] if len(hosts) > 1 else host.log
            print(report.clean(_COLOUR.sub("", "\n".join(lines) or host.message)))
    else:
        print(summary.page(hosts, board), end="")
        if "rollout" in made:
            print("\n" + status_page.table(_now(options), columns(sys.stdout)))
            print(summary.words(made["rollout"], os.path.relpath(made["events"]) if "events" in made else ""), end="")
    return int(made["exit_code"])


def _now(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Which Spark runs what, after a rollout."""
    words = [*_limit(options), *(word for pair in options.extra_vars for word in ("-e", pair))]
    words += ["--ask-become-pass"] if options.ask_become_pass else []
    return status_page.rows(_looked(options.inventory, words)[0])


def _looked(inventory: str, words: Sequence[str]) -> tuple[list[HostResult], int]:
    """What `status` finds: its hosts and its exit code. Raises SparkfleetError."""
    collector = Collector(lambda host, line: None)
    code = run("status", inventory, words, collector)
    if collector.error:
        raise SparkfleetError(collector.error)
    hosts = _sorted(collector)
    if code == OK and any(row["state"] not in ("serving", "asleep") for row in status_page.rows(hosts)):
        code = DOWN
    return hosts, code


def _status(options: argparse.Namespace) -> int:
    words = _arguments(options)
    if options.watch is not None:
        if options.json:
            raise SparkfleetError("--watch cannot be combined with --json; call status repeatedly instead")
        return _watch(options, words)
    error: dict[str, Any] = {}
    try:
        hosts, code = _looked(options.inventory, words)
    except SparkfleetError as problem:
        if not options.json:
            raise
        hosts, code, error = [], BAD_INPUT, {"error": str(problem)}
    rows = status_page.rows(hosts)
    if options.json:
        found = {"verb": "status", "exit_code": code, "hosts": [host.as_dict() for host in hosts]}
        print(json.dumps({**found, "fleet": status_page.totals(rows), **error}, indent=2))
    else:
        print(status_page.page(rows, columns(sys.stdout)), end="")
    return code


def _report(options: argparse.Namespace) -> int:
    """Write the report; the exit code is that of `status`."""
    path = output("--output", options.output)
    collector = Collector(lambda host, line: None)
    code = run("report", options.inventory, _arguments(options), collector)
    if collector.error:
        raise SparkfleetError(collector.error)
    hosts = _sorted(collector)
    rows = status_page.rows(hosts)
    about = html_report.About(
        time.time(), operator_name.name(), os.path.relpath(options.inventory), __version__, options.price
    )
    shown = {host.name: host.shown or {} for host in hosts}
    histories = {host.name: host.history or [] for host in hosts}
    made = html_report.document(about, rows, shown, histories, collector.figures, paths.STATE)
    if not _write(path, made):
        return code or BAD_INPUT
    if options.json:
        print(json.dumps({"verb": "report", "exit_code": code, "file": str(path.absolute())}, indent=2))
    else:
        print(report.clean(f"{path}: {status_page.words(status_page.totals(rows))}"))
    return code


def _watch(options: argparse.Namespace, words: Sequence[str]) -> int:
    """`status` again and again, until Ctrl-C; the last one stays, and its exit code."""
    text, code = "", OK
    with contextlib.suppress(KeyboardInterrupt), Page(sys.stdout) as page:
        while True:
            hosts, code = _looked(options.inventory, words)
            text = status_page.page(status_page.rows(hosts), columns(sys.stdout))
            page.show(f"{text}{time.strftime('%H:%M:%S')}, again after {options.watch:g} s; Ctrl-C ends it\n")
            time.sleep(options.watch)
    if sys.stdout.isatty():
        print(text, end="")
    return code


def _word(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    return text


def _extra(text: str) -> str:
    """Extra variables as Ansible takes them; it would pass over a word without "=" in silence."""
    if not re.match(r"[@{\[]|\s*[A-Za-z_][A-Za-z0-9_]*=", text):
        raise argparse.ArgumentTypeError(f"'{text[:60]}': write NAME=VALUE, @FILE, or JSON")
    return text


def _count(text: str) -> int:
    if not re.fullmatch("[0-9]{1,6}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text[:40]}' is not an integer from 1 to 999999")
    return int(text)


def _number(text: str, least: float, most: float, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"'{printable(text, 60)}' is not {what}")
    return value


def _seconds(text: str) -> float:
    return _number(text, 0, 86400, "a number of seconds (0 to 86400)")


def _hours(text: str) -> float:
    return _number(text, 1, 24 * 90, "a number of hours (1 to 2160)")


def _price(text: str) -> float:
    return _number(text, 0, 1e6, "a price (0 to 1000000)")


def _gib(text: str) -> float:
    value = _gib_or_none(text)
    if value < LEAST_GIB:
        raise argparse.ArgumentTypeError(f"'{printable(text, 60)}' is not a number of GiB from {LEAST_GIB} up")
    return value


def _gib_or_none(text: str) -> float:
    return _number(text, 0, MOST_GIB, f"a number of GiB up to {MOST_GIB}")


def _target(options: argparse.Namespace, source: str) -> Target:
    arguments = {}
    for pair in options.set:
        name, equals, value = pair.partition("=")
        if not equals:
            raise SparkfleetError(f"--set {printable(pair, 80)}: write ARGUMENT=VALUE")
        try:
            arguments[name.replace("-", "_")] = yaml_text.load(value)
        except yaml_text.YamlError as error:
            raise SparkfleetError(f"--set {printable(pair, 80)}: {error}") from None
    catalog.check_typed(arguments, "--set ")
    hub_card.ensure_reported(options.model)
    return Target.of(Settings(model=options.model, profile=options.profile, model_source=source, arguments=arguments))


def _plan(options: argparse.Namespace) -> int:
    (engine,) = _target(options, "local").engines
    total = options.total_gib or memory_plan.USUAL_TOTAL_GIB
    available = options.available_gib or max(total - memory_plan.USUAL_HOST_GIB, 0.0)
    if available > total:
        raise SparkfleetError(f"--available-gib {available:g} is more than the host's total ({total:g})")
    fixed = {"kv_cache_memory_bytes": int(options.kv_gib * GIB)} if options.kv_gib else {}
    wanted = {"repo": engine.card.repo, "settings": engine.settings_hash, "image": engine.image}
    # Of another version nothing was measured.
    known = None
    if options.engine is None and not fixed:
        known = calibration.remembered(paths.STATE, {**wanted, "revision": engine.revision})
    plan = memory_plan.make(
        engine.card,
        engine.arguments | fixed,
        profile=options.profile,
        version=vllm_versions.Engine.parse(options.engine) if options.engine is not None else engine.version,
        memory=memory_plan.Memory(total, available, options.reserve_gib, known.correction if known else 0.0),
        others=_cards,
    )
    made = (preflight.noted(plan, known, applied=True) if known else plan).as_dict()
    made["measured"] = {"host": known.host, "start": known.start, "trial": known.trial} if known else None
    if options.json:
        print(json.dumps(made, indent=2))
    else:
        print(report.page(made, report.colour_wanted()), end="")
    return 0 if made["fits"] else DOES_NOT_FIT


def _cards() -> list[catalog.Card]:
    return [catalog.load(name) for name in catalog.names()]


def _fits(card: catalog.Card) -> bool | None:
    try:
        return memory_plan.make(card, card.with_profile("throughput")).fits
    except SparkfleetError:
        return None


def _models(options: argparse.Namespace) -> int:
    cards = _cards()
    fits = {card.name: _fits(card) for card in cards}
    if options.json:
        data = [
            {
                **dataclasses.asdict(card),
                "source": str(card.source),
                "verify": EngineTarget.of(EngineSettings(card.name), "local").verify,
                "fits": fits[card.name],
            }
            for card in cards
        ]
        print(json.dumps(data, indent=2))
    else:
        print(report.models(cards, fits, columns(sys.stdout) or report.MODELS_WIDTH), end="")
    return 0


def _sbom(options: argparse.Namespace) -> int:
    own, code = sbom.document(), OK
    bills = [own]
    if options.folder is None:
        if options.limit is not None:
            raise SparkfleetError("sbom -l HOSTS needs a FOLDER to write to: sparkfleet sbom FOLDER -l HOSTS")
        if options.advisories is None or options.json:
            print(json.dumps(own, indent=2))
    else:
        words = _arguments(options)
        if options.advisories is not None:
            advisories.check([], options.advisories)  # so that nothing is asked and written for a file of no use
        hosts, board, made = _run(options, words)
        code = _show(options, hosts, board, made)
        folder = expanded("FOLDER", options.folder)
        if not options.check:
            bills += [sbom.read(folder / f"{host.name}.cdx.json") for host in hosts if host.result == "ok"]
            sbom.write(folder / "controller.cdx.json", own)
    if options.advisories is None:
        return code
    found, number = advisories.check(bills, options.advisories)
    for finding in found:
        report_line(str(finding))
    report_line(f"{report.count(len(found), 'finding')}; {number:,} advisories were compared")
    return max(code, RESTORED) if found else code


def _compose(options: argparse.Namespace) -> int:
    target = _target(options, options.source)
    yaml.safe_dump(target.document(), sys.stdout, sort_keys=False, default_flow_style=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
