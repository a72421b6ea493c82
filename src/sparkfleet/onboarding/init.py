"""`sparkfleet init`: an inventory of Sparks that were found or named, each inspected before it is added.

What needs the user's decision (a host key, a password, the choice of a model) is asked only on a terminal; otherwise an
option decides. Run again, it inspects all hosts again, adds new ones, and asks about nothing else.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import getpass
import json
import os
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparkfleet_host.bounded import GIB, printable

from sparkfleet import SparkfleetError, paths
from sparkfleet.exit_codes import CODES, INTERRUPTED, OK, REFUSED
from sparkfleet.fleet.gateway import truth
from sparkfleet.onboarding import enrol, hub_card, inventory_file, model_choice, ssh
from sparkfleet.onboarding.enrol import Host
from sparkfleet.onboarding.inventory_file import Entry
from sparkfleet.onboarding.model_choice import Choice
from sparkfleet.onboarding.prompts import Prompter, report_line
from sparkfleet.onboarding.ssh import Place
from sparkfleet.paths import ROOT
from sparkfleet.planning import catalog, memory_plan, target
from sparkfleet.user_paths import expanded

TOKENS = "https://huggingface.co/settings/tokens"
#: Names in an inventory folder that are not inventory sources.
NO_SOURCE = ("group_vars", "host_vars")


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command line."""
    text = "create an inventory of your Sparks, or add Sparks to it"
    parser = verbs.add_parser(
        "init",
        help=text,
        description=f"{text} (docs/init.md)",
        usage="sparkfleet init [OPTION ...] [FOLDER] [HOST ...]",
    )
    parser.add_argument(
        "words",
        metavar="FOLDER, HOST",
        nargs="*",
        help="FOLDER of the inventory: an argument with a / in it, or an existing folder (default: inventory/mine). "
        "HOST: [user@]name-or-address[:port], or localhost for this machine; without any, this network is searched "
        "for Sparks",
    )
    parser.add_argument(
        "--user", default="", help="user on the Sparks, if HOST has none (default: asked, or as ssh is configured)"
    )
    parser.add_argument(
        "--private-key", metavar="FILE", default="", help="SSH key to log in with; written to the inventory"
    )
    parser.add_argument(
        "--ssh-common-args", metavar="ARGS", default="", help="additional ssh arguments; written to the inventory"
    )
    parser.add_argument("--model", default="", help="a name from the catalogue, or a card's path (default: asked)")
    parser.add_argument(
        "--profile", default="", help=f"profile of the card (default: asked, else {model_choice.PROFILE})"
    )
    parser.add_argument("--gateway", metavar="SPARK", default="", help="Spark that is also the gateway (default: none)")
    parser.add_argument("--accept-host-keys", action="store_true", help="accept host keys that are not known yet")
    parser.add_argument("--force", action="store_true", help="accept a model whose plan does not fit")
    parser.add_argument("--no-discover", action="store_true", help="do not search this network for Sparks")
    parser.add_argument("--yes", action="store_true", help="ask nothing, use the defaults")
    parser.add_argument("--json", action="store_true", help="ask nothing; one JSON document on standard output")
    parser.set_defaults(run=run)


@dataclasses.dataclass(frozen=True)
class Inventory:
    """The existing inventory: hosts, the variables that a new one inherits, and whether it exists."""

    hosts: list[Host]
    shared: Mapping[str, Any]
    there: bool

    def says(self, setting: str) -> str:
        """The value of sparkfleet_model or sparkfleet_profile for a new host."""
        name = f"sparkfleet_{setting}"
        return str(self.shared.get(name) or target.defaults()[name])


def run(options: argparse.Namespace) -> int:
    """The verb; returns the exit code. Raises SparkfleetError with nothing written."""
    person = Prompter(not (options.yes or options.json) and sys.stdin.isatty() and sys.stdout.isatty())
    try:
        return _run(options, person)
    except model_choice.DoesNotFit as error:
        report_line(f"sparkfleet: {error}")
        return REFUSED
    except (KeyboardInterrupt, EOFError):
        report_line("\nsparkfleet: interrupted; the inventory is unchanged")
        return INTERRUPTED


