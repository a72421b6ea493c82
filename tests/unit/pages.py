"""The pages of the repository, and what is wrong with their links and commands.

Links are those of Markdown and of HTML in it; anchors are named as GitHub names them. A command is a line of a block
of shell, or what stands `like this` in the text. It is parsed by the program's own parser, and never run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import itertools
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from unittest import mock
from urllib.parse import unquote, urlsplit

import yaml
from ansible.cli.playbook import PlaybookCLI
from markdown_it import MarkdownIt
from markdown_it.token import Token

from sparkfleet.cli import main
from sparkfleet.planning import catalog, variables
from tests.unit import ROOT

T = TypeVar("T")
#: This repository as others write of it.
OURS = re.compile(r"https://github\.com/sparkfleet/sparkfleet/(?:blob|tree)/main/([^#]*)(?:#(.*))?")
#: Programs of others: that they are there, and how they are called, is not checked.
FOREIGN = frozenset(
    [
        ".",
        "ansible-builder",
        "ansible-navigator",
        "antsibull-changelog",
        "cd",
        "docker",
        "export",
        "git",
        "jq",
        "journalctl",
        "mkdocs",
        "pip",
        "pre-commit",
        "source",
        "ss",
        "systemctl",
    ]
)
_PATH = re.compile(
    r"(?:\.github|changelogs|docs|inventory/(?:example|local|simulated)|models|molecule|playbooks|plugins|roles|scripts"
    r"|simulator|src|tests)/[\w./*{},-]*"
)


def pages() -> list[Path]:
    """Every page of Markdown in the repository."""
    found = []
    for folder, below, names in os.walk(ROOT):
        here = Path(folder)
        below[:] = [
            name
            for name in below
            if (not name.startswith(".") or name == ".github")
            and name != "node_modules"
            and not (here == ROOT and name in ("collections", "dist"))
        ]
        found += [here / name for name in names if name.endswith(".md")]
    return sorted(found)


@dataclass
class Page:
    """What a page has in it."""

    links: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    blocks: list[tuple[str, str]] = field(default_factory=list)  # the language ("" where it is indented), the text
    code: list[str] = field(default_factory=list)  # in the text


def read(text: str) -> Page:
    """What is in a page of Markdown."""
    page = Page()
    slugs: Counter[str] = Counter()
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for token, after in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "heading_open" and after is not None:
            slug = _slug(after)
            page.anchors.add(f"{slug}-{slugs[slug]}" if slugs[slug] else slug)
            slugs[slug] += 1
        elif token.type in ("fence", "code_block"):
            page.blocks.append((token.info.strip(), token.content))
        for item in (token, *(token.children or ())):
            if item.type == "code_inline":
                page.code.append(item.content)
            elif item.type in ("html_block", "html_inline"):
                page.links += re.findall(r'\b(?:href|src)="([^"]*)"', item.content)
                page.anchors.update(re.findall(r'\b(?:id|name)="([^"]*)"', item.content))
            elif item.type in ("link_open", "image"):
                page.links.append(str(item.attrs.get("href") or item.attrs.get("src")))
    return page


def _slug(heading: Token) -> str:
    words = "".join(item.content for item in heading.children or () if item.type in ("text", "code_inline"))
    return re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")


def wrong_links(at: Path, page: Page) -> Iterator[str]:
    """What is wrong with the links of a page that is, or would be, the file `at`."""
    for link in page.links:
        ours = OURS.fullmatch(link)
        if ours:
            target, anchor = ROOT / unquote(ours[1]), ours[2] or ""
        elif urlsplit(link).scheme in ("http", "https", "mailto"):
            continue
        else:
            path, _, anchor = link.partition("#")
            if path.startswith("/"):
                yield f"{link}: it is absolute"
                continue
            target = at.parent / unquote(path) if path else at
        target = Path(os.path.normpath(target))
        if not target.is_relative_to(ROOT):
            yield f"{link}: it leaves the repository"
        elif target != at and not target.exists():
            yield f"{link}: there is no {target.relative_to(ROOT)}"
        elif anchor and anchor not in (page if target == at else read(target.read_text(encoding="utf-8"))).anchors:
            yield f"{link}: no such anchor"


def wrong_commands(page: Page) -> Iterator[str]:
    """What is wrong with the commands of a page, and with the files of this repository that its text names."""
    for language, text in page.blocks:
        for line in lines(language, text):
            for words in commands(line):
                problem = wrong(words)
                if problem:
                    yield f"{line}: {problem}"
    for text in page.code:
        problem = wrong_words(text)
        if problem:
            yield f"{text}: {problem}"


def lines(language: str, text: str) -> list[str]:
    """The commands of a block of code: after `$` in `console`, every line in `bash`, and of one that is only indented
    those lines that begin as commands of ours do. A line that ends in a backslash goes on."""
    text = text.replace("\\\n", " ")
    if language == "console":
        return [line[2:] for line in text.splitlines() if line.startswith("$ ")]
    if language in ("bash", "sh", "shell"):
        return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if language == "":
        ours = r"(\.venv/bin/)?(sparkfleet|ansible-playbook|python -m|scripts/\w+|molecule) .*"
        return [line for line in text.splitlines() if re.fullmatch(ours, line)]
    return []


def commands(line: str) -> list[list[str]]:
    """The words of each command of a line: parts of `a && b | c`, without comments and what is set before a command."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("&|;"):
            found.append([])
        elif found[-1] or not re.match(r"[A-Z_]+=", word):
            found[-1].append(word)
    return [words for words in found if words]


