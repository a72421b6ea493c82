"""Benchmarks in words: each load as it is measured, and the table of a record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparkfleet_host import measured

from sparkfleet.performance import comparison, records
from sparkfleet.performance.comparison import Comparison
from sparkfleet.performance.records import Record
from sparkfleet.reporting import report


def line(row: Mapping[str, Any], repetitions: int) -> str:
    """A row in a line: "chat, 4 streams, 1 of 3: 46.3 tok/s, first token 312 ms (p95 410)"."""
    which = f", {row['repetition']} of {repetitions}" if repetitions > 1 else ""
    tail = f" (p95 {row['ttft_p95_ms']:.0f})" if row.get("ttft_p95_ms") is not None else ""
    more = "; others used the engine meanwhile" if row["disturbed"] else ""
    streams = measured.streams_words(row["streams"])
    return (
        f"{row['shape']}, {streams}{which}: {row['tokens_per_second']:,.1f} tok/s, first token "
        f"{row['ttft_ms']:.0f} ms{tail}{more}"
    )


def table(record: Record) -> str:
    """A record for people."""
    head = f"{record['host']}  {record['model']} ({record['profile']}), release {record['release']}, "
    head += f"vLLM {record['vllm'] or '?'}, measured by {record['tool'] or '?'}"
    rows = [("shape", "streams", "tok/s", "a stream", "of limit", "first token", "p95", "between", "p95", "J/token")]
    for point in records.curve(record):
        shape = f"{point['shape']} {point['input']}:{point['output']}" if ":" not in point["shape"] else point["shape"]
        rows.append(
            (
                *(shape, str(point["streams"]), _number(point, "tokens_per_second", 1)),
                *(_number(point, "stream_tokens_per_second", 2), _percent(point["limit_share"])),
                *(_number(point, "ttft_p50_ms", 0, " ms"), _number(point, "ttft_p95_ms", 0, " ms")),
                *(_number(point, "itl_p50_ms", 1, " ms"), _number(point, "itl_p95_ms", 1, " ms")),
                _number(point, "joules_per_token", 2),
            )
        )
    return f"{head}\n{report.table(rows)}" + "".join(f"{note}\n" for note in notes(record))


def notes(record: Record) -> list[str]:
    """What the figures depend on, a sentence each."""
    found = []
    if record["limit_tok_s"]:
        found.append(f"limit: {record['limit_tok_s']:.1f} tok/s a stream, by the bandwidth of the memory")
    one = next((point for point in records.curve(record) if point["published_share"] is not None), None)
    if one:
        found.append(
            f"published: {record['published_tok_s']:g} tok/s of one stream; here {one['published_share']:.0%} of it"
        )
    heat = [row["temperature_c"] for row in record["rows"] if row.get("temperature_c") is not None]
    if heat:
        found.append(f"temperature of the GPU: up to {max(heat):.0f} °C")
    if slowed := sorted({reason for row in record["rows"] for reason in row["throttled"]}):
        found.append(f"the GPU was slowed down: {', '.join(slowed)}")
    if record["rows"] and not any(row.get("power_w") for row in record["rows"]):
        found.append("energy: nvidia-smi reports no power here")
    if any(row["disturbed"] for row in record["rows"]):
        found.append("others used the engine meanwhile: these are not its own figures")
    if not record["complete"]:
        found.append("it was cut: not all loads were measured")
    return found


def _number(point: Mapping[str, Any], key: str, digits: int, unit: str = "") -> str:
    value = point.get(key)
    return "-" if value is None else f"{value:,.{digits}f}{unit}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def compared(made: Comparison) -> str:
    """Two records against each other, for people."""
    lines = []
    for name, record in (("A", made.first), ("B", made.second)):
        lines += [f"{name}  {_head(record)}", *(f"     {note}" for note in notes(record))]
    lines += [f"   {name}: {_short(pair[0])} in A, {_short(pair[1])} in B" for name, pair in made.differs.items()]
    rows = [("shape", "streams", "figure", "A", "B", "B against A", "95% interval", "repetitions", "verdict")]
    for item in made.differences:
        within = f"{item.low:+.1%} to {item.high:+.1%}" if item.low is not None and item.high is not None else "-"
        rows.append(
            (
                *(item.shape, str(item.streams), item.figure, f"{item.first:,.2f}", f"{item.second:,.2f}"),
                *(f"{item.change:+.1%}", within, " and ".join(map(str, item.repetitions)), item.verdict),
            )
        )
    lines += [f"\n{report.table(rows)}".rstrip()]
    lines += [f"left out, since only one of them has it: {', '.join(made.left_out)}"] if made.left_out else []
    unknown = dict.fromkeys(f"{item.shape} x {item.streams}: {item.why}" for item in made.differences if item.why)
    lines += [f"not judged: {text}" for text in unknown]
    verdicts = {item.verdict for item in made.differences} - {comparison.UNKNOWN}
    if not verdicts:
        end = "Nothing can be said."
    elif verdicts == {comparison.NOISE}:
        end = f"No difference {'of the others ' if unknown else ''}is larger than noise."
    else:
        words = {comparison.SLOWER: "slower", comparison.FASTER: "faster"}
        end = f"B is {' and '.join(word for key, word in words.items() if key in verdicts)} by more than noise."
    return "\n".join([*lines, end]) + "\n"


def _head(record: Record) -> str:
    return (
        f"{record['host']}/{record['id']}: {record['model']} ({record['profile']}), release {record['release']}, vLLM "
        f"{record['vllm'] or '?'}"
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:28]}…{text[-28:]}"