def _run(options: argparse.Namespace, person: Prompter) -> int:
    folder, places = words(options.words)
    _check_options(options)
    known = read(folder)
    wanted = [place for place in places if not _is_among(place, known.hosts)]
    _check_existing(options, folder, known, bool(wanted))
    if not places and not known.there:
        wanted = _discovered(options, person)
    new = [Host(place) for place in _with_user(wanted, options, person, known.shared)]
    hosts = [*known.hosts, *new]
    with concurrent.futures.ThreadPoolExecutor(1) as aside:
        neighbours = aside.submit(_neighbours, options, known, asked=known.there and not places)
        enrol.check(hosts, person, options.accept_host_keys)
        found = neighbours.result()
    if not options.json:
        print("\n" + enrol.table(hosts), end="")
    code = max((CODES.get(host.result, OK) for host in hosts), default=OK)
    added = [host for host in hosts if host.new]
    files: dict[Path, tuple[str, str]] = {}
    chosen = None
    if added:
        chosen = _choice(options, person, added, known)
        gateway = "" if known.there else _gateway(options, person, added)
        files = _files(folder, known, added, chosen, gateway)
        _write(files, options, person)
    if options.json:
        document = {**_document(code, folder, hosts, files, chosen), "also_found": [place for _, place in found]}
        print(json.dumps(document, indent=2))
        return code
    for name, place in found:
        print(f"also on this network: {printable(name)}; `sparkfleet init {_shown(folder)} {place}` adds it")
    print(_closing(folder, hosts, added, chosen, known.there), end="")
    return code


def words(given: Sequence[str]) -> tuple[Path, list[Place]]:
    """Folder and hosts of the command line's words. Raises SparkfleetError."""
    folders = [word for word in given if "/" in word or word in (".", "..") or os.path.isdir(word)]  # noqa: PTH112
    if len(folders) > 1:
        raise SparkfleetError(f"{' and '.join(folders)} are two folders; an inventory has only one")
    folder = expanded("FOLDER", folders[0]) if folders else paths.INVENTORY
    if folder.exists() and not folder.is_dir():
        raise SparkfleetError(f"{folder} is a file: name the folder of the inventory")
    return folder, list(dict.fromkeys(ssh.parse(word) for word in given if word not in folders))


def _check_options(options: argparse.Namespace) -> None:
    """Checks that need no contact with any host."""
    if options.user:
        ssh.parse(f"{options.user}@host")
    if options.private_key and not expanded("--private-key", options.private_key).is_file():
        raise SparkfleetError(f"--private-key {options.private_key}: no such file")
    if options.private_key or options.ssh_common_args:
        ssh.settings(Place("host", "", 0, _key(options), options.ssh_common_args))
    if options.model or options.profile:
        hub_card.ensure_reported(options.model or model_choice.default())
        catalog.load(options.model or model_choice.default()).with_profile(options.profile or model_choice.PROFILE)


def _key(options: argparse.Namespace) -> str:
    return str(expanded("--private-key", options.private_key).absolute()) if options.private_key else ""


def read(folder: Path) -> Inventory:
    """The inventory in a folder, if it exists. Raises SparkfleetError for one that cannot be read."""
    sources = [path for path in folder.iterdir() if path.name not in NO_SOURCE] if folder.is_dir() else []
    if not [path for path in sources if not path.name.startswith(".")]:
        return Inventory([], {}, False)
    os.environ.setdefault("ANSIBLE_CONFIG", str(ROOT / "ansible.cfg"))
    from sparkfleet.documents import inventory  # noqa: PLC0415 - Ansible reads its configuration as it is imported

    known, shared = inventory.reach(str(folder))
    hosts = [
        Host(_place(name, values), name, known=True, any_gpu=not truth(values.get("sparkfleet_require_gb10", True)))
        for name, values in known.items()
    ]
    return Inventory(hosts, shared, True)


def _place(name: str, values: Mapping[str, Any]) -> Place:
    """Where a host of an inventory is."""
    if values.get("ansible_connection") == "local":
        return Place()
    return Place(
        str(values.get("ansible_host") or name),
        str(values.get("ansible_user") or ""),
        _port(name, values.get("ansible_port")),
        str(values.get("ansible_ssh_private_key_file") or ""),
        str(values.get("ansible_ssh_common_args") or ""),
    )


