"""Rows of the fault matrix for what comes from outside: what people, neighbours, disks and clocks do to a
Spark that serves. Each was first tried by hand (issue 11), and ends well since."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simulator.row import (
    ANY,
    AS_SEEN,
    BEFORE,
    NEXT,
    SERVES,
    SERVES_NEW,
    STOPPED,
    Row,
    broken,
    playing,
)
from simulator.shell import SimulatorError
from simulator.spark import ROOT, SERVICE, Spark

#: New sessions of ssh from here on.
CUT = "kill -9 $(pgrep -x sshd-session) || true"
PROJECT, STATE = "/opt/sparkfleet", "/var/lib/sparkfleet"
COMPOSE = f"docker compose --project-directory {PROJECT} --file {PROJECT}/compose.yml"
#: Verbs that must not touch a host whose key has changed.
CHECKED_VERBS = ("status", "preflight", "verify", "drift", "diagnose", "logs", "start", "restart", "stop", "rollback")
UNREACHABLE = 7
#: A setting that asks for another release.
OTHER: dict[str, Any] = {"sparkfleet_vllm_max_num_seqs": 11}


def after(script: str, playbook: str = "site.yml", **variables: Any) -> Callable[[Spark], str]:
    """A run after something was done on the host."""

    def act(spark: Spark) -> str:
        spark.sh(script)
        return spark.play(playbook, **variables)

    return act


def done(script: str, wait: float = 0.0) -> Callable[[Spark], str]:
    """Something is done on the host, and nothing else."""

    def act(spark: Spark) -> str:
        output = spark.sh(script)
        time.sleep(wait)
        return output

    return act


def plays(*playbooks: str, **variables: Any) -> Callable[[Spark], str]:
    """Runs one after the other."""
    return lambda spark: "".join(spark.play(name, **variables) for name in playbooks)


def key_replaced(spark: Spark) -> str:
    """Another host has the address: every verb refuses, and says why."""
    spark.sh(
        "cd /etc/ssh && cp -p ssh_host_ed25519_key /run/kept_host_key && rm ssh_host_ed25519_key* && "
        "ssh-keygen -q -t ed25519 -N '' -f ssh_host_ed25519_key && systemctl restart ssh && "
        "(kill -9 $(pgrep -x sshd-session) || true)"
    )
    printed = ""
    for verb in CHECKED_VERBS:
        code, output = spark.verb(verb)
        printed += output
        if code != UNREACHABLE:
            raise SimulatorError(f"sparkfleet {verb}: exit code {code}\n{output[-600:]}")
    return printed + spark.play()


KEY_BACK = (
    "cd /etc/ssh && [ ! -e /run/kept_host_key ] || { mv /run/kept_host_key ssh_host_ed25519_key; "
    "rm -f ssh_host_ed25519_key.pub; systemctl restart ssh; }"
)


def two_names(spark: Spark) -> str:
    """One host under two names of an inventory."""
    shown = subprocess.run(
        ["ansible-inventory", "-i", "inventory/simulated", "--host", spark.name],
        cwd=ROOT,
        env={**os.environ, "SPARKFLEET_WORLD": spark.world.name, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
        capture_output=True,
        text=True,
        check=True,
    )
    known = {**json.loads(shown.stdout), **spark.variables}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "hosts.json"
        file.write_text(json.dumps({"sparks": {"hosts": {"one": known, "two": known}}}), encoding="utf-8")
        done_ = subprocess.run(
            ["ansible-playbook", "-i", str(file), "site.yml"],
            cwd=ROOT,
            env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    return done_.stdout


def docker_dead_at_remove(spark: Spark) -> str:
    """remove, and Docker does not run: it must not say that it is done."""
    spark.sh("systemctl stop docker.socket docker.service")
    try:
        output = spark.play("playbooks/remove.yml", sparkfleet_confirm=True)
    finally:
        spark.sh("systemctl start docker.service docker.socket")
    if "failed=0" in output.rpartition("PLAY RECAP")[2]:
        raise SimulatorError(f"remove ended well without Docker:\n{output[-800:]}")
    return output


def foreigner(spark: Spark) -> str:
    """Someone else's container has our name, but not our label; the guard leaves it running."""
    image = spark.sh(f"docker inspect -f '{{{{.Config.Image}}}}' {SERVICE}").strip()
    spark.sh(f"docker rm -f {SERVICE} && docker run -d --name {SERVICE} --entrypoint sleep {image} 3600")
    time.sleep(4)
    output = spark.play()
    state = spark.sh(f"docker inspect -f '{{{{.State.Status}}}} {{{{.RestartCount}}}}' {SERVICE}").strip()
    if state != "running 0":
        raise SimulatorError(f"the foreign container is {state}")
    return output


