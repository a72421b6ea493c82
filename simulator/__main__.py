"""The simulated world: ``python -m simulator VERB``."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence

import docker

from simulator import docker_host, faults
from simulator.shell import SimulatorError
from simulator.world import FLAVOURS, REPOSITORY, STORES, World, home, prepare, progress, purge

QUESTION = "What is the capital of France? Answer in one short sentence."


def _name(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,30}", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a world's name: small letters, digits and dashes")
    return text


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of Sparks from 1 to 64")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0
    if not 0 < rate <= 100_000:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of megabits a second above 0")
    return rate


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m simulator", description="Simulated Sparks and their internet.")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    world = argparse.ArgumentParser(add_help=False)
    world.add_argument("--world", type=_name, default="demo", help="name of the world (default: %(default)s)")

    up = verbs.add_parser("up", parents=[world], help="bring a world up, or add what is missing")
    up.add_argument("--sparks", type=_count, default=1, help="number of Sparks (default: %(default)s)")
    up.add_argument("--flavour", choices=FLAVOURS, default="dgxos", help="dgxos: as DGX OS ships; bare: sshd, Python")
    up.add_argument("--store", choices=STORES, default="graph", help="where Docker keeps images")
    up.add_argument(
        "--ca",
        choices=("trusted", "private"),
        default="trusted",
        help="private: Sparks do not trust the CA of their internet, and the inventory has sparkfleet_ca_file",
    )
    up.add_argument("--engine", choices=("vllm", "none", "fault"), default="vllm", help="what nvcr.io serves")
    up.add_argument(
        "--gpu", choices=("auto", "off"), default="auto", help="auto: a new world gets this machine's NVIDIA GPU"
    )
    status = verbs.add_parser("status", parents=[world], help="show a world")
    status.add_argument("--json", action="store_true")
    verbs.add_parser("ask", parents=[world], help="ask each Spark's endpoint a question, show how to")
    verbs.add_parser("down", parents=[world], help="remove a world; images and caches stay")
    verbs.add_parser("purge", help="remove every trace of all worlds, caches included")
    verbs.add_parser("docker-ensure", help="install and start Docker if that is possible")
    verbs.add_parser("prepare", help="make the images and models of all worlds, beforehand")
    throttle = verbs.add_parser("throttle", parents=[world], help="limit the simulated internet, Mbit/s")
    throttle.add_argument("--registry", type=_rate, metavar="MBIT", help="nvcr.io; no limit unless given")
    throttle.add_argument("--hub", type=_rate, metavar="MBIT", help="huggingface.co; no limit unless given")
    verbs.add_parser("unplug", parents=[world], help="take the internet away; Sparks reach each other")
    verbs.add_parser("plug", parents=[world], help="give it back")
    reboot = verbs.add_parser("reboot", parents=[world], help="restart a Spark as a reset button would")
    reboot.add_argument("host")
    table = "faults:\n" + "\n".join(f"  {name:10} {fault.what}" for name, fault in faults.FAULTS.items())
    plain = argparse.RawDescriptionHelpFormatter
    wrong = verbs.add_parser("break", parents=[world], help="bring faults about", epilog=table, formatter_class=plain)
    wrong.add_argument("host")
    wrong.add_argument("fault", nargs="+")
    right = verbs.add_parser("fix", parents=[world], help="undo faults", epilog=table, formatter_class=plain)
    right.add_argument("host")
    right.add_argument("fault", nargs="*", help="all that there are, if none is named")
    execute = verbs.add_parser("exec", parents=[world], help="run a command on a Spark as root")
    execute.add_argument("host")
    execute.add_argument("command", nargs=argparse.REMAINDER)
    return parser


def _status(world: World, as_json: bool) -> None:
    state = world.state()
    client = docker_host.connect()
    if not state or client is None:
        raise SimulatorError(f"world {world.name} is not up: python -m simulator up --world {world.name}")
    names = {item.name: item.status for item in client.containers.list(all=True)}
    rows = [
        {
            "host": host,
            "flavour": known.get("flavour", ""),
            "state": names.get(world.container_name(host), "missing"),
            "ssh": known.get("ssh"),
            "http": known.get("http"),
        }
        for host, known in {**state["sparks"], "internet": {}}.items()
    ]
    if as_json:
        print(json.dumps({"world": world.name, "hosts": rows}, indent=2))
        return
    for row in rows:
        where = f"ssh port {row['ssh']}, http://127.0.0.1:{row['http']}" if row["ssh"] else ""
        print(f"{row['host']:10} {row['flavour']:6} {row['state']:8} {where}".rstrip())


def _ask(world: World) -> None:
    state = world.state()
    if not state:
        raise SimulatorError(f"world {world.name} is not up: python -m simulator up --world {world.name}")
    for host, known in state["sparks"].items():
        url = f"http://127.0.0.1:{known['http']}/v1/chat/completions"
        messages = [{"role": "user", "content": QUESTION}]
        body = {"model": REPOSITORY, "messages": messages, "temperature": 0, "max_tokens": 32}
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310 - http, loopback
                text = json.load(answer)["choices"][0]["message"]["content"]
        except (urllib.error.URLError, OSError) as error:
            raise SimulatorError(f"{host} does not answer at {url}: {error}") from None
        print(f"\n{host} was asked:  {QUESTION}\n{host} answered:   {text.strip()}\n\nAsk it yourself:\n")
        print(f"  curl {url} -H 'Content-Type: application/json' -d '{json.dumps(body)}'")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        with progress() as say:
            return _run(options, say)
    except SimulatorError as error:
        print(f"simulator: {error}", file=sys.stderr)
        return 1
    except (docker.errors.DockerException, OSError) as error:
        print(f"simulator: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("simulator: interrupted; the same command resumes from here", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace, say: object) -> int:
    world = World(getattr(options, "world", "demo"), say)  # type: ignore[arg-type]
    match options.verb:
        case "up":
            world.up(
                *(options.sparks, options.flavour, options.engine, options.store),
                use_gpu=options.gpu == "auto",
                trusting=options.ca == "trusted",
            )
            _status(world, as_json=False)
        case "status":
            _status(world, options.json)
        case "ask":
            _ask(world)
        case "down":
            world.down()
        case "purge":
            purge(world.say)
        case "docker-ensure":
            docker_host.ensure(home(), world.say)
        case "prepare":
            prepare(world.say)
        case "throttle":
            world.throttle(options.registry, options.hub)
        case "unplug" | "plug":
            world.unplug(options.verb == "plug")
        case "reboot":
            world.reboot(options.host)
        case "break":
            faults.break_(world, options.host, options.fault)
        case "fix":
            faults.fix(world, options.host, options.fault)
        case "exec":
            command = options.command[1:] if options.command[:1] == ["--"] else options.command
            name = world.container(options.host).name
            return subprocess.run(["docker", "exec", str(name), *command], check=False).returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
