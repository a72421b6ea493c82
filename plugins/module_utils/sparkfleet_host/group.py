# SPDX-License-Identifier: Apache-2.0
"""One engine over several hosts, a rank on each: what the hosts of a group tell each other.

Rank 0, the head, decides; the others, the workers, follow. The guard of each host answers GET /group with `status`,
which the others ask. Nothing is sent to a host: a worker reads what the head wants, and acts itself.

    /var/lib/sparkfleet/group.json   {"epoch": int, "release": int or null, "down": bool}

The head raises the epoch each time that the ranks are to start again, and says of which release. A worker starts its
rank when the epoch of the head is not the one that it has started its rank for. vLLM's ranks cannot be joined by one
that starts later, so an epoch has one start of each rank: whenever one of them ends, all are started again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from . import bounded, engine
from .bounded import BoundsError, as_dict, as_int, as_list, as_str, matched, printable
from .docker import Docker, DockerError
from .http import Client, HttpError

if TYPE_CHECKING:
    from .releases import Store

RECORD = "group.json"
PATH = "/group"
ASK_SECONDS = 3.0  # for an answer of another host
ANSWER_BYTES = 64 * bounded.KIB
MOST_RANKS = 8
EPOCHS = 1 << 50


@dataclasses.dataclass(frozen=True)
class Node:
    """A host of a group: its name in the inventory, and its address on the fabric."""

    host: str
    address: str


@dataclasses.dataclass(frozen=True)
class Group:
    """The place of a host in a group. `port`: of the hosts' guards; `digest`: a hash of what has to be the same on all
    ranks (image, revision, arguments)."""

    name: str
    rank: int
    nodes: tuple[Node, ...]
    port: int
    digest: str

    @property
    def is_head(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def head(self) -> Node:
        """The host of rank 0."""
        return self.nodes[0]

    def named(self, rank: int) -> str:
        """A rank, for a message."""
        return f"rank {rank} ({self.nodes[rank].host})"


def check_group(data: Any) -> Group:
    """The part `group` of an engine of a release's plan: {name, rank, nodes: [{host, address}], port, digest}. Raises
    BoundsError."""
    given = as_dict(data, "group")
    nodes = []
    for item in as_list(given.get("nodes"), "group.nodes", MOST_RANKS):
        node = as_dict(item, "group.nodes")
        address = as_str(node.get("address"), "group.nodes.address", 100)
        nodes.append(
            Node(as_str(node.get("host"), "group.nodes.host", 300), matched(bounded.HOST, address, "group address"))
        )
    if len(nodes) < 2:
        raise BoundsError("group.nodes: fewer than two")
    return Group(
        as_str(given.get("name"), "group.name", 300),
        as_int(given.get("rank"), "group.rank", 0, len(nodes) - 1),
        tuple(nodes),
        as_int(given.get("port"), "group.port", 1, 65535),
        matched(bounded.SHA256, given.get("digest"), "group.digest"),
    )


@dataclasses.dataclass(frozen=True)
class Record:
    """Of a head what it wants, of a worker what it has started. `down`: the ranks are to stay stopped."""

    epoch: int = 0
    release: int | None = None
    down: bool = False


def read_record(store: Store) -> Record:
    """The record of this host; the first one where there is none that can be understood."""
    try:
        return _record(bounded.read_json(store.state_dir / RECORD))
    except (OSError, BoundsError):
        return Record()


def _record(data: Mapping[str, Any]) -> Record:
    release = data.get("release")
    down = data.get("down", False)
    if not isinstance(down, bool):
        raise BoundsError("down: not true or false")
    return Record(
        as_int(data.get("epoch"), "epoch", 0, EPOCHS),
        None if release is None else as_int(release, "release", 1, 10**9),
        down,
    )


def write_record(store: Store, record: Record) -> None:
    """Keep a record. Raises OSError."""
    from .releases import write_json  # noqa: PLC0415 - it imports the format of releases, which imports this

    write_json(store.state_dir / RECORD, dataclasses.asdict(record))


def keep_down(store: Store) -> None:
    """Let the ranks stay stopped until they are started on purpose; nothing where there never were any."""
    record = read_record(store)
    if record.epoch and not record.down:
        with contextlib.suppress(OSError):
            write_record(store, dataclasses.replace(record, down=True))


def of_release(store: Store, number: int | None) -> Group | None:
    """The place of this host in the group of a release; None where the release is of this host alone, or cannot be
    read."""
    from .releases import ReleaseError  # noqa: PLC0415

    if number is None:
        return None
    with contextlib.suppress(ReleaseError):
        return next((item.group for item in store.engines(number) if item.group), None)
    return None


@dataclasses.dataclass(frozen=True)
class Status:
    """What a host of a group says of itself. `id`, `phase`, `outcome`, `error`: of the switch that runs or ran last;
    `active`: whether it runs; `joined`: whether a worker has checked that it could; `digest`: of the release that is
    switched to, or is current; `container`: state of its rank."""

    id: str = ""
    to: int = 0
    phase: str = ""
    outcome: str = ""
    error: str = ""
    active: bool = False
    joined: bool = False
    digest: str = ""
    current: int | None = None
    epoch: int = 0
    release: int | None = None
    down: bool = False
    container: str = "missing"


def status(store: Store, docker: Docker) -> dict[str, Any]:
    """What GET /group answers, the fields of `Status`."""
    journal = store.switch() or {}
    record, current, active = read_record(store), store.current(), store.switch_active()
    switching = active or journal.get("phase") not in (None, "done")
    group = of_release(store, journal.get("to") if switching else current)
    service = rank_service(store, record.release if record.release is not None else current)
    container = "missing"
    with contextlib.suppress(DockerError):
        container = engine.inspect(docker, service)["state"] if service else "missing"
    return {
        **{key: str(journal.get(key) or "") for key in ("id", "phase", "outcome")},
        "to": int(journal.get("to") or 0),
        "error": printable(str((journal.get("error") or {}).get("message") or ""), 1000),
        "active": active,
        "joined": bool(journal.get("joined")),
        "digest": group.digest if group else "",
        "current": current,
        **dataclasses.asdict(record),
        "container": container,
    }


def rank_service(store: Store, number: int | None) -> str:
    """The service of a release's rank; "" where the release is of this host alone."""
    from .releases import ReleaseError  # noqa: PLC0415

    with contextlib.suppress(ReleaseError):
        return next((item.service for item in store.engines(number) if item.group), "") if number is not None else ""
    return ""