def wrong(words: Sequence[str]) -> str:
    """What is wrong with a command, in words; empty if nothing is."""
    program, rest = words[0].removeprefix(".venv/bin/"), list(words[1:])
    if program in FOREIGN:
        return ""
    if program.startswith("scripts/"):
        return _script(program, rest)
    checks: dict[str, Callable[[list[str]], str]] = {
        "sparkfleet": _sparkfleet,
        "ansible-playbook": _playbook,
        "ansible-galaxy": lambda rest: "" if rest[:1] == ["collection"] else "only `collection` is used here",
        "molecule": _molecule,
        "python": _module,
        "pytest": _pytest,
    }
    return checks[program](rest) if program in checks else f"{program} is no program that is known here"


def _sparkfleet(rest: list[str]) -> str:
    parser = main._parser()
    options, problem = _parsed(lambda: parser.parse_known_args(rest))
    if options is None:
        return problem
    known, more = options
    if more and (not hasattr(known, "words") or any(word.startswith("-") for word in more)):
        return f"unrecognized arguments: {' '.join(more)}"
    model = getattr(known, "model", None)
    if model and not (model.endswith((".yml", ".yaml")) or catalog.hub_name(model) or model in catalog.names()):
        return f"no model {model} in the catalogue"
    return _extra(getattr(known, "extra_vars", []))


def _playbook(rest: list[str]) -> str:
    cli = PlaybookCLI(["ansible-playbook", *rest])
    cli.init_parser()
    options, problem = _parsed(lambda: cli.parser.parse_args(rest))
    if options is None:
        return problem
    for name in options.args:
        file = f"playbooks/{name.rpartition('.')[2]}.yml" if name.startswith("sparkfleet.dgx.") else name
        if not (ROOT / file).is_file():
            return f"there is no {file}"
    tags = {tag for play in yaml.safe_load((ROOT / "playbooks/site.yml").read_text()) for tag in play.get("tags", ())}
    for tag in (tag for text in options.tags or () for tag in text.split(",")):
        if tag not in tags | {"all"}:
            return f"site.yml has no tag {tag}"
    return _extra(options.extra_vars or [])


def _extra(pairs: Sequence[str]) -> str:
    """Of variables of ours each must be one."""
    unknown = variables.unknown([pair.partition("=")[0] for pair in pairs])
    return unknown[0] if unknown else ""


def _script(program: str, rest: list[str]) -> str:
    file = ROOT / program
    if not file.is_file():
        return f"there is no {program}"
    if not os.access(file, os.X_OK):
        return f"{program} is not executable"
    if program == "scripts/test" and not accepted_by_test(rest):
        return f"scripts/test does not take {' '.join(rest)}"
    return ""


