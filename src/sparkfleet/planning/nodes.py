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
from sparkfleet.planning.catalog import Arguments, Card

NODES, ADDRESS = "sparkfleet_nodes", "sparkfleet_fabric_address"
TENSOR, PIPELINE = "tensor_parallel_size", "pipeline_parallel_size"
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
    pipeline = _size(arguments, PIPELINE, 1)
    tensor = _size(arguments, TENSOR, max(count // pipeline, 1))
    if tensor * pipeline != count:
        raise SparkfleetError(
            f"{NODES}: {count} hosts, but {card.name} is spread over {tensor * pipeline} ({TENSOR} {tensor}"
            f"{f' x {PIPELINE} {pipeline}' if pipeline > 1 else ''}): name as many hosts, or set "
            f"sparkfleet_vllm_{TENSOR}"
        )
    if words := indivisible(card, tensor):
        raise SparkfleetError(f"{NODES}: {card.name} cannot be spread over {tensor} hosts: {'; '.join(words)}")
    return {**arguments, TENSOR: tensor}


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