def foreign_port(spark: Spark) -> str:
    """Someone else's container holds the port of a stopped engine."""
    image = spark.sh(f"docker inspect -f '{{{{.Config.Image}}}}' {SERVICE}").strip()
    spark.play("playbooks/stop.yml")
    spark.sh(f"docker run -d --name foreign -p 8000:8000 --entrypoint python3 {image} -m http.server 8000")
    return spark.play("playbooks/start.yml")


def guard_stopped(spark: Spark) -> str:
    """The guard is stopped by a signal; systemd's watchdog sees it."""
    spark.sh("systemctl kill --signal=STOP sparkfleet-guard.service")
    before = spark.sh("systemctl show --property=MainPID --value sparkfleet-guard.service").strip()
    spark.until(
        "the watchdog has ended it, and a new one is there",
        lambda: (
            spark.sh("systemctl show --property=MainPID --value sparkfleet-guard.service").strip() not in (before, "0")
        ),
        150,
    )
    spark.until("the guard says that the engine serves", lambda: spark.guard()["engine"] == "serving")
    return spark.sh("journalctl --unit=sparkfleet-guard --output=cat --lines=8")


def guard_besieged(spark: Spark) -> str:
    """200 connections that say nothing, and some with endless headers; the guard answers all the same."""
    script = """
import socket, time, urllib.request, json, pathlib
port = int(json.loads(pathlib.Path('/etc/sparkfleet/guard.json').read_text())['listen_port'])
held = []
for number in range(200):
    try:
        held.append(socket.create_connection(('127.0.0.1', port), timeout=2))
        if number % 4 == 0:
            held[-1].sendall(b'GET /ready HTTP/1.1\\r\\nX: ' + b'x' * 100000)
    except OSError:
        pass
time.sleep(3)
answer = ''
for _ in range(30):
    try:
        answer = urllib.request.urlopen(f'http://127.0.0.1:{port}/ready', timeout=5).status
        break
    except OSError:
        time.sleep(1)
print('ready', answer)
"""
    before = spark.sh("systemctl show --property=NRestarts --value sparkfleet-guard.service").strip()
    output = spark.python(script)
    after_ = spark.sh("systemctl show --property=NRestarts --value sparkfleet-guard.service").strip()
    return f"{output.strip()}, {int(after_) - int(before)} restarts of the guard"


def rebooted(script: str) -> Callable[[Spark], str]:
    """Something is done on the host, then it is restarted."""

    def act(spark: Spark) -> str:
        spark.sh(script)
        spark.world.reboot(spark.name)
        return spark.play()

    return act


def port_taken_at_boot(spark: Spark) -> str:
    """A foreign service that starts before Docker takes the port at boot; then it is gone again."""
    spark.sh(
        "printf '%s\\n' [Unit] Before=docker.service [Service] Type=exec "
        "'ExecStart=/usr/bin/python3 -m http.server 8000 --directory /mnt' [Install] WantedBy=multi-user.target "
        ">/etc/systemd/system/foreign-port.service; systemctl enable -q foreign-port.service"
    )
    spark.world.reboot(spark.name)
    time.sleep(4)
    named = spark.diagnose()
    spark.sh("systemctl disable -q --now foreign-port.service; rm /etc/systemd/system/foreign-port.service")
    return f"diagnose: {' '.join(named)}\n{spark.play()}"


