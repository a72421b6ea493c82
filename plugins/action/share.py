# SPDX-License-Identifier: Apache-2.0
"""Action: what one Spark fetches, others take from it."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping
from typing import Any

from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.sparkfleet.dgx.plugins.plugin_utils import package  # noqa: F401 - finds what follows
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from sparkfleet_host.bounded import DIGEST, printable
from sparkfleet_host.share import BUNDLE

from sparkfleet.fleet import fetch_schedule, gateway

REGISTRY_PORT, HUB_PORT = 9111, 9112  # as in sparkfleet_host.share

#: Characters of a key and its certificate; ours has fewer than 2,000.
MOST_OF_A_PAIR = 65536

display = Display()


def key_pair() -> str:
    """A key and a self-signed certificate for one day, in PEM: only members of this run have them."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sparkfleet-share")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return (private + certificate.public_bytes(serialization.Encoding.PEM)).decode()


def understood(answer: Mapping[str, Any]) -> dict[str, Any]:
    """A Spark's answer with `reason`, `pair` and `digests` of the types that they must have; what is not is left out.
    It is used for other Sparks too, and shown."""
    pair, digests = answer.get("pair"), answer.get("digests")
    named = digests.items() if isinstance(digests, dict) else ()
    return {
        **answer,
        "reason": printable(str(answer.get("reason") or ""), 400),
        "pair": pair if isinstance(pair, str) and len(pair) <= MOST_OF_A_PAIR else "",
        "digests": {name: digest for name, digest in named if isinstance(digest, str) and DIGEST.fullmatch(digest)},
    }


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible has no types
    """See the module's docstring."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _VALID_ARGS = frozenset(
        ("state", "share", "bundle", "port", "room", "cache_dir", "source", "digest", "clean", "engine")
    )

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """What the state asks for; never fails for want of a source."""
        task_vars = task_vars or {}
        result: dict[str, Any] = super().run(tmp, task_vars)
        result["changed"] = False
        state = self._task.args.get("state")
        self._engine = int(self._task.args.get("engine", 0))
        work = {"schedule": self._schedule, "serve": self._serve, "connect": self._connect, "absent": self._absent}
        return {**result, **work[str(state)](task_vars)}

    def _schedule(self, task_vars: Mapping[str, Any]) -> dict[str, Any]:
        """{"sources": those that this host manages, "image_from", "model_from": hosts, or empty}."""
        host, wants, bundle = task_vars["inventory_hostname"], [], bool(self._task.args.get("bundle"))
        for name in task_vars["ansible_play_hosts_all"]:
            known = task_vars["hostvars"][name]
            inspection = known.get("sparkfleet_inspection") or {}
            if inspection.get("plan") and (bundle or gateway.truth(known.get("sparkfleet_share", True))):
                drained = gateway.truth(known.get("sparkfleet_drained", False))
                want = fetch_schedule.of_host(name, inspection, not drained, self._engine)
                wants += [want] if want else []
        enabled = bool(self._task.args.get("share", True))
        some = (enabled or bundle) and not self._task.check_mode
        made = fetch_schedule.schedule(wants if some else [], bundle=bundle, alone=not enabled)
        for line in made.summary(host):
            display.display(line)
        takes = host in made.image_from or host in made.model_from
        return {
            "sources": [dataclasses.asdict(source) for source in made.leads(host)],
            "image_from": made.image_from.get(host, ""),
            "model_from": made.model_from.get(host, ""),
            "takes": takes,
            "takes_part": takes or bool(made.leads(host)),
            "leaders": {name: source.leader for name, source in made.sources.items()},
        }

    def _serve(self, task_vars: Mapping[str, Any]) -> dict[str, Any]:
        """Start a source: {"host", "pair", "port", "digests", "reason"}; not shown, for the pair's sake."""
        arguments, source = self._task.args, self._task.args["source"]
        pair = key_pair()
        settings = {
            "port": int(arguments.get("port", 9110)),
            "images": source["images"],
            "models": source["models"],
            # The digests as the controller resolved them; this one may serve an image that other Sparks of the run
            # need.
            "digests": {name: digest for name, digest in self._digests(task_vars).items() if name in source["images"]},
            "cache_dir": arguments.get("cache_dir", "/opt/hf"),
            "room": int(arguments.get("room", 0)),
        }
        if arguments.get("bundle"):
            settings.update(offline=True, store=f"{BUNDLE}/image", cache_dir=f"{BUNDLE}/hub")
        known = gateway.settings({name: task_vars["hostvars"][name] for name in task_vars["ansible_play_hosts_all"]})
        own = gateway.settings({source["host"]: task_vars["hostvars"][source["host"]]})[source["host"]]["address"]
        ways = {"address": own, "clients": [item["address"] for name, item in known.items() if name != source["host"]]}
        answer = self._module(task_vars, state="serve", settings=settings, pairs={"run": pair}, **ways)
        if answer["reason"] and arguments.get("bundle"):
            raise AnsibleActionFail(f"{source['host']} cannot serve the bundle: {answer['reason']}")
        if answer["reason"]:
            display.display(f"{source['host']} shares nothing, each Spark fetches for itself: {answer['reason']}")
        if "BEGIN" in answer["pair"]:  # else masked: it is the one above
            pair = answer["pair"]  # of a run that was interrupted, which others still use
        given = {"host": source["host"], "port": settings["port"], "pair": pair, "_ansible_no_log": True}
        return {**given, "reason": answer["reason"], "digests": answer["digests"]}

    def _connect(self, task_vars: Mapping[str, Any]) -> dict[str, Any]:
        """{"mirror": registry to pull from, "digest", "peer": address of a Hub}, empty where there is none."""
        host = task_vars["inventory_hostname"]
        plan, fetches = task_vars["fetch_share_plan"], task_vars["sparkfleet_inspection"]["plan"]["fetches"]
        image = fetches[self._engine]["image"]
        served = {name: self._served(task_vars, plan, name) for name in {plan["image_from"], plan["model_from"]} - {""}}
        tunnels, pairs = [], {}
        for listen, name in ((REGISTRY_PORT, plan["image_from"]), (HUB_PORT, plan["model_from"])):
            if name and name != host and served[name]:
                known = gateway.settings({name: task_vars["hostvars"][name]})[name]
                way = {"listen": listen, "address": known["address"], "port": served[name]["port"], "pair": name}
                tunnels.append(way)
                pairs[name] = served[name]["pair"]
        reason = ""
        if tunnels:
            reason = self._module(task_vars, state="connect", settings={"tunnels": tunnels}, pairs=pairs)["reason"]
        if reason and self._task.args.get("bundle"):
            raise AnsibleActionFail(f"{host} cannot reach {', '.join(sorted(pairs))}, which has the bundle: {reason}")
        if reason:
            display.display(f"{host} fetches for itself: {reason}")
        ready = {name: found for name, found in served.items() if found and (name == host or not reason)}
        source_ready = ready.get(plan["image_from"], {})
        digest, expected = str(source_ready.get("digests", {}).get(image, "")), str(self._task.args.get("digest") or "")
        if digest and expected and digest != expected:
            display.warning(
                f"{plan['image_from']} offers {image} as {printable(digest, 80)}, its registry has {expected}: "
                f"{host} does not use it. Check {plan['image_from']}."
            )
            digest = ""
        return {
            "mirror": f"127.0.0.1:{REGISTRY_PORT}" if digest else "",
            "digest": digest,
            "peer": f"http://127.0.0.1:{HUB_PORT}" if plan["model_from"] in ready else "",
        }

    def _absent(self, task_vars: Mapping[str, Any]) -> dict[str, Any]:
        """Stop the server and the tunnels."""
        return {"reason": self._module(task_vars, state="absent", clean=self._task.args.get("clean", True))["reason"]}

    def _digests(self, task_vars: Mapping[str, Any]) -> dict[str, str]:
        """The digests that the controller resolved for the images of the run: image -> digest."""
        found = {}
        for name in task_vars["ansible_play_hosts_all"]:
            known = task_vars["hostvars"][name]
            answer = known.get("fetch_image_digest") or {}
            if answer.get("image") and answer.get("digest"):
                found[str(answer["image"])] = str(answer["digest"])
        return found

    def _served(self, task_vars: Mapping[str, Any], plan: Mapping[str, Any], name: str) -> dict[str, Any]:
        """What the leader of a source got when it started serving; {} if it does not serve."""
        found = task_vars["hostvars"][plan["leaders"][name]].get("fetch_share_served") or {}
        answers = [dict(answer) for answer in found.get("results") or [] if answer.get("host") == name]
        return answers[0] if answers and not answers[0]["reason"] else {}

    def _module(self, task_vars: Mapping[str, Any], **arguments: Any) -> dict[str, Any]:
        """Run the module; an unreachable host or a failure becomes a reason."""
        try:
            answer: dict[str, Any] = self._execute_module(
                module_name="sparkfleet.dgx.share_service", module_args=arguments, task_vars=task_vars
            )
        except AnsibleConnectionFailure as error:
            answer = {"reason": f"not reached: {' '.join(str(error).split())[:120]}"}
        if answer.get("failed") or "reason" not in answer:
            answer = {"reason": str(answer.get("msg") or "no answer")[:200]}
        return understood(answer)
