"""The verb ``tune``: searches an engine's settings by trials on one Spark, and writes the best as a profile."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparkfleet_host.bench import Load
from sparkfleet_host.bounded import printable
from sparkfleet_host.release_format import REAL, WEIGHTS

from sparkfleet import SparkfleetError, paths
from sparkfleet.cli.runner import CUT, Collector, run
from sparkfleet.exit_codes import CODES, DOWN, INTERNAL, OK, REFUSED, of_error
from sparkfleet.onboarding import hub_card
from sparkfleet.onboarding.prompts import report_line
from sparkfleet.paths import ROOT
from sparkfleet.performance import comparison, loads, profile, search, space, study
from sparkfleet.performance.search import OBJECTIVES, THROUGHPUT, Result
from sparkfleet.performance.study import Study
from sparkfleet.planning import catalog
from sparkfleet.planning.variables import ARGUMENT_PREFIX
from sparkfleet.reporting import event_log, report
from sparkfleet.user_paths import expanded

REPETITIONS, ROUNDS, STREAMS = 3, 2, 16
#: Pairs of runs, the default's and the winner's in turn, that confirm a winner.
PAIRS = 2
EPILOG = """Each run is a trial: the settings are planned first; what served before serves again, verified, after each.
What was measured is kept; the same command goes on where it was interrupted.