def _port(name: str, value: Any) -> int:
    """The port of a host of an inventory; 0 for none."""
    if value in (None, "", 0):
        return 0
    if not re.fullmatch("[0-9]{1,5}", str(value)) or not 0 < int(str(value)) < 65536:
        raise SparkfleetError(f"{name}: ansible_port {printable(str(value), 80)!r} is not a TCP port")
    return int(str(value))


def _is_among(place: Place, hosts: Sequence[Host]) -> bool:
    """Whether the inventory has the place, by address and port, or by the name of the host."""
    port = place.port or ssh.PORT
    return any(
        (place.address == host.name and not place.port)
        or (place.address, port) == (host.place.address, host.place.port or ssh.PORT)
        for host in hosts
    )


def _check_existing(options: argparse.Namespace, folder: Path, known: Inventory, new: bool) -> None:
    """Refuse options for new inventories if there is one already."""
    if not known.there:
        return
    if new:
        inventory_file.group_file(folder)
    if options.gateway:
        raise SparkfleetError(
            f"--gateway {options.gateway}: {_shown(folder)} already exists; add the group gateways there by hand "
            "(docs/gateway.md)"
        )
    for option in ("model", "profile"):
        asked, has = getattr(options, option), known.says(option)
        if not new and asked and asked != has:
            raise SparkfleetError(
                f"--{option} {asked}: {_shown(folder)} says {has}; change sparkfleet_{option} there, or try it out "
                "with `sparkfleet switch`"
            )


def _discovered(options: argparse.Namespace, person: Prompter) -> list[Place]:
    """Sparks to choose from: this machine, and hosts that announce themselves. Raises SparkfleetError if there are
    none."""
    from sparkfleet.onboarding import discovery  # noqa: PLC0415 - needed here alone

    report_line("Searching this network for Sparks ..." if not options.no_discover else "Inspecting this machine ...")
    here = ssh.inspect(Place()).facts
    found = [] if options.no_discover else discovery.browse()
    places = [Place()] if here and "GB10" in here.gpu else []
    rows = [("this machine", here.gpu)] if here and places else []
    likely = len(places)  # chosen by default; they come first
    found.sort(key=lambda item: not item.likely)
    for item in found:
        rows.append((item.name, ", ".join(item.addresses)))
        likely += item.likely
    places += enrol.at_once(discovery.place, found)
    if not likely and not person.there:
        names = f"; hosts with ssh: {', '.join(item.name for item in found)}" if found else ""
        raise SparkfleetError(
            f"no Spark was found{names}. Name them: `sparkfleet init spark-1a2b.local 192.0.2.12`. The network may "
            "block mDNS; a Spark's name is in its quick start guide, its address in the router"
        )
    numbered = [f"  {number}  {name}  {text}" for number, (name, text) in enumerate(rows, 1)]
    report_line("\n".join(numbered) or "  none found")
    chosen = ",".join(str(number) for number in range(1, likely + 1))

    def taken(answer: str) -> list[Place]:
        parts = answer.replace(",", " ").split()
        if not parts:
            raise SparkfleetError("enter numbers, or hosts as [user@]name-or-address[:port]")
        numbers = {str(number): place for number, place in enumerate(places, 1)}
        outside = [part for part in parts if part.isdecimal() and part not in numbers]
        if outside:
            raise SparkfleetError(f"number {printable(outside[0], 40)} is not in the list")
        return [numbers[part] if part in numbers else ssh.parse(part) for part in parts]

    return list(dict.fromkeys(person.ask("Which are your Sparks? Enter numbers, or other hosts", chosen, taken)))


def _neighbours(options: argparse.Namespace, known: Inventory, asked: bool) -> list[tuple[str, str]]:
    """Announced hosts with names like Sparks' that are not in the inventory: name, and how to specify it."""
    if options.no_discover or not asked:
        return []
    from sparkfleet.onboarding import discovery  # noqa: PLC0415 - needed here alone

    found = [item for item in discovery.browse() if item.likely]
    names = {host.name for host in known.hosts}
    addresses = {host.place.address for host in known.hosts if host.place.address}
    if found:
        addresses |= {text for name in addresses if not ssh.is_address(name) for text in discovery.resolved(name)}
    return [(item.name, discovery.place(item).text) for item in found if not discovery.same(item, addresses, names)]