def understood(text: str | bytes) -> Status:
    """An answer of GET /group. Raises BoundsError."""
    data = as_dict(bounded.parse_json(text, "the answer", ANSWER_BYTES), "the answer")
    found: dict[str, Any] = {}
    for field in dataclasses.fields(Status):
        value = data.get(field.name, field.default)
        if isinstance(field.default, bool):
            if not isinstance(value, bool):
                raise BoundsError(f"{field.name}: not true or false")
        elif isinstance(field.default, str):
            value = as_str(value, field.name, 2000)
        elif value is not None or field.default is not None:
            value = as_int(value, field.name, 0, EPOCHS)
        found[field.name] = value
    return Status(**found)


def ask(group: Group, rank: int, seconds: float = ASK_SECONDS) -> Status | None:
    """What a rank's host says of itself; None where no answer comes that can be understood."""
    node = group.nodes[rank]
    address = f"[{node.address}]" if ":" in node.address else node.address
    try:
        answer = Client(f"http://{address}:{group.port}", seconds).get(PATH, seconds, ANSWER_BYTES)
        return understood(answer.body) if answer.status == 200 else None
    except (HttpError, BoundsError):
        return None


def ask_workers(group: Group) -> dict[int, Status | None]:
    """The same of all ranks but 0, at the same time."""
    ranks = range(1, len(group.nodes))
    with ThreadPoolExecutor(len(group.nodes)) as pool:
        return dict(zip(ranks, pool.map(lambda rank: ask(group, rank), ranks), strict=True))


def absent(group: Group, found: Mapping[int, Status | None], epoch: int, states: Sequence[str]) -> dict[int, str]:
    """The workers that do not run their rank of an epoch, in words. `states`: of containers that count as running."""
    words = {}
    for rank, seen in found.items():
        if seen is None:
            words[rank] = f"{group.named(rank)} does not answer at {group.nodes[rank].address}:{group.port}"
        elif seen.epoch != epoch:
            words[rank] = f"{group.named(rank)} has not started its rank"
        elif seen.container not in states:
            words[rank] = f"the container of {group.named(rank)} is {seen.container}"
    return words


def as_text(found: Mapping[str, Any]) -> str:
    """A `status` as it is sent."""
    return json.dumps(found, sort_keys=True) + "\n"