Exit codes: 0 done, 2 invalid input, 3 refused, 5 or 6 a Spark did not get back what it served or was not reached (7).
"""


class _StoppedError(Exception):
    """A run ended in a way that ends the search; the exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def add_parser(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser], inventory: str, extra: Callable[[str], str]
) -> None:
    """Add the verb. `extra` checks extra variables."""
    text = "search for better settings of an engine by measured runs on one Spark; writes the best as a profile"
    parser = verbs.add_parser(
        "tune", help=text, description=text, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a card's name or path, or a model of the Hub")
    parser.add_argument("--objective", choices=OBJECTIVES, default=THROUGHPUT, help="default: %(default)s")
    parser.add_argument(
        "--ttft-p95", metavar="TIME", type=duration, help="the first token must come within this, as 300ms or 2s"
    )
    parser.add_argument("--budget", metavar="TIME", type=duration, default=7200.0, help="as 90m or 2h (default: 2h)")
    parser.add_argument(
        "--profile", default="throughput", help="profile of the card to begin at (default: %(default)s)"
    )
    parser.add_argument("--shape", default=loads.CHAT, help="of requests, as of bench (default: %(default)s)")
    parser.add_argument("--streams", type=int, help=f"at a time (default: {STREAMS}; for latency 1)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="requests of each stream (default: %(default)s)")
    parser.add_argument(
        "--repetitions", type=int, default=REPETITIONS, help="of the load in each run (default: %(default)s)"
    )
    parser.add_argument(
        "--search", metavar="NAME", action="append", default=[], help=f"only this: {', '.join(space.NAMES)}; repeatable"
    )
    parser.add_argument("--weights", choices=WEIGHTS, default=REAL, help="as of trial (default: %(default)s)")
    parser.add_argument("--name", help="of the profile (default: tuned-OBJECTIVE)")
    parser.add_argument("--output", metavar="FILE", help="card to write (default: .sparkfleet/tuned/MODEL-HOST.yml)")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("-i", "--inventory", default=inventory, help="default: %(default)s")
    parser.add_argument("-l", "--limit", metavar="HOST", help="the one Spark; needed where the inventory has several")
    parser.add_argument("-e", "--extra-vars", metavar="NAME=VALUE", type=extra, action="append", default=[])
    parser.add_argument("-K", "--ask-become-pass", action="store_true", help="ask for the sudo password")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.set_defaults(run=main)


def duration(text: str) -> float:
    """Seconds of "300ms", "2s", "90m" or "2h"."""
    found = re.fullmatch(r"([0-9]{1,7}(?:\.[0-9]{1,3})?)(ms|s|m|h)", text)
    value = float(found[1]) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[found[2]] if found else 0.0
    if not 0 < value <= 30 * 86400:
        raise argparse.ArgumentTypeError(f"'{printable(text, 40)}': write a time as 300ms, 2s, 90m or 2h")
    return value


def main(options: argparse.Namespace) -> int:
    """Search, confirm, write the profile; the exit code. Raises SparkfleetError."""
    hub_card.ensure_reported(options.model)
    card = catalog.load(options.model)
    host, given = _host(options)
    arguments = {**card.with_profile(options.profile), **given}
    dimensions = space.dimensions(arguments, options.objective, options.search, loader=options.weights == REAL)
    name = options.name or f"tuned-{options.objective}"
    if not re.fullmatch("[a-z][a-z0-9_-]{0,63}", name):
        raise SparkfleetError(f"--name {printable(name, 80)}: small letters, digits, dashes and underscores")
    planned = _loads(options)
    path = _output(options, card, host)
    profile.check(card, path)
    asked = {
        **{"host": host, "model": card.digest, "profile": options.profile, "arguments": arguments},
        **{"objective": options.objective, "ttft_p95_s": options.ttft_p95, "weights": options.weights},
        **{"loads": planned, "space": {one.name: list(one.values) for one in dimensions}},
        "variables": sorted(options.extra_vars),
    }
    say = report_line if options.json else functools.partial(print, flush=True)
    began = time.monotonic()
    with (
        study.opened(paths.STATE, host, json.loads(json.dumps(asked)), options.fresh) as known,
        event_log.keep(paths.STATE, "tune", False, options.extra_vars, inventory=options.inventory, limit=host) as log,
    ):
        tuning = _Tuning(options, host, arguments, planned, known, lambda text: say(report.clean(text)), log)
        code, result = OK, "ok"
        try:
            try:
                tuning.climb(dimensions)
                tuning.confirm()
                if known.winner and known.verdict == "better":
                    profile.write(card, name, options.profile, known.winner, path, tuning.comment())
                    say(f"written: profile {name} in {path}")
                    say(f"to use it: sparkfleet switch {path} --profile {name} -l {host}; and in the inventory")
                    say(f"  sparkfleet_model: {path}\n  sparkfleet_profile: {name}")
                    if again := [f"{ARGUMENT_PREFIX}{key}" for key in known.winner if key in given]:
                        say(f"  without {', '.join(again)}, which would take the profile's place")
            except _StoppedError as error:
                code, result = error.code, tuning.result
                report_line(report.clean(f"sparkfleet: {error}"))
            finally:
                known.write()
        except BaseException as error:
            code, result = of_error(error), CUT
            raise
        finally:
            more = {"study": str(known.path), "runs": len(known.runs)}
            log.end(code, time.monotonic() - began, {host: result}, **more)
    if options.json:
        print(json.dumps({**known.as_dict(), "study": str(known.path), "exit_code": code}, indent=2))
    return code


def _host(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The one Spark, and the arguments of vLLM that its inventory has. Raises SparkfleetError."""
    os.environ.setdefault("ANSIBLE_CONFIG", str(ROOT / "ansible.cfg"))
    from sparkfleet.documents import inventory  # noqa: PLC0415 - Ansible reads its configuration as it is imported

    found = inventory.variables(options.inventory, options.limit, options.extra_vars)
    if len(found) != 1:
        raise SparkfleetError(f"tune needs one Spark: name it with -l; there are {report.names(list(found))}")
    ((host, values),) = found.items()
    given = {
        name.removeprefix(ARGUMENT_PREFIX): value for name, value in values.items() if name.startswith(ARGUMENT_PREFIX)
    }
    return host, given


def _loads(options: argparse.Namespace) -> list[dict[str, int]]:
    """The load of each run, its repetitions with other tokens each. Raises SparkfleetError."""
    streams = options.streams
    if streams is None:
        streams = STREAMS if options.objective == THROUGHPUT else 1
    asked = loads.Asked.of(
        {
            **{"shapes": [options.shape], "streams": [streams], "rounds": options.rounds},
            "repetitions": options.repetitions,
        }
    )
    if not 2 <= asked.repetitions <= 8:
        raise SparkfleetError(f"--repetitions {asked.repetitions}: 2 to 8, so that noise is known")
    (shape,) = asked.shapes
    return [
        Load(streams, shape.input, shape.output, asked.rounds, number, float(asked.seconds)).as_dict()
        for number in range(1, asked.repetitions + 1)
    ]


def _output(options: argparse.Namespace, card: catalog.Card, host: str) -> Path:
    if options.output:
        return expanded("--output", options.output).absolute()
    return paths.STATE / "tuned" / f"{card.name}-{re.sub('[^A-Za-z0-9_.-]', '_', host)}.yml"


class _Tuning:
    """One search: its runs, and what is said of them."""

    def __init__(
        self,
        options: argparse.Namespace,
        host: str,
        arguments: Mapping[str, Any],
        planned: Sequence[Mapping[str, int]],
        known: Study,
        say: Callable[[str], None],
        log: Callable[[dict[str, Any]], None],
    ) -> None:
        self.options, self.host, self.arguments, self.planned = options, host, arguments, planned
        self.known, self.say, self.log = known, say, log
        self.limit_ms = options.ttft_p95 * 1000 if options.ttft_p95 else None
        self.default: search.Settings = {}
        self.best: search.Settings = {}
        self.result = "untouched"  # of the last run
        self.sides: tuple[list[Result], list[Result]] = ([], [])

    # -- the search ----------------------------------------------------------------------------------------------

    def climb(self, dimensions: Sequence[search.Dimension]) -> None:
        """Climb, answering from what was measured before; ends in time to confirm. Raises _StoppedError."""
        results = self.known.results(self.options.objective)
        if results:
            self.say(f"resumed: {report.count(len(results), 'run')} in {self.known.seconds:.0f} s before")
        climb = search.Climb(dimensions, self.limit_ms)
        steps = climb.steps()
        wanted = self.default = next(steps)
        with contextlib.suppress(StopIteration):
            while True:
                best, found = climb.result, results.get(search.key(wanted))
                if found is None:
                    if best is not None and not self._time_for(1 + 2 * PAIRS):
                        self.say(f"the budget of {self.options.budget:.0f} s ends the search")
                        break
                    found = self._run(wanted, confirms=False)
                if best is None and found.failed:
                    raise _StoppedError(f"the default settings cannot be measured: {found.failed}", REFUSED)
                self._said(wanted, found, best)
                wanted = steps.send(found)
        self.best = climb.best

    def confirm(self) -> None:
        """Measure the default and the best in turn; `known.verdict`: "default" where the search found nothing better,
        "better", "noise", or "unconfirmed" where the budget does not suffice. Raises _StoppedError."""
        self.known.winner = space.overrides(self.arguments, self.best) or None
        if not self.known.winner:
            self.known.verdict = "default"
            self.say("nothing is better than the default by more than noise")
            return
        for turn in range(PAIRS):
            for side, settings in enumerate((self.default, self.best)):
                before = [run for run in self.known.runs if run["confirms"] and run["settings"] == settings]
                if turn < len(before):
                    found = study.result(before[turn], self.options.objective)
                elif self._time_for(1):
                    found = self._run(settings, confirms=True)
                else:
                    break
                if found.failed:
                    what = f"{space.words(settings)} failed when it was measured again: {found.failed}"
                    raise _StoppedError(what, DOWN)
                self.sides[side].append(found)
        kept = [[one.allowed(self.limit_ms) for one in side] for side in self.sides]
        by_start = [*self.known.winner] == [space.LOADER]
        first, second = (
            [1 / one.ready_s if by_start and one.ready_s else one.value for one in side] for side in self.sides
        )
        if min(len(first), len(second)) < 2:
            self.known.verdict = "unconfirmed"
            self.say("the budget does not suffice to measure it against the default once more; run it again with more")
            return
        change, low, high, chance = comparison.ratio(first, second)
        in_time = all(kept[1]) and not any(kept[0])
        self.known.verdict = "better" if in_time or (low > 0 and all(kept[1])) else "noise"
        words = {"better": "better", "noise": "not more than noise"}[self.known.verdict]
        self.say(
            f"the best against the default, in turn, {len(first)} and {len(second)} runs: {change:+.1%} (95%: "
            f"{low:+.1%} to {high:+.1%}, p = {chance:.3f}): {words}"
            + (", and its first token comes in time" if in_time else "")
        )

    def comment(self) -> list[str]:
        """What the profile's file says of its origin."""
        first, second = (statistics.mean(one.value for one in side) for side in self.sides)
        return [
            f"Written by `sparkfleet tune` on {time.strftime('%Y-%m-%d')}: {self.options.objective} of "
            f"{self.planned[0]['streams']} streams, {self.planned[0]['input']}:{self.planned[0]['output']} tokens, on "
            f"{self.host}:",
            f"{self._value(second)} with the profile, {self._value(first)} with {self.options.profile}, in turn.",
        ]

    # -- parts ---------------------------------------------------------------------------------------------------

    def _time_for(self, runs: int) -> bool:
        """Whether the budget has room for so many runs, by the longest so far."""
        longest = max((run["seconds"] for run in self.known.runs), default=0.0)
        return bool(self.known.seconds + runs * longest <= self.options.budget)

    def _run(self, settings: search.Settings, confirms: bool) -> Result:
        """A trial with these settings, kept. Raises _StoppedError where it says nothing of them."""
        over = space.overrides(self.arguments, settings)
        given = {
            **{"sparkfleet_model": self.options.model, "sparkfleet_profile": self.options.profile},
            **{"sparkfleet_trial_weights": self.options.weights, "sparkfleet_trial_loads": [*self.planned]},
            **{f"{ARGUMENT_PREFIX}{name}": value for name, value in over.items()},
        }
        words = [word for pair in self.options.extra_vars for word in ("-e", pair)]
        words += ["-e", json.dumps(given), "--limit", self.host]
        words += ["--ask-become-pass"] if self.options.ask_become_pass else []
        began, at = time.monotonic(), time.time()
        collector = Collector(lambda host, line: None, self.log)
        code = run("trial", self.options.inventory, words, collector)
        if collector.error:
            raise _StoppedError(collector.error, code)
        host = collector.hosts[self.host]
        self.result = host.result
        record: Mapping[str, Any] = next(iter(host.measured.values()), {})
        made: dict[str, Any] = {
            **{"settings": settings, "rows": record.get("speed") or [], "ready_s": record.get("ready_s")},
            **{"seconds": round(time.monotonic() - began, 1), "at": round(at, 1), "confirms": confirms, "failed": ""},
        }
        if host.result in ("ok", "changed") and len(made["rows"]) == len(self.planned):
            pass
        elif host.result == "refused" and host.findings:
            made.update(rows=[], failed=f"does not fit: {host.message}")
        elif host.result == "restored":
            made.update(rows=[], failed=host.message or host.failure)
        else:
            raise _StoppedError(f"{self.host}: {host.message or host.result}", CODES[host.result] or INTERNAL)
        made["failed"] = printable(made["failed"], 1000)
        self.known.add(made)
        return study.result(made, self.options.objective)

    def _said(self, settings: search.Settings, found: Result, best: Result | None) -> None:
        what = space.words(settings) if best is None else self._changes(settings)
        if found.failed:
            self.say(f"  {what}: {found.failed.splitlines()[0][:160]}")
            return
        late = "" if found.allowed(self.limit_ms) else ", too late"
        first = f", first token p95 {found.ttft_ms:.0f} ms{late}" if found.ttft_ms is not None else late
        against = f", {found.value / best.value - 1:+.1%}" if best else ""
        mark = " *" if best and search.better(found, best, self.limit_ms) else ""
        self.say(f"  {what}: {self._value(found.value)}{first}{against}{mark}")

    def _changes(self, settings: search.Settings) -> str:
        changed = {name: value for name, value in settings.items() if value != self.default[name]}
        return space.words(changed) or "default"

    def _value(self, value: float) -> str:
        return f"{value:.1f} tok/s" if self.options.objective == THROUGHPUT else f"{1000 / value:.0f} ms a request"
