"""Failures that Ansible words for itself, with what to do about them."""

from __future__ import annotations

import re

#: Of Ansible, and of a local sudo, which Ansible quotes after words of its own.
_PASSWORD = re.compile(r"\b(?:Missing|Incorrect) \w{1,20} password$|\bsudo: a password is required$")
#: Text before or after the result; with no result at all the module did not run.
_NOISE = re.compile(r"Module result deserialization failed: (?!No start of json)")
#: Of apt: also where its preferences leave no version.
_NO_PACKAGE = re.compile(r"No package matching '\S{1,100}' is available|has no installation candidate")
_PREFIXES = ("Task failed: ", "Action failed: ")


def bare(message: str) -> str:
    """The message without Ansible's words before it."""
    for prefix in _PREFIXES:
        message = message.removeprefix(prefix)
    return message.strip()


def explained(message: str) -> str:
    """The bare message, with a remedy where there is one to add."""
    message = bare(message)
    if _PASSWORD.search(message):
        reason = message.splitlines()[-1]
        return f"{reason}: run again with -K (--ask-become-pass), and type the password of the user you log in as"
    if _NO_PACKAGE.search(message):
        return (
            f"{message.strip().rstrip('.')}. The host's package sources do not have it, or not in the version that "
            "the lock has (packages in .sparkfleet.lock.yml): `apt-cache policy NAME` there shows which versions they "
            "have, and `sparkfleet lock --packages HOSTS` renews those of the lock"
        )
    if _NOISE.search(message):
        return (
            f"{message.rstrip('.')}. The login shell of the user there prints something of its own, which mixes with "
            "what programs answer: `ssh HOST true` must print nothing. Look for echo, printf or a tool's hook in "
            "~/.bashrc (or ~/.profile, ~/.zshenv, /etc/profile.d) and keep it for interactive shells: "
            "`case $- in *i*) ;; *) return;; esac` as the first line of ~/.bashrc"
        )
    return message