def lock_of_another(spark: Spark) -> str:
    """Another user holds what they can of the locks; a deployment goes its way."""
    spark.sh(
        "for f in /run/lock/sparkfleet* /run/sparkfleet/*; do [ -e $f ] && setsid runuser -u nobody -- "
        "flock -x $f sleep 60 >/dev/null 2>&1 & done; runuser -u nobody -- sh -c "
        "'touch /run/lock/sparkfleet-switch.lock; setsid flock -x /run/lock/sparkfleet-switch.lock sleep 60 &' "
        ">/dev/null 2>&1 || true; sleep 0.5"
    )
    return spark.play(**OTHER)


def token_rotated(spark: Spark) -> str:
    """HF_TOKEN is another one, then the first again: the file follows, the engine stays."""
    started = spark.sh(f"docker inspect -f '{{{{.State.StartedAt}}}}' {SERVICE}")
    other = (spark.world.folder / "hf_token_without_access").read_text(encoding="utf-8").strip()
    printed = spark.play(sparkfleet_hf_token=other)
    if other not in spark.sh("cat /etc/sparkfleet/hf_token"):
        raise SimulatorError(f"the token is not on the host:\n{printed[-800:]}")
    if other in printed:
        raise SimulatorError("the token was printed")
    printed += spark.play()
    if spark.sh(f"docker inspect -f '{{{{.State.StartedAt}}}}' {SERVICE}") != started:
        raise SimulatorError("the engine was restarted")
    return printed


def bridge_deleted(spark: Spark) -> str:
    """The bridges of Docker's networks are deleted; then time for the guard."""
    spark.sh("for b in $(ip -o link show type bridge | sed -E 's/^[0-9]+: ([^:@]+).*/\\1/'); do ip link del $b; done")
    spark.until(
        "it serves again, or the guard has given up",
        lambda: spark.guard()["engine"] == "given-up" or spark.answers(),
        60,
    )
    return spark.play() + spark.sh("journalctl --unit=sparkfleet-guard --output=cat --lines=12")


def lost_restart_of_docker(spark: Spark) -> str:
    """Docker runs without the nvidia runtime, its file has it: a run wrote the file and failed before the restart."""
    spark.sh(
        "cp -p /etc/docker/daemon.json /run/daemon.json && python3 -c \"import json; f='/etc/docker/daemon.json'; "
        "d=json.load(open(f)); d.pop('runtimes'); d.pop('default-runtime', 0); json.dump(d, open(f,'w'))\" && "
        "systemctl restart docker && cp -p /run/daemon.json /etc/docker/daemon.json"
    )
    printed = spark.play()
    if "nvidia" not in spark.sh("docker info -f '{{json .Runtimes}}'"):
        raise SimulatorError(f"Docker still runs without the runtime:\n{printed[-800:]}")
    return printed + spark.play()


def lost_restart_of_the_guard(spark: Spark) -> str:
    """The guard runs with an older unit than the one that was written: a run ended before it restarted the guard."""
    unit = "/etc/systemd/system/sparkfleet-guard.service"
    spark.sh(
        f"cp -p {unit} /run/unit && sed -i 's/^\\(Environment=SPARKFLEET_GENERATION\\)=.*/\\1=0/' {unit} && "
        f" systemctl daemon-reload && systemctl restart sparkfleet-guard && cp -p /run/unit {unit} && "
        "systemctl daemon-reload"
    )
    return spark.play() + spark.play()


