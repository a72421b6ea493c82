"""No secret survives, whatever is around it, and no text takes long."""

from __future__ import annotations

import json
import string
import time
from collections.abc import Callable

import pytest
import yaml
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.redaction import redact, redacted
from hypothesis import given
from hypothesis import strategies as st

#: No blank, no quote, no bracket; long enough not to stand in the text by chance.
CHARACTERS = string.ascii_letters + string.digits + "!#$%&*+-./;<>?@^_|~"
SECRETS = st.text(CHARACTERS, min_size=12, max_size=60).map(lambda text: f"Zq9{text}")
PREFIXED = st.tuples(
    st.sampled_from(("hf_", "nvapi-", "sk-", "sk-proj-", "ghp_", "gho_", "ghs_", "github_pat_", "glpat-", "xoxb-")),
    st.text(string.ascii_letters + string.digits + "_-", min_size=8, max_size=60).map(lambda text: f"Zq{text}"),
)
NAMES = st.sampled_from(
    (
        *("password", "PASSWORD", "passwd", "db_password", "api_key", "API_KEY", "api-key", "apikey", "NGC_API_KEY"),
        *("secret", "client_secret", "secret_key", "token", "hf_token", "HF_TOKEN", "access_token", "passphrase"),
        *("sparkfleet_engine_key", "access_key", "private_key", "credentials"),
    )
)
AROUND = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="Zq"), max_size=60)
WAYS: dict[str, Callable[[str, str], str]] = {
    "json": lambda name, secret: json.dumps({"a": 1, name: secret, "b": [2]}),
    "compact json": lambda name, secret: json.dumps({name: secret, "b": [2]}, separators=(",", ":")),
    "json in json": lambda name, secret: json.dumps({"text": json.dumps({name: secret})}),
    "json list": lambda name, secret: json.dumps({name: ["x", secret, {"y": secret}], "port": 1}),
    "python": lambda name, secret: repr({"port": 1, name: secret}),
    "python list": lambda name, secret: repr({name: [secret, "other"], "port": 1}),
    "python bytes": lambda name, secret: f"{name}={secret.encode()!r}",
    "yaml": lambda name, secret: yaml.safe_dump({name: secret, "port": 1}, width=1000),
    "yaml list": lambda name, secret: f"{name}:\n- {secret}\n",
    "yaml block": lambda name, secret: f"{name}: |\n  {secret}\nport: 1\n",
    "assignment": lambda name, secret: f"export {name}={secret} and more",
    "quoted assignment": lambda name, secret: f'{name} = "{secret}"',
    "flag": lambda name, secret: f"vllm serve --{name} {secret} --port 8000",
    "flag, equals": lambda name, secret: f"vllm serve --{name}={secret} --port 8000",
    "flag in a python list": lambda name, secret: repr(["serve", f"--{name}", secret, "--port"]),
    "flag in a json list": lambda name, secret: json.dumps(["serve", f"--{name}", secret], separators=(",", ":")),
    "flag in a yaml list": lambda name, secret: f"command:\n  - --{name}\n  - {secret}\n",
    "query": lambda name, secret: f"GET https://host/path?{name}={secret}",
}


@pytest.mark.parametrize("way", WAYS)
@given(name=NAMES, secret=SECRETS, before=AROUND, after=AROUND)
def test_a_named_secret_goes(way: str, name: str, secret: str, before: str, after: str) -> None:
    printed = redact(f"{before} {WAYS[way](name, secret)} {after}")
    assert "Zq" not in printed and "***" in printed


@given(token=PREFIXED, before=AROUND, after=AROUND)
def test_a_token_with_a_known_beginning_goes_wherever_it_stands(
    token: tuple[str, str], before: str, after: str
) -> None:
    assert "Zq" not in redact(f"{before} x/{token[0]}{token[1]} {after}")


URL_PART = st.text(string.ascii_letters + string.digits + "!$&'()*+,;=-._~@%:/", min_size=6, max_size=30)


@given(secret=URL_PART.map(lambda text: f"Zq9{text}"), user=st.sampled_from(("alice", "a.b", "", "DOM%5Cbob")))
@pytest.mark.parametrize("around", ["{}", "proxy '{}' refused", '"{}"', "a=http://b.c {}/path?x=1#y", "HTTP_PROXY={}"])
def test_a_password_in_a_url_goes(around: str, secret: str, user: str) -> None:
    assert "Zq" not in redact(around.format(f"http://{user}:{secret}@proxy.example:3128"))


