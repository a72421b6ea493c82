# Shared by the scripts; sourced, from the repository's root.
# shellcheck shell=bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH" ANSIBLE_CONFIG="$PWD/ansible.cfg"

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# during TEXT COMMAND...: run a command quietly, report progress every ten seconds, show its output if it fails.
during() {
    local text=$1 log start status=0 pid waited=0
    shift
    log=$(mktemp)
    start=$SECONDS
    say "$text ..."
    "$@" >"$log" 2>&1 &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.2
        waited=$((waited + 1))
        if ((waited % 50 == 0)); then say "  $((SECONDS - start)) s  $(tail -n 1 "$log" | cut -c1-100)"; fi
    done
    wait "$pid" || status=$?
    if ((status != 0)); then
        tail -n 40 "$log" >&2
        rm -f "$log"
        die "failed after $((SECONDS - start)) s: $text"
    fi
    rm -f "$log"
    say "  done in $((SECONDS - start)) s"
}

# setup [test]: make .venv, unless it already is what pyproject.toml and constraints.txt say. SPARKFLEET_ANSIBLE_CORE is
# another series of ansible-core than the pinned one (2.21), for tests.
setup() {
    local extras=${1:-} core=${SPARKFLEET_ANSIBLE_CORE:-} python wanted stamp=.venv/.sparkfleet-setup from=() pins
    [[ $core =~ ^([0-9]+\.[0-9]+)?$ ]] || die "SPARKFLEET_ANSIBLE_CORE is a series of ansible-core, such as 2.21"
    wanted=$(cat pyproject.toml constraints.txt - <<<"$core" | sha256sum | cut -c1-16)
    if [[ -x .venv/bin/sparkfleet ]] && grep -qx "$wanted $extras" "$stamp" 2>/dev/null; then return; fi
    for python in python3 python3.14 python3.13 python3.12 python3.11; do
        if command -v "$python" >/dev/null && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            break
        fi
        python=
    done
    [[ -n $python ]] || die "no Python 3.11 or newer: install one (Debian, Ubuntu: apt-get install python3 python3-venv)"
    if [[ -n ${bundle:-} ]]; then
        # Copies of what was hashed: who can write to the bundle cannot change what pip reads.
        wheels=$(mktemp -d)
        trap 'rm -rf "$wheels"' EXIT
        PYTHONPATH=src:plugins/module_utils "$python" -B -m sparkfleet.packaging.wheels "$bundle" "${bundle_digest:-}" "$wheels" ||
            exit
        from=(--no-index --find-links "$wheels")
    fi
    if [[ ! -x .venv/bin/python ]]; then
        "$python" -m venv .venv || die "cannot make .venv: apt-get install python3-venv"
    fi
    pins=constraints.txt
    if [[ -n $core ]]; then
        pins=.venv/.sparkfleet-constraints
        sed "s/^ansible-core==.*/ansible-core==$core.*/" constraints.txt >"$pins"
    fi
    during "Installing Ansible and what else Sparkfleet needs into .venv" \
        .venv/bin/pip install --disable-pip-version-check "${from[@]}" --constraint "$pins" \
        --editable ".${extras:+[$extras]}"
    if [[ -n ${bundle:-} ]]; then
        rm -rf "$wheels"
        trap - EXIT
    fi
    # A later setup without extras must not undo one with them.
    printf '%s \n%s %s\n' "$wanted" "$wanted" "$extras" >"$stamp"
}

# haproxy_ensure: the tests of the gateway run HAProxy itself; no service is started.
haproxy_ensure() {
    if PATH="$PATH:/usr/sbin" command -v haproxy >/dev/null; then return; fi
    [[ $(id -u) == 0 ]] || die "the tests run HAProxy: apt-get install --no-install-recommends haproxy"
    during "Installing HAProxy for the tests" env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
        sh -c 'apt-get update -qq && apt-get install -y --no-install-recommends haproxy'
}

# prometheus_ensure: the tests of monitoring run promtool, amtool and Prometheus itself; no service is started.
prometheus_ensure() {
    if command -v promtool >/dev/null && command -v amtool >/dev/null; then return; fi
    [[ $(id -u) == 0 ]] ||
        die "the tests run Prometheus: apt-get install --no-install-recommends prometheus prometheus-alertmanager"
    during "Installing Prometheus and Alertmanager for the tests" env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
        sh -c 'apt-get update -qq && apt-get install -y --no-install-recommends prometheus prometheus-alertmanager'
}
