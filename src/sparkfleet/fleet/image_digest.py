"""What an image's tag stands for, asked by the controller: no Spark is believed about what others shall run."""

from __future__ import annotations

import dataclasses
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from sparkfleet_host import bounded
from sparkfleet_host.job import JobError
from sparkfleet_host.registry import Reference, Registry, credentials, digest_of, reference

from sparkfleet import SparkfleetError
from sparkfleet.documents import run_cache

#: A controller without a way to the registry keeps a run waiting no longer than this for each silence, and in all.
SECONDS = 5.0
IN_ALL = 20.0
DOCKER_CONFIG = "~/.docker/config.json"


@dataclasses.dataclass(frozen=True)
class Answer:
    """`digest` (sha256:...), or "" and the `reason` why the controller cannot know it."""

    digest: str = ""
    reason: str = ""


def resolve(
    image: str,
    registries: Mapping[str, str],
    proxy: str = "",
    no_proxy: str = "",
    config: str = DOCKER_CONFIG,
    seconds: float = IN_ALL,
    logins: Mapping[str, Mapping[str, str]] | None = None,
    ca: str = "",
) -> Answer:
    """Ask the registry; an image with a digest is that digest. `registries` says where to ask instead: host of a
    registry -> HOST[:PORT] with the same repositories. The proxy of the environment comes before `proxy`. `ca`:
    authorities in PEM to trust besides this controller's. `seconds` is for all of it: names, login, redirects. Raises
    SparkfleetError for what is not the name of an image or of a registry."""
    ref = checked(image)
    if ref.digest:
        return Answer(ref.digest)
    try:
        registry = registry_of(ref, registries, proxy, no_proxy, config, logins, ca)
        return Answer(bounded.in_time(lambda: digest_of(registry, ref.tag), seconds))
    except OSError as error:
        host = str(registries.get(ref.registry, "")) or ref.registry
        return Answer(reason=bounded.printable(f"{host}: {error}", 200))


def checked(image: str) -> Reference:
    """An image's name taken apart. Raises SparkfleetError."""
    try:
        return reference(image)
    except JobError as error:
        raise SparkfleetError(str(error)) from None


def registry_of(
    ref: Reference,
    registries: Mapping[str, str],
    proxy: str = "",
    no_proxy: str = "",
    config: str = DOCKER_CONFIG,
    logins: Mapping[str, Mapping[str, str]] | None = None,
    ca: str = "",
) -> Registry:
    """The registry of an image as this controller asks it, see `resolve`; `logins` of the inventory come before those
    that `docker login` left in `config`. Raises SparkfleetError for what is not the name of a registry, and
    OSError."""
    host = str(registries.get(ref.registry, ""))
    name, _, port = host.partition(":")
    if host and not (bounded.HOST.fullmatch(name) and (not port or (port.isdigit() and len(port) <= 5))):
        shown = bounded.printable(host, 80)
        raise SparkfleetError(f"sparkfleet_controller_registries: {ref.registry}: {shown!r} is not HOST or HOST:PORT")
    found = urllib.request.getproxies()
    ways = {
        "HttpProxy": found.get("http") or proxy,
        "HttpsProxy": found.get("https") or proxy,
        "NoProxy": ",".join(filter(None, (found.get("no"), no_proxy))),
    }
    login = next((dict(logins[name]) for name in (host, ref.registry) if logins and name in logins), None)
    try:
        login = login or credentials(Path(config).expanduser(), host or ref.registry)
    except RuntimeError:
        login = None  # a user without a home has no logins
    return Registry(ref, ways, login, SECONDS, host, ca=ca)


def of_run(
    folder: Path,
    image: str,
    registries: Mapping[str, str],
    proxy: str = "",
    no_proxy: str = "",
    logins: Mapping[str, Mapping[str, str]] | None = None,
    ca: str = "",
) -> tuple[Answer, bool]:
    """`resolve` once a run for all its hosts, kept in a folder that lives as long as the run; whether it was asked just
    now. A tag that moves meanwhile is the same for every host, and a registry that is away costs its time once."""
    file = folder / "sparkfleet-digests.json"
    known, new = run_cache.ask(
        file, image, lambda: dataclasses.asdict(resolve(image, registries, proxy, no_proxy, logins=logins, ca=ca))
    )
    return Answer(**known), new
