# SPDX-License-Identifier: Apache-2.0
"""Text without tokens, keys and passwords. Every step is linear in the text, whatever the text is.

Too much is removed rather than too little: what follows a name such as `password` goes, quoted or not, as a list too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

HIDDEN = "***"

#: Tokens that show by their beginning: Hugging Face, NVIDIA, OpenAI, GitHub, GitLab, Slack, JWT.
_TOKENS = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:hf|nvapi|sk|gh[oprsu]|github_pat|glpat|xox[a-z])[_-][A-Za-z0-9_-]{8,}"
    r"|eyJ[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*)*)"
)
_BEARER = re.compile(r"((?<![A-Za-z])bearer[ \t]+)[^\s'\",;)}\]]{4,}", re.IGNORECASE)
#: Base64 and no English word ("basic information").
_BASIC = re.compile(r"((?<![A-Za-z])basic[ \t]+)(?=[A-Za-z/+]*[0-9=])[A-Za-z0-9+/=]{8,}", re.IGNORECASE)
#: Names whose value is a secret. Those that are also words of other log lines need more than a blank before it: a
#: colon, an equals sign, or a dash before the name.
_NAMES = re.compile(
    r"(?P<dash>(?<![\w-])--?[\w-]{0,40}?)?"
    r"(?:(?P<plain>(?:api|engine|client)[_-]?keys?|passw(?:or)?ds?|passphrases?)|"
    r"(?P<word>token|(?:access|private|secret)[_-]?keys?|secrets?|credentials?|authorization))(?![A-Za-z0-9_-])",
    re.IGNORECASE,
)
_SEPARATOR = re.compile(r"(?P<close>\\*['\"])?\s*(?P<sign>=>|[:=]|,(?=\s*\\*['\"\[]))?(?P<gap>\s*)(?P<item>-\s+)?")
_OPEN = re.compile(r"[bBrRuUfF]{0,2}(\\*)(['\"])")
_BLOCK = re.compile(r"[|>][+-]?[ \t]*\n\s*")
_SCHEME = re.compile(r"(?:bearer|basic|token|digest)[ \t]+", re.IGNORECASE)
_ONE_WORD = ("token", "api", "engine", "client", "access", "private")  # values without blanks
_WORD = re.compile(r"\S+")
_LINE = re.compile(r"[^\n]*")
_BRACKET = re.compile(r"[\[\](){}'\"]")
_RUN = re.compile(r"[^\s\"<>`]+")
_USER = re.compile(r"[^/:@'?#]*")
_PEM, _PEM_END = re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY-----"), "-----END"
#: Of keys of an object: those whose value is a secret.
_KEY = re.compile(
    r"(?:.{0,100}[_.-])?(?:api_?key|engine_?key|client_?keys?|(?:access|private|secret)_?key|passw(?:or)?d|passphrase|"
    r"secret|token|authorization)",
    re.IGNORECASE,
)


def redact(text: str, *secrets: str) -> str:
    """A text without secrets; each of `secrets` with six characters or more is removed wherever it stands."""
    for secret in secrets:
        if len(secret) >= 6:
            text = text.replace(secret, HIDDEN)
    text = _urls(_keys(text))
    text = _assignments(text)
    text = _BEARER.sub(_kept, text)
    text = _BASIC.sub(_kept, text)
    return _TOKENS.sub(HIDDEN, text)


def redacted(data: Any, *secrets: str) -> Any:
    """The same data with every string redacted, and whole where its name in an object says that it is a secret."""
    if isinstance(data, str):
        return redact(data, *secrets)
    if isinstance(data, dict):
        return {
            redact(key, *secrets) if isinstance(key, str) else key: (
                _hidden(value) if isinstance(key, str) and _KEY.fullmatch(key) else redacted(value, *secrets)
            )
            for key, value in data.items()
        }
    if isinstance(data, list | tuple):
        return [redacted(value, *secrets) for value in data]
    return data


def passwords(*urls: str) -> set[str]:
    """The passwords in addresses (SCHEME://USER:PASSWORD@HOST), to be hidden from what a module reports."""
    found = (re.match(r"[a-z]+://[^/:@]*:(?P<password>[^/]+)@", url) for url in urls)
    return {match["password"] for match in found if match}


def _hidden(value: Any) -> Any:
    """Strings of a secret, however deep; that there is none stays visible."""
    if isinstance(value, str):
        return HIDDEN if value else value
    if isinstance(value, dict):
        return {key: _hidden(item) for key, item in value.items()}
    return [_hidden(item) for item in value] if isinstance(value, list | tuple) else value


def _kept(found: re.Match[str]) -> str:
    return f"{found[1]}{HIDDEN}"


def _cut(text: str, spans: Iterable[tuple[int, int]]) -> str:
    """The text with HIDDEN in place of the spans, which are in order and do not overlap."""
    parts, at = [], 0
    for begin, end in spans:
        parts += [text[at:begin], HIDDEN]
        at = end
    return "".join([*parts, text[at:]])


# -- name and value --------------------------------------------------------------------------------------------------


def _assignments(text: str) -> str:
    spans: list[tuple[int, int]] = []
    done = 0
    for found in _NAMES.finditer(text):
        if found.end() < done:
            continue
        span = _value(text, found)
        if span:
            spans.append(span)
            done = span[1]
    return _cut(text, spans)


def _value(text: str, name: re.Match[str]) -> tuple[int, int] | None:
    """Where the value of a name begins and ends; None for a name that has none."""
    between = _SEPARATOR.match(text, name.end())
    assert between is not None  # it matches the empty text
    at = between.end()
    if at >= len(text) or at == name.end():
        return None
    sign, close = between["sign"], between["close"]
    quoted = close and name.start() and text[name.start() - 1] in "'\""
    if not sign and (name["word"] or close) and not (name["dash"] or between["item"]):
        return None
    if sign == "," and not (name["dash"] or quoted):
        return None
    opened = _OPEN.match(text, at)
    if opened:
        return _quoted(text, opened)
    if text[at] in "[({":
        return at, _closed(text, at)
    block = _BLOCK.match(text, at)
    if block:
        return block.end(), _end(_LINE, text, block.end())
    # A plain scalar of YAML, and a header, go to the end of the line.
    if sign == ":" and between["gap"] and not (name["plain"] or name["word"]).lower().startswith(_ONE_WORD):
        return at, _end(_LINE, text, at)
    scheme = _SCHEME.match(text, at)
    at = scheme.end() if scheme else at
    return (at, _end(_WORD, text, at)) if at < len(text) else None


def _quoted(text: str, opened: re.Match[str]) -> tuple[int, int]:
    """A string in quotes, which stay; to the end of the text where they do not end."""
    begin = at = opened.end()
    mark = opened[1] + opened[2]
    while True:
        end = text.find(mark, at)
        if end < 0:
            return begin, len(text)
        slashes = end
        while slashes > begin and text[slashes - 1] == "\\":
            slashes -= 1
        if opened[1] or (end - slashes) % 2 == 0:
            return begin, end
        at = end + 1


def _closed(text: str, at: int) -> int:
    """Behind the bracket that closes the one at `at`; the end of the text where there is none."""
    depth, quote = 0, ""
    for found in _BRACKET.finditer(text, at):
        mark = found[0]
        if quote:
            if mark == quote and text[found.start() - 1] != "\\":
                quote = ""
        elif mark in "'\"":
            quote = mark
        else:
            depth += 1 if mark in "[({" else -1
            if depth == 0:
                return found.end()
    return len(text)


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    return found.end() if found else at


# -- other places ----------------------------------------------------------------------------------------------------


def _urls(text: str) -> str:
    """Passwords, and long names that are tokens, of SCHEME://USER:PASSWORD@HOST; the password may have an @."""
    if "://" not in text:
        return text
    spans: list[tuple[int, int]] = []
    for run in _RUN.finditer(text):
        word, shift = run[0], run.start()
        if "://" not in word or "@" not in word:
            continue
        last, at = word.rfind("@"), 0
        while (found := word.find("://", at)) >= 0 and found < last:
            begin = at = found + 3
            head = _USER.match(word, begin)
            assert head is not None
            after = word[head.end()] if head.end() < len(word) else ""
            if after == ":":
                spans.append((shift + head.end() + 1, shift + last))
                break
            if after == "@" and head.end() - begin >= 16:
                spans.append((shift + begin, shift + head.end()))
                at = head.end()
    return _cut(text, spans)


def _keys(text: str) -> str:
    """Private keys in PEM."""
    spans: list[tuple[int, int]] = []
    for found in _PEM.finditer(text):
        if spans and found.start() < spans[-1][1]:
            continue
        end = text.find(_PEM_END, found.end())
        spans.append((found.end(), len(text) if end < 0 else end))
    return _cut(text, spans)