@pytest.mark.parametrize(
    ("line", "printed"),
    [
        ("Authorization: Bearer Zq9.abc~def==", "Authorization: ***"),
        ("{'Authorization': 'Bearer Zq9abcdef'}", "{'Authorization': '***'}"),
        ("sent bearer Zq9abcdef to it", "sent bearer *** to it"),
        ("Proxy-Authorization: Basic WnE5YWxpY2U6c2VjcmV0", "Proxy-Authorization: ***"),
        ("basic WnE5YWxpY2U6c2VjcmV0", "basic ***"),
        ("password: correct horse Zq9", "password: ***"),
        ("https://Zq9abcdefghijklmnop@host/x", "https://***@host/x"),
        ("-----BEGIN PRIVATE KEY-----\nZq9\nZq8\n-----END PRIVATE KEY-----\n", None),
        ("eyJZq90eXAiOiJKV1QifQ.eyJzdWIiOiIxIn0.abc-def", "***"),
        ("{'token': 'Zq9abc'}", "{'token': '***'}"),
        ("{'api_key': 'it\\'s Zq9 all', 'port': 8000}", "{'api_key': '***', 'port': 8000}"),
        ("api_key=['Zq9', 'Zq8]', \"Zq7\"], port=8000", "api_key=***, port=8000"),
        ('{"password": "Zq9 without an end', '{"password": "***'),
    ],
)
def test_each_form(line: str, printed: str | None) -> None:
    assert "Zq" not in redact(line) and (printed is None or redact(line) == printed)


@pytest.mark.parametrize(
    "line",
    [
        "Avg generation throughput: 12.5 tokens/s, Running: 1 reqs, pad_token_id=0, max_tokens: 32",
        "Invalid credentials in Authorization header",
        "the token of the Hub was rejected [hub-token-rejected]",
        "Set sparkfleet_hf_token or export HF_TOKEN before the run.",
        "basic information about bearers; a Missing sudo password",
        "git@github.com:org/repo, ssh://git@host/x, nvcr.io/nvidia/vllm:25.09-py3@sha256:abc",
        "http://127.0.0.1:8000/health: no answer",
        "INFO 09-29 09:51:29 [backends.py:559] Using cache directory: /root/.cache/vllm",
    ],
)
def test_what_is_no_secret_stays(line: str) -> None:
    assert redact(line) == line


def test_objects_by_their_names() -> None:
    data = {
        "hf_token": "abc",
        "keys": 3,
        "api_key": ["a", {"b": "c"}],
        "token": "",
        "tokens": 5,
        "x": [None, "hf_abcdefgh"],
    }
    assert redacted(data) == {
        **{"hf_token": "***", "keys": 3, "api_key": ["***", {"b": "***"}], "token": "", "tokens": 5},
        **{"x": [None, "***"]},
    }


@given(st.recursive(st.none() | st.integers() | AROUND, lambda inner: st.lists(inner) | st.dictionaries(AROUND, inner)))
def test_any_data_keeps_its_form(data: object) -> None:
    def form(item: object) -> object:
        if isinstance(item, dict):
            return [form(value) for value in item.values()]
        return [form(value) for value in item] if isinstance(item, list) else type(item)

    if not isinstance(data, dict):
        assert form(redacted(data)) == form(data)


PIECES = (
    *(
        "password",
        "password ",
        " " * 50,
        "token",
        "token:",
        "://",
        "a://b:",
        "@",
        "-",
        "--",
        "'",
        '"',
        "\\",
        "\\'",
        "[",
    ),
    *("(", "hf_", "sk-", "sk-a", "bearer ", "basic ", "authorization", "authorization: ", "eyJ", "eyJ.", "a", "=", ":"),
    *("-----BEGIN PRIVATE KEY-----", "--api-key ", ", ", "\n", "\n- ", "|\n"),
)


@pytest.mark.parametrize("head", ["", "password", "--api-key", "password: '", "http://", "token: ["])
@pytest.mark.parametrize("piece", PIECES)
def test_no_text_takes_long(head: str, piece: str) -> None:
    text = head + piece * (100_000 // len(piece))
    began = time.process_time()
    redact(text)
    assert time.process_time() - began < 1.0


@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6))
def test_no_pattern_takes_long(pieces: list[str]) -> None:
    unit = "".join(pieces)
    text = unit * (30_000 // len(unit))
    began = time.process_time()
    redact(text)
    assert time.process_time() - began < 1.0