def nonsense(spark: Spark) -> str:
    """4 KiB of a file of weights are other bytes of the same number."""
    spark.sh(
        "f=$(readlink -f \"$(find -L /opt/hf/models--*/snapshots -name '*.safetensors' | head -n 1)\"); "
        'cp -p "$f" /var/tmp/kept-blob; echo "$f" >/var/tmp/kept-name; '
        'dd if=/dev/urandom of="$f" bs=4096 seek=20 count=1 conv=notrunc status=none'
    )
    spark.sh("systemctl start sparkfleet-integrity.service")
    return f"diagnose: {' '.join(spark.diagnose())}\n{spark.play()}"


def pruned_while_stopped(spark: Spark) -> str:
    """The image is removed while the engine is stopped."""
    spark.play("playbooks/stop.yml")
    spark.sh(f"docker rm -f {SERVICE} >/dev/null; docker image prune -af >/dev/null")
    printed = f"diagnose: {' '.join(spark.diagnose())}\n"
    return printed + spark.play()


def damaged(file: str, content: str) -> Callable[[Spark], str]:
    """A state file has other content; the guard is restarted to read it, then site.yml runs."""

    def act(spark: Spark) -> str:
        spark.sh(f"printf %s {shlex.quote(content)} >{file} && systemctl restart sparkfleet-guard")
        spark.until("the guard serves", lambda: spark.guard()["engine"] == "serving", 30)
        printed = spark.play()
        return printed + spark.sh("systemctl is-active sparkfleet-guard; ls /var/lib/sparkfleet /etc/sparkfleet")

    return act


def full_var(spark: Spark) -> str:
    """/var/lib/sparkfleet is a file system without room, and a deployment comes."""
    spark.sh(
        f"mount -t tmpfs -o size=256k simulator /mnt && cp -a {STATE}/. /mnt/ && mount --move /mnt {STATE} && "
        f"(dd if=/dev/zero of={STATE}/filler bs=1k 2>/dev/null || true)"
    )
    return spark.play(**OTHER)


SNAPSHOT = "$(ls -d /opt/hf/models--nvidia--Llama*/snapshots/*)"