def _with_user(
    places: Sequence[Place], options: argparse.Namespace, person: Prompter, shared: Mapping[str, Any]
) -> list[Place]:
    """The places with user, key and arguments: from options, the inventory, or ssh's configuration."""
    key = _key(options) or str(shared.get("ansible_ssh_private_key_file") or "")
    arguments = options.ssh_common_args or str(shared.get("ansible_ssh_common_args") or "")
    given = options.user or str(shared.get("ansible_user") or "")
    made = []
    for place in places:
        if place.local:
            made.append(place)
            continue
        port = place.port or _port("sparks", shared.get("ansible_port"))
        full = dataclasses.replace(place, user=place.user or given, port=port, private_key=key, common_args=arguments)
        if not full.user:
            user = ssh.settings(full)["user"]
            if user == getpass.getuser():  # not set in any ssh configuration
                given = user = person.ask("User on the Sparks", user, lambda name: ssh.parse(f"{name}@host").user)
            full = dataclasses.replace(full, user=user)
        made.append(full)
    return made


def _choice(options: argparse.Namespace, person: Prompter, added: Sequence[Host], known: Inventory) -> Choice | None:
    """What the new Sparks should serve; None if the inventory defines it. Raises SparkfleetError."""
    model, profile = options.model, options.profile
    if known.there and not (model or profile):
        return None
    if known.there:  # options that were not given come from the inventory
        model, profile = (options.model or known.says("model"), options.profile or known.says("profile"))
    smallest = min(host.inspection.facts.total / GIB for host in added if host.inspection.facts)
    room = memory_plan.Memory(smallest, smallest - memory_plan.USUAL_HOST_GIB)
    return model_choice.choose(person, model, profile, room, options.force)


def _gateway(options: argparse.Namespace, person: Prompter, added: Sequence[Host]) -> str:
    """The Spark that is also the gateway, or empty. None by default: a single address is a single point of failure."""
    names = [host.name for host in added]

    def taken(name: str) -> str:
        if name and name not in (*names, "none"):
            raise SparkfleetError(f"the gateway '{name}' is not one of the Sparks to be added: {', '.join(names)}")
        return "" if name == "none" else name

    if options.gateway or len(names) < 2:
        return taken(options.gateway)
    return person.ask("Gateway, one address for all (docs/gateway.md): name of the Spark to run it", "none", taken)


def _files(
    folder: Path, known: Inventory, added: Sequence[Host], chosen: Choice | None, gateway: str
) -> dict[Path, tuple[str, str]]:
    """File -> its current text ("" if there is none), and its new text."""
    if known.there:
        has = {f"sparkfleet_{setting}": known.says(setting) for setting in ("model", "profile")}
        own = chosen.variables({**known.shared, **has}) if chosen else {}
        entries = [_entry(host, known.shared, many=True, more=own) for host in added]
        path = inventory_file.group_file(folder)
        before = inventory_file.read(path)
        return {path: (before, inventory_file.add(path, before, entries))}
    shared = _shared(added)
    entries = [_entry(host, shared, many=len(added) > 1) for host in added]
    files = {folder / "hosts.yml": ("", inventory_file.hosts(entries, shared, gateway))}
    settings = folder / "group_vars" / "sparks.yml"
    if chosen and not any((folder / "group_vars").glob("sparks*")):
        values = chosen.variables({"sparkfleet_profile": model_choice.PROFILE})
        files[settings] = ("", inventory_file.settings(values, chosen.card.licence.gated))
    return files


def _shared(added: Sequence[Host]) -> dict[str, Any]:
    """What the hosts reached by ssh have in common: user, key, arguments."""
    remote = [host.place for host in added if not host.place.local]
    users = collections.Counter(place.user for place in remote)
    found: dict[str, Any] = {"ansible_user": users.most_common(1)[0][0]} if users else {}
    if remote and remote[0].private_key:
        found["ansible_ssh_private_key_file"] = remote[0].private_key
    if remote and remote[0].common_args:
        found["ansible_ssh_common_args"] = remote[0].common_args
    return found