def scenarios() -> list[str]:
    """The scenarios in the order in which scripts/test runs them."""
    (found,) = re.findall(
        r"^scenarios=\(([a-z ]+)\)$", (ROOT / "scripts/test").read_text(encoding="utf-8"), re.MULTILINE
    )
    return str(found).split()


def accepted_by_test(rest: Sequence[str]) -> bool:
    """Whether scripts/test takes these words."""
    text = (ROOT / "scripts/test").read_text(encoding="utf-8")
    (parts,) = re.findall(r"usage: scripts/test \[([a-z |]+) \| molecule \[", text)
    if rest[:1] == ["molecule"]:
        return len(rest) == 1 or (len(rest) == 2 and rest[1] in scenarios())
    return not rest or (len(rest) == 1 and rest[0] in str(parts).split(" | "))


def _molecule(rest: list[str]) -> str:
    for option, name in itertools.pairwise(rest):
        if option in ("-s", "--scenario-name") and name not in scenarios():
            return f"no scenario {name}"
    return ""


def _pytest(rest: list[str]) -> str:
    missing = [word for word in rest if word.startswith("tests/") and not (ROOT / word).exists()]
    return f"there is no {missing[0]}" if missing else ""


class _EnoughError(Exception):
    """What is thrown once arguments are parsed, before anything runs."""


def _module(rest: list[str]) -> str:
    if rest[:1] != ["-m"] or len(rest) < 2:
        return "only python -m MODULE is used here"
    name, arguments = rest[1], rest[2:]
    if importlib.util.find_spec(name) is None:
        return f"no module {name}"
    if not name.startswith("simulator"):
        return ""
    module = importlib.import_module(f"{name}.__main__" if name == "simulator" else name)
    original = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, args: Sequence[str] | None = None) -> None:
        original(self, args)
        raise _EnoughError

    def run() -> bool:
        with contextlib.suppress(_EnoughError), mock.patch.object(argparse.ArgumentParser, "parse_args", parse):
            module.main(arguments)
            raise AssertionError(f"{name} parses nothing")
        return True

    return _parsed(run)[1]


def _parsed(parse: Callable[[], T]) -> tuple[T | None, str]:
    """What a parser makes of a command, or what it says is wrong."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
            return parse(), ""
    except SystemExit:
        return None, (printed.getvalue().strip().splitlines() or ["it ends at once"])[-1]


def wrong_words(text: str) -> str:
    """What is wrong with code within a text: a verb of ours, its options, a file of the repository."""
    words = text.split()
    if words[:1] == ["sparkfleet"] and len(words) > 1 and re.fullmatch(r"[a-z]+", words[1]):
        return _verb(words[1], re.findall(r"(?<![\w-])--?[a-z][a-z-]*", " ".join(words[2:])))
    if words[:1] == ["scripts/test"]:
        return _script(words[0], words[1:])
    if len(words) > 2 and words[:2] == ["python", "-m"]:
        return "" if importlib.util.find_spec(words[2]) else f"no module {words[2]}"
    for word in words:
        for name in _braces(word) if _PATH.fullmatch(word) else ():
            if not any(ROOT.glob(name.rstrip("/"))):
                return f"there is no {name}"
    return ""


def _verb(verb: str, options: Sequence[str]) -> str:
    (verbs,) = (action for action in main._parser()._actions if isinstance(action, argparse._SubParsersAction))
    if verb not in verbs.choices:
        return f"no verb {verb}"
    unknown = [option for option in options if option not in verbs.choices[verb]._option_string_actions]
    return f"{verb} has no {unknown[0]}" if unknown else ""


def _braces(text: str) -> list[str]:
    """`a/{b,c}` as `a/b` and `a/c`."""
    found = re.search(r"\{([^{}]*)\}", text)
    if not found:
        return [text]
    return [one for word in found[1].split(",") for one in _braces(text[: found.start()] + word + text[found.end() :])]