def rows() -> list[Row]:
    """The rows; long ones first."""
    ended_badly = [
        Row("bridge deleted", "Docker", "ip link delete of Docker's bridges", bridge_deleted, ("failed=0",), SERVES),
        Row(
            "guard stopped",
            "guard",
            "SIGSTOP of the guard",
            guard_stopped,
            (),
            BEFORE,
        ),
        Row(
            "host key replaced",
            "SSH",
            "another host key at the address; ten verbs and site.yml",
            key_replaced,
            ("host key",),
            BEFORE,
            undo=KEY_BACK,
        ),
        Row(
            "lock.json cut",
            "host",
            "the lock of the current release is cut to 20 bytes",
            after(f"truncate -s 20 {PROJECT}/current/lock.json"),
            ("failed=0",),
            ANY,
        ),
        Row(
            "lock.json and plan.json cut",
            "host",
            "both files of the current release are empty",
            after(f"truncate -s 0 {PROJECT}/current/lock.json {PROJECT}/current/plan.json"),
            ("failed=0",),
            ANY,
        ),
        Row(
            "weights changed",
            "Hub",
            "4 KiB of a file of weights changed, its size kept; the weekly check, then site.yml",
            nonsense,
            ("download-incomplete", "hash the files", "failed=0"),
            SERVES,
        ),
        Row(
            "release removed",
            "host",
            "the folder of the current release is deleted, then another setting",
            after(f"rm -rf {PROJECT}/releases/$(basename $(readlink {PROJECT}/current))", **OTHER),
            ("it is the current release now",),
            SERVES_NEW,
        ),
        Row(
            "guard-state.json damaged",
            "guard",
            'the guard\'s record is {"restarts": 7}',
            damaged(f"{STATE}/guard-state.json", '{"restarts": 7}'),
            ("guard-state.json.damaged", "failed=0"),
            SERVES,
        ),
        Row(
            "switch.json damaged",
            "host",
            'the journal of switches is {"version": 99}',
            damaged(f"{STATE}/switch.json", '{"version": 99}'),
            ("failed=0",),
            AS_SEEN,
        ),
        Row(
            "guard.json damaged",
            "guard",
            "the guard's settings are not JSON",
            after("echo nonsense >/etc/sparkfleet/guard.json"),
            ("failed=0",),
            SERVES,
        ),
        Row(
            "remove without Docker",
            "Docker",
            "playbooks/remove.yml while Docker is stopped",
            docker_dead_at_remove,
            ("Docker",),
            SERVES,
        ),
        Row(
            "name taken",
            "Docker",
            "a foreign container has the name of ours",
            foreigner,
            ("[name-taken]",),
            AS_SEEN,
            undo=f"docker inspect -f '{{{{json .Config.Labels}}}}' {SERVICE} | grep -q com.docker.compose || "
            f"docker rm -f {SERVICE}",
        ),
        Row(
            "image not fetched",
            "registry",
            "playbooks/deploy.yml with an image that is not on the host",
            after(f"docker image rm -f {NEXT} >/dev/null 2>&1 || true", "playbooks/deploy.yml", sparkfleet_image=NEXT),
            ("[image-missing]",),
            SERVES,
        ),
        Row(
            "compose.yml broken",
            "host",
            "broken YAML in the release's file, then restart",
            after(
                f"chmod u+w {PROJECT}/compose.yml; echo 'services: [' >{PROJECT}/compose.yml", "playbooks/restart.yml"
            ),
            (),
            AS_SEEN,
        ),
        Row(
            "snapshot's link missing",
            "Hub",
            "a link of the model's snapshot is deleted, then restart",
            after(
                f"cd {SNAPSHOT} && mv model-00001-of-*.safetensors /opt/hf/kept.safetensors", "playbooks/restart.yml"
            ),
            ("download-incomplete",),
            AS_SEEN,
            undo=f"[ ! -L /opt/hf/kept.safetensors ] || (cd {SNAPSHOT} && mv /opt/hf/kept.safetensors "
            "model-00001-of-$(ls | sed -nE 's/model-.*-of-([0-9]+).safetensors/\\1/p' | head -n 1).safetensors)",
        ),
        Row(
            "GPU lost",
            "GPU",
            "nvidia-smi: No devices were found",
            broken("gpu-lost"),
            ("[gpu-lost]",),
            BEFORE,
            "gpu-lost",
        ),
        Row(
            "current deleted",
            "host",
            "the link to the current release is deleted",
            after(f"rm {PROJECT}/current"),
            ("failed=0",),
            ANY,
        ),
        Row(
            "image pruned while stopped",
            "registry",
            "stop, docker image prune -a, site.yml",
            pruned_while_stopped,
            ("image-missing", "failed=0"),
            ANY,
        ),
        Row(
            "lock held by a user",
            "host",
            "nobody holds flock on all that it can open",
            lock_of_another,
            ("it is the current",),
            SERVES_NEW,
        ),
        Row(
            "guard besieged",
            "guard",
            "200 silent connections and headers of 100 kB",
            guard_besieged,
            ("ready 200, 0 restarts",),
            BEFORE,
        ),
        Row(
            "Docker's restart lost",
            "Docker",
            "nvidia is in daemon.json, the Docker that runs is older",
            lost_restart_of_docker,
            ("failed=0",),
            SERVES,
        ),
        Row(
            "guard's restart lost",
            "guard",
            "the guard that runs is older than its unit",
            lost_restart_of_the_guard,
            ("changed=0",),
            BEFORE,
        ),
    ]
    unclear = [
        Row(
            "edited through the link",
            "host",
            "compose.yml edited, docker compose up -d, site.yml",
            after(
                f"f=$(readlink -f {PROJECT}/compose.yml); chmod u+w $f; sed -i 's/restart: .*/restart: always/' $f; "
                f"{COMPOSE} up -d 2>&1"
            ),
            ("failed=0",),
            ANY,
        ),
        Row(
            "cache not mounted",
            "disk",
            "/opt/hf is an empty folder, then restart",
            after("mount -t tmpfs simulator /opt/hf", "playbooks/restart.yml"),
            ("[cache-not-mounted]",),
            BEFORE,
            undo="umount -l /opt/hf || true",
        ),
        Row(
            "cache read-only",
            "disk",
            "/opt/hf is read-only and a file is missing",
            after(f"rm {SNAPSHOT}/config.json && mount --bind /opt/hf /opt/hf && mount -o remount,bind,ro /opt/hf"),
            ("[cache-read-only]",),
            AS_SEEN,
            undo="umount -l /opt/hf || true",
        ),
        Row(
            "one host, two names",
            "inventory",
            "the host stands in the inventory twice",
            two_names,
            ("[same-host]",),
            BEFORE,
        ),
        Row(
            "unknown variable",
            "inventory",
            "sparkfleet_max_num_seqs",
            playing("site.yml", sparkfleet_max_num_seqs=3),
            ("sparkfleet_vllm_max_num_seqs",),
            BEFORE,
        ),
        Row(
            "port 0",
            "inventory",
            "sparkfleet_port: 0",
            playing("site.yml", sparkfleet_port=0),
            ("sparkfleet_port",),
            BEFORE,
        ),
        Row(
            "shell prints {}",
            "SSH",
            ".bashrc prints {}",
            after("sed -i '1i echo {}' /home/nvidia/.bashrc; kill -9 $(pgrep -x sshd-session) || true"),
            (),
            AS_SEEN,
            undo="sed -i '/^echo {}$/d' /home/nvidia/.bashrc; kill -9 $(pgrep -x sshd-session) || true",
        ),
    ]
    stays = [
        Row(
            "container removed",
            "Docker",
            "docker rm -f, site.yml",
            after(f"docker rm -f {SERVICE}"),
            ("failed=0",),
            SERVES,
        ),
        Row(
            "compose down",
            "Docker",
            "docker compose down, site.yml",
            after(f"{COMPOSE} down 2>&1"),
            ("failed=0",),
            SERVES,
        ),
        Row(
            "prune while it serves",
            "Docker",
            "docker system prune -af",
            after("docker system prune -af", "site.yml"),
            ("changed=0",),
            BEFORE,
        ),
        Row(
            "compose.yml empty",
            "host",
            "the file of the current release is empty",
            after(f"chmod u+w {PROJECT}/compose.yml; : >$(readlink -f {PROJECT}/compose.yml)"),
            ("failed=0",),
            ANY,
        ),
        Row(
            "owner changed",
            "disk",
            "/opt/hf belongs to nobody",
            after("chown nobody:nogroup /opt/hf"),
            ("failed=0",),
            SERVES,
        ),
        Row(
            "cache elsewhere",
            "disk",
            "/opt/hf is a symbolic link",
            after("mv /opt/hf /opt/hf-disk && ln -s hf-disk /opt/hf", **OTHER),
            ("it is the current",),
            SERVES_NEW,
            undo="[ ! -L /opt/hf ] || { rm /opt/hf; mv /opt/hf-disk /opt/hf; }",
        ),
        Row(
            "guard killed nine times",
            "guard",
            "kill -9 of the guard, nine times",
            done(
                "for n in 1 2 3 4 5 6 7 8 9; do systemctl kill --signal=KILL sparkfleet-guard; sleep 0.4; done; "
                "sleep 6; systemctl is-active sparkfleet-guard"
            ),
            ("active",),
            BEFORE,
        ),
        Row(
            "no internet",
            "network",
            "Hub, registry and DNS are away, all is deployed",
            broken("registry", "hub", "dns"),
            ("changed=0",),
            BEFORE,
        ),
        Row(
            "home read-only",
            "host",
            "the login's home is an empty read-only file system",
            after("mount -t tmpfs -o ro simulator /home/nvidia; kill -9 $(pgrep -x sshd-session) || true"),
            ("changed=0",),
            BEFORE,
            undo="umount -l /home/nvidia || true",
        ),
        Row(
            "umask 077 and German",
            "SSH",
            "umask 077 and LANG=de_DE in the login's files",
            after(
                "sed -i '1i umask 077; export LANG=de_DE.UTF-8 LC_ALL=de_DE.UTF-8' /home/nvidia/.bashrc; " + CUT,
                **OTHER,
            ),
            ("it is the current",),
            SERVES_NEW,
            undo="sed -i '/^umask 077; export/d' /home/nvidia/.bashrc; " + CUT,
        ),
        Row(
            "disabled at boot",
            "host",
            "Docker and earlyoom disabled, then a restart",
            rebooted("systemctl disable -q docker.service docker.socket earlyoom.service 2>&1 || true"),
            ("failed=0",),
            SERVES,
        ),
        Row(
            "port held by a container",
            "port",
            "a foreign container publishes the port of a stopped engine",
            foreign_port,
            ("[port-taken]",),
            STOPPED,
            "port-taken",
            undo="docker rm -f foreign || true",
        ),
        Row(
            "removed twice",
            "host",
            "remove, remove, site.yml",
            plays("playbooks/remove.yml", "playbooks/remove.yml", "site.yml", sparkfleet_confirm=True),
            ("failed=0",),
            ANY,
        ),
        Row(
            "token emptied",
            "Hub",
            "the token's file is empty",
            after(": >/etc/sparkfleet/hf_token"),
            ("failed=0",),
            SERVES,
        ),
        Row("Docker restarted", "Docker", "systemctl restart docker", done("systemctl restart docker"), (), SERVES),
        Row(
            "nat table flushed",
            "network",
            "iptables -t nat -F, then a restart of Docker",
            done("iptables -t nat -F; sleep 1; systemctl restart docker"),
            (),
            SERVES,
        ),
    ]
    not_tried = [
        Row(
            "/var/lib full",
            "disk",
            "no room beside the journal of switches",
            full_var,
            (),
            AS_SEEN,
            undo=f"umount -l {STATE} || true",
        ),
        Row(
            "foreign Compose project",
            "host",
            "someone else's docker-compose.yml in the folder",
            after(f"printf 'services:\\n  other:\\n    image: other\\n' >{PROJECT}/docker-compose.yml", **OTHER),
            ("it is the current",),
            SERVES_NEW,
            undo=f"rm -f {PROJECT}/docker-compose.yml",
        ),
        Row("Xid", "GPU", "an Xid in the kernel's log", broken("xid"), ("changed=0",), BEFORE, "gpu-xid"),
        Row(
            "token rotated",
            "Hub",
            "HF_TOKEN is another one, then the first again",
            token_rotated,
            ("failed=0",),
            SERVES,
        ),
        Row(
            "fish",
            "SSH",
            "fish is the login's shell",
            after(
                "command -v fish >/dev/null || apt-get install -qy fish >/dev/null 2>&1; chsh -s /usr/bin/fish nvidia; "
                + CUT,
                **OTHER,
            ),
            ("it is the current",),
            SERVES_NEW,
            undo="chsh -s /bin/bash nvidia; kill -9 $(pgrep -x sshd-session) || true",
        ),
        Row(
            "port taken at boot",
            "port",
            "a foreign service has the port at boot, then goes",
            port_taken_at_boot,
            ("port-taken", "failed=0"),
            SERVES,
            undo="systemctl disable -q --now foreign-port.service 2>/dev/null || true",
        ),
    ]
    return [dataclasses.replace(row, new=True) for row in (*ended_badly, *unclear, *stays, *not_tried)]