def _entry(host: Host, shared: Mapping[str, Any], many: bool, more: Mapping[str, Any] | None = None) -> Entry:
    """A host's lines, without what the group sets. `many`: other hosts must reach it too."""
    place = host.place
    if place.local:
        from sparkfleet.onboarding import discovery  # noqa: PLC0415 - needed here alone

        values: dict[str, Any] = {"ansible_host": discovery.own_address()} if many else {}
        values |= {"ansible_connection": "local", "ansible_python_interpreter": "/usr/bin/python3"}
        user = getpass.getuser() if "ansible_user" in shared else ""
    else:
        values = {"ansible_host": place.address} if place.address != host.name else {}
        values |= {"ansible_port": place.port} if place.port != _port("sparks", shared.get("ansible_port")) else {}
        real = ssh.settings(place)["hostname"]
        values |= {"sparkfleet_address": real} if many and real.lower() != place.address.lower() else {}
        user = place.user
    wanted = {
        "ansible_user": user,
        "ansible_ssh_private_key_file": place.private_key,
        "ansible_ssh_common_args": place.common_args,
    }
    values |= {name: value for name, value in wanted.items() if value and value != shared.get(name)}
    return Entry(host.name, {**values, **(more or {})})


def _write(files: Mapping[Path, tuple[str, str]], options: argparse.Namespace, person: Prompter) -> None:
    """Show what will be written, ask, write. Raises SparkfleetError if the user declines."""
    for path, (before, after) in files.items():
        if not options.json:
            name = _shown(path)
            text = inventory_file.diff(before, after, name) if before else f"{name}\n{textwrap.indent(after, '  ')}"
            print(f"\n{text}", end="")
    if not person.agrees("\nWrite this?", True):
        raise SparkfleetError("nothing was written")
    for path, (_, after) in files.items():
        inventory_file.write(path, after)


def _shown(path: Path) -> str:
    """A path as typed from the current directory."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _document(
    code: int, folder: Path, hosts: Sequence[Host], files: Mapping[Path, Any], chosen: Choice | None
) -> dict[str, Any]:
    """For programs."""
    served = {"model": chosen.card.name, "profile": chosen.profile, "fits": chosen.fits} if chosen else {}
    plan = {"plan": chosen.plan.as_dict()} if chosen and chosen.plan else {}
    written = [str(path.absolute()) for path in files]
    hosts_found = [host.as_dict() for host in hosts]
    return {
        "verb": "init",
        "exit_code": code,
        "inventory": str(folder.absolute()),
        "written": written,
        "hosts": hosts_found,
        **served,
        **plan,
    }


def _closing(folder: Path, hosts: Sequence[Host], added: Sequence[Host], chosen: Choice | None, there: bool) -> str:
    """The outcome, and what to do next."""
    name, lines = _shown(folder), []
    absent = [host.label for host in hosts if host.result in ("unreachable", "refused") and not host.known]
    if added:
        lines.append(f"{name} has {', '.join(host.name for host in added)}" + (" now too" if there else ""))
    else:
        lines.append("nothing to write" if there else "nothing was written")
    if absent:
        lines.append(f"not written: {', '.join(absent)}; run this again when that is fixed")
    if not added:
        return "\n" + "\n".join(lines) + "\n"
    if chosen and chosen.card.licence.gated and not os.environ.get("HF_TOKEN"):
        lines.append(
            f"{chosen.card.name} requires a licence: accept it at {chosen.card.licence.page}, create a read token at "
            f"{TOKENS}, and `export HF_TOKEN=hf_...` before the run, or keep it in a vault (see "
            f"{name}/group_vars/sparks.yml)"
        )
    password = any(host.inspection.facts and host.inspection.facts.sudo == "password" for host in hosts)
    ask = " -K" if password else ""
    lines += [
        "next:" + (" (-K asks for the sudo password)" if password else ""),
        f"  sparkfleet preflight -i {name}{ask}",
        f"  sparkfleet deploy -i {name}{ask}",
        f"  sparkfleet status -i {name}{ask}",
    ]
    return "\n" + "\n".join(lines) + "\n"
