#!/usr/bin/env python3
"""The Sparks of a simulated world as an inventory; SPARKFLEET_WORLD names the world (default: demo).

SPARKFLEET_GATEWAYS are Sparks that are gateways as well, separated by commas; several have a floating address.
SPARKFLEET_GROUP are Sparks that run one engine together, of the small model, over the world's network.
"""

import ipaddress
import json
import os
import subprocess
import sys
from pathlib import Path

#: vLLM takes several hosts without Ray on GPUs by itself; its CPU build has to be told.
RANKS = {
    "sparkfleet_nodes": "ranks",
    "sparkfleet_image": "nvcr.io/nvidia/vllm:26.10-py3",
    "sparkfleet_fabric_management": True,
    "sparkfleet_model": str(Path(__file__).resolve().parents[2] / "simulator" / "cards" / "smollm2-135m.yml"),
    "sparkfleet_vllm_distributed_executor_backend": "mp",
    "sparkfleet_environment": {"OMP_NUM_THREADS": "1"},
}


def inventory(world: str, home: Path) -> dict[str, object]:
    """Inventory of a world that is up; raises FileNotFoundError when it is not."""
    folder = home / "worlds" / world
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    ssh = folder / "ssh"
    hosts = {
        name: {
            "ansible_port": known["ssh"],
            "sparkfleet_address": f"sparkfleet-{world}-{name}",
            "sparkfleet_simulated_url": f"http://127.0.0.1:{known['http']}",
            **({} if known.get("trusting", True) else {"sparkfleet_ca_file": str(folder / "ca" / "ca.pem")}),
        }
        for name, known in state["sparks"].items()
    }
    shared = {
        "ansible_host": "127.0.0.1",
        "ansible_user": "nvidia",
        "ansible_python_interpreter": "/usr/bin/python3",
        "ansible_ssh_private_key_file": str(ssh / "id_ed25519"),
        "ansible_ssh_common_args": f"-o UserKnownHostsFile={ssh / 'known_hosts'} -o IdentitiesOnly=yes",
        "sparkfleet_controller_registries": {"nvcr.io": f"127.0.0.1:{state.get('registry_port', 9)}"},
        # The world's Hub is reached from the Sparks alone; the real one has another content.
        "sparkfleet_controller_hub": "http://127.0.0.1:9",
        "sparkfleet_simulated_token_file": str(folder / "hf_token"),
        # The simulated repository of NVIDIA is signed by a key of its own.
        "nvidia_container_toolkit_key_fingerprints": [state.get("key_fingerprint", "")],
    }
    groups = {"sparks": {"hosts": sorted(hosts), "vars": shared}}
    gateways = [name for name in os.environ.get("SPARKFLEET_GATEWAYS", "").split(",") if name in hosts]
    # Docker gives out addresses from the other end; the world's own are the last.
    floating = {"sparkfleet_gateway_address": str(ipaddress.IPv4Address(state.get("address", "127.0.0.3")) - 2)}
    group = {"hosts": gateways, **({"vars": floating} if len(gateways) > 1 else {})}
    together = [name for name in os.environ.get("SPARKFLEET_GROUP", "").split(",") if name in hosts]
    for name in together:
        hosts[name]["sparkfleet_fabric_address"] = address(f"sparkfleet-{world}-{name}")
    ranks = {"ranks": {"hosts": together, "vars": RANKS}} if together else {}
    return {**groups, **({"gateways": group} if gateways else {}), **ranks, "_meta": {"hostvars": hosts}}


def address(container: str) -> str:
    """The address of a Spark in its world."""
    form = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
    done = subprocess.run(["docker", "inspect", "-f", form, container], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def main() -> int:
    """Print the inventory; 1 and one line on standard error when there is none."""
    world = os.environ.get("SPARKFLEET_WORLD") or "demo"
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = Path(os.environ.get("SPARKFLEET_SIM_HOME") or f"{cache}/sparkfleet").expanduser()
    try:
        print(json.dumps(inventory(world, home)))
    except FileNotFoundError:
        if os.environ.get("SPARKFLEET_WORLD_MAY_BE_DOWN"):
            print(json.dumps({"sparks": {"hosts": []}, "_meta": {"hostvars": {}}}))
            return 0
        print(f"the simulated world '{world}' is not up: python -m simulator up --world {world}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
