"""Groups of hosts that run one engine together, a rank on each: a pure function of the inventory.

``sparkfleet_nodes`` lists the hosts, or names a group of the inventory; the first one has rank 0. Each of them has the
same list, and its own ``sparkfleet_fabric_address``.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Mapping, Sequence
from typing import Any

from sparkfleet_host.bounded import printable
from sparkfleet_host.group import MOST_RANKS

from sparkfleet import SparkfleetError
from sparkfleet.planning import kv_layout, vllm_versions
from sparkfleet.planning.catalog import Arguments, Card
from sparkfleet.planning.kv_layout import PIPELINE, TENSOR
from sparkfleet.planning.vllm_versions import Engine

NODES, ADDRESS, EXECUTOR = "sparkfleet_nodes", "sparkfleet_fabric_address", "sparkfleet_executor"
BACKEND, NATIVE, RAY, AUTO = "distributed_executor_backend", "mp", "ray", "auto"
#: Arguments of vllm serve that Sparkfleet sets for a group.
OWN = ("nnodes", "node_rank", "master_addr", "master_port", "headless", "host", "port")
#: Where a group was asked for by a run that leaves one of its hosts out.
_ALL = "a group is changed as a whole: name all of its hosts in --limit"


@dataclasses.dataclass(frozen=True)
class Nodes:
    """A group as one of its hosts has it: `hosts` and their `addresses` on the fabric, by rank."""

    name: str
    rank: int
    hosts: tuple[str, ...]
    addresses: tuple[str, ...]

    @property
    def address(self) -> str:
        """This host's own."""
        return self.addresses[self.rank]

    @property
    def is_head(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def place(self, key: str) -> str:
        """A variable, for a message."""
        return f"{key} of the group {self.name}"


def members(host: str, value: Any, groups: Mapping[str, Sequence[str]]) -> tuple[str, tuple[str, ...]]:
    """Name and hosts of the group in a host's ``sparkfleet_nodes``; ("", ()) for none. Raises SparkfleetError."""
    if value in (None, "", [], ()):
        return "", ()
    sparks = groups.get("sparks", ())
    if isinstance(value, str):
        if value not in groups:
            raise SparkfleetError(
                f"{NODES}: {printable(repr(value), 80)} is no group of the inventory: write the name of one, or a list "
                "of hosts"
            )
        name, hosts = value, tuple(groups[value])
    elif isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        name, hosts = "+".join(value), tuple(map(str, value))
    else:
        raise SparkfleetError(
            f"{NODES}: {printable(repr(value), 80)} is neither the name of a group nor a list of hosts"
        )
    if unknown := [item for item in hosts if item not in sparks]:
        raise SparkfleetError(f"{NODES}: {printable(', '.join(unknown), 200)}: not in the group sparks")
    if twice := sorted({item for item in hosts if hosts.count(item) > 1}):
        raise SparkfleetError(f"{NODES}: {', '.join(twice)} is named twice")
    if not 2 <= len(hosts) <= MOST_RANKS:
        raise SparkfleetError(f"{NODES}: {len(hosts)} hosts, from 2 to {MOST_RANKS} can run an engine together")
    if host not in hosts:
        raise SparkfleetError(
            f"{NODES}: {', '.join(hosts)}: {host} itself is not among them; set it on the group's hosts alone"
        )
    return name, hosts


def of(host: str, groups: Mapping[str, Sequence[str]], known: Mapping[str, Mapping[str, Any]]) -> Nodes | None:
    """The group of a host, None for a host of its own. `known`: of each host its variables, templates resolved. Raises
    SparkfleetError naming the place."""
    name, hosts = members(host, known[host].get(NODES), groups)
    if not hosts:
        return None
    addresses: dict[str, str] = {}
    for other in hosts:
        try:
            theirs = members(other, known[other].get(NODES), groups)[1]
        except SparkfleetError as error:
            raise SparkfleetError(f"{other}: {error}") from None
        if theirs != hosts:
            has = f"has {', '.join(theirs)}" if theirs else "has none"
            raise SparkfleetError(
                f"{NODES}: {host} has {', '.join(hosts)}, but {other} {has}: set it once, in the variables of a group "
                "of these hosts"
            )
        address = _address(other, known[other].get(ADDRESS))
        if address in addresses.values():
            first = next(key for key, value in addresses.items() if value == address)
            raise SparkfleetError(f"{ADDRESS}: {first} and {other} both have {address}")
        addresses[other] = address
    return Nodes(name, hosts.index(host), hosts, tuple(addresses[other] for other in hosts))


def _address(host: str, value: Any) -> str:
    text = str(value or "").partition("/")[0]
    try:
        found = ipaddress.IPv4Address(text)
    except ValueError:
        shown = f"{printable(repr(value), 60)} is no IPv4 address" if value else "is not set"
        raise SparkfleetError(
            f"{host}: {ADDRESS} {shown}: it is the host's own address on the network between the Sparks "
            "(playbooks/fabric.yml shows which there are)"
        ) from None
    if found.is_loopback or found.is_multicast or found.is_unspecified:
        raise SparkfleetError(f"{host}: {ADDRESS}: {text} cannot be reached by others")
    return str(found)


def complete(name: str, hosts: Sequence[str], there: Sequence[str]) -> None:
    """Whether all hosts of a group take part in a run. Raises SparkfleetError."""
    if missing := [host for host in hosts if host not in there]:
        raise SparkfleetError(
            f"{', '.join(missing)} of the group {name} {'does' if len(missing) == 1 else 'do'} not take part in this "
            f"run, or failed before: {_ALL}. Nothing was stopped"
        )


def spread(card: Card, arguments: Arguments, count: int) -> Arguments:
    """The arguments of an engine over so many hosts, a GPU each: with the sizes of tensor and pipeline parallelism.
    Raises SparkfleetError where they do not fit."""
    if taken := [key for key in OWN if key in arguments or key.replace("_", "-") in arguments]:
        raise SparkfleetError(f"sparkfleet_vllm_{taken[0]}: Sparkfleet sets it for an engine of several Sparks")
    if (given := arguments.get(BACKEND, NATIVE)) not in (NATIVE, RAY):
        raise SparkfleetError(
            f"sparkfleet_vllm_{BACKEND}: {printable(repr(given), 60)} does not connect several Sparks: leave it out, "
            f"{EXECUTOR} says what does"
        )
    pipeline = _size(arguments, PIPELINE, 1)
    if count % pipeline:
        raise SparkfleetError(
            f"sparkfleet_vllm_{PIPELINE}: {count} hosts ({NODES}) cannot be divided into {pipeline} stages"
            f"{_ways(card, arguments, count)}"
        )
    tensor = _size(arguments, TENSOR, count // pipeline)
    if tensor * pipeline != count:
        raise SparkfleetError(
            f"{NODES}: {count} hosts, but {card.name} is spread over {tensor * pipeline} ({TENSOR} {tensor}"
            f"{f' x {PIPELINE} {pipeline}' if pipeline > 1 else ''}): name as many hosts, or set "
            f"sparkfleet_vllm_{TENSOR}{_ways(card, arguments, count)}"
        )
    if words := indivisible(card, tensor):
        raise SparkfleetError(
            f"{NODES}: {card.name} cannot be spread over {tensor} hosts: {'; '.join(words)}"
            f"{_ways(card, arguments, count)}"
        )
    if pipeline > card.shape.layers:
        raise SparkfleetError(
            f"sparkfleet_vllm_{PIPELINE}: {card.name} has {card.shape.layers} layers, fewer than {pipeline} stages"
        )
    return {**arguments, TENSOR: tensor}


def executor(wanted: str, image: str, version: Engine, asked: Mapping[str, Any] | None = None) -> tuple[str, str]:
    """What connects the ranks of an engine, vLLM itself (NATIVE) or RAY, and why it cannot, "" if it can or nothing is
    known of the image. `wanted`: ``sparkfleet_executor``; `asked`: what the image said (`executors.ask`)."""
    native = asked["native"] if asked else version.has_nnodes
    ray = asked["ray"] if asked else vllm_versions.has_ray(image)
    chosen = (RAY if native is False else NATIVE) if wanted == AUTO else {"native": NATIVE, "ray": RAY}[wanted]
    what = f"vLLM {(asked['vllm'] if asked else version.text) or 'of unknown version'} in {image}"
    since = ".".join(map(str, vllm_versions.FIRST_NNODES))
    newer = "sparkfleet_image to a newer one"
    if chosen == NATIVE and native is False:
        remedy = newer if ray is False else f"{EXECUTOR}: ray, or {newer}"
        return chosen, (
            f"{EXECUTOR}: {wanted}: {what} cannot connect several Sparks by itself ({since} and later can): set "
            f"{remedy}"
        )
    if chosen == RAY and ray is False and native is False:
        return chosen, (
            f"{EXECUTOR}: {wanted}: {what} connects several Sparks over Ray alone, and {image} has no Ray: set "
            f"sparkfleet_image to one with vLLM {since} or later"
        )
    if chosen == RAY and ray is False:
        remedy = f"{EXECUTOR}: native, or sparkfleet_image to one with Ray"
        return chosen, f"{EXECUTOR}: {wanted}: {image} has no Ray: set {remedy}"
    return chosen, ""


def is_asked(wanted: str, image: str, version: Engine) -> bool:
    """Whether the image has to say what it has, because neither its name nor the card does."""
    if wanted != RAY and version.has_nnodes is None:
        return True
    return executor(wanted, image, version)[0] == RAY and vllm_versions.has_ray(image) is None


def splits(card: Card, arguments: Arguments, count: int) -> list[tuple[int, int]]:
    """Sizes of tensor and pipeline parallelism over so many hosts that are possible and planned, the most tensor
    parallelism first: it is the faster one."""
    return [
        (tensor, count // tensor)
        for tensor in range(count, 0, -1)
        if count % tensor == 0
        and not indivisible(card, tensor)
        and (tensor == count or not kv_layout.unsplit(card, arguments, count // tensor))
    ]


def _ways(card: Card, arguments: Arguments, count: int) -> str:
    """The end of a message about sizes: those that are possible."""
    found = [
        f"sparkfleet_vllm_{TENSOR}: {tensor}{f' and sparkfleet_vllm_{PIPELINE}: {pipeline}' if pipeline > 1 else ''}"
        for tensor, pipeline in splits(card, arguments, count)
    ]
    return f". What is possible over {count} hosts: {'; or '.join(found)}" if found else ""


def indivisible(card: Card, tensor: int) -> list[str]:
    """Why a model's layers cannot be divided by so many ranks, in words."""
    shape, said = card.shape, []
    if shape.heads and shape.heads % tensor:
        said.append(f"its {shape.heads} attention heads are not divisible by {tensor}")
    kv_heads = sorted({entry.kv_heads for entry in shape.attention if entry.kv_heads})
    # Where there are fewer, ranks share one.
    said += [
        f"its {heads} KV heads are not divisible by {tensor}" for heads in kv_heads if heads % tensor and tensor % heads
    ]
    if shape.mlp and shape.mlp % tensor:
        said.append(f"its MLP of {shape.mlp} is not divisible by {tensor}")
    return said


def _size(arguments: Arguments, name: str, otherwise: int) -> int:
    value = arguments.get(name, otherwise)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_RANKS:
        raise SparkfleetError(f"sparkfleet_vllm_{name}: {printable(repr(value), 60)} is not from 1 to {MOST_RANKS}")
    return value
