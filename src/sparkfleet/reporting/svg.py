"""Charts as SVG in a page: lines over a scale, bars of parts. No scripts; a text for screen readers says the same."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from html import escape

Point = tuple[float, float | None]
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 52, 12, 10, 26


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a chart: `points` are (x, y), y None for a gap. `dots` marks each point."""

    label: str
    points: Sequence[Point]
    dots: bool = False


@dataclasses.dataclass(frozen=True)
class Scale:
    """How values are written along the axes, and where: `ticks` are (x, text), evenly spaced in what `place` makes of
    x."""

    ticks: Sequence[tuple[float, str]]
    place: Callable[[float], float] = float
    show: Callable[[float], str] = "{:,.0f}".format


def lines(
    title: str,
    made: Sequence[Line],
    scale: Scale,
    limit: tuple[float, str] | None = None,
    size: tuple[int, int] = (560, 220),
) -> str:
    """A chart of lines, each in a colour of the page (class `series-N`); `limit` is a level with a word, drawn across.
    "" where no line has a value."""
    values = [y for line in made for _, y in line.points if y is not None]
    places = [scale.place(x) for line in made for x, y in line.points if y is not None]
    if not values:
        return ""
    # A limit far above what was measured would press the lines together: it is said instead.
    high = max(values)
    drawn = limit if limit and limit[0] <= 4 * high else None
    steps = nice(max(high, drawn[0] if drawn else 0.0))
    top = steps[-1] or 1.0
    left, right = min(places), max(places)
    width, height = size
    wide, tall = width - MARGIN_LEFT - MARGIN_RIGHT, height - MARGIN_TOP - MARGIN_BOTTOM

    def x_of(x: float) -> float:
        return MARGIN_LEFT + ((scale.place(x) - left) / (right - left) if right > left else 0.5) * wide

    def y_of(y: float) -> float:
        return MARGIN_TOP + (1 - y / top) * tall

    parts = []
    for step in steps:
        y = y_of(step)
        parts.append(f'<line class="grid" x1="{MARGIN_LEFT}" x2="{width - MARGIN_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick end" x="{MARGIN_LEFT - 6}" y="{y + 3.5:.1f}">{escape(scale.show(step))}</text>'
        )
    for x, text in scale.ticks:
        if left <= scale.place(x) <= right:
            parts.append(f'<text class="tick middle" x="{x_of(x):.1f}" y="{height - 8}">{escape(text)}</text>')
    if drawn:
        y = y_of(drawn[0])
        parts.append(f'<line class="limit" x1="{MARGIN_LEFT}" x2="{width - MARGIN_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick limit-word" x="{MARGIN_LEFT + 6}" y="{y - 4:.1f}">{escape(drawn[1])}</text>')
    for number, line in enumerate(made, 1):
        path, pen = [], "M"
        for x, value in line.points:
            if value is None:
                pen = "M"
                continue
            path.append(f"{pen}{x_of(x):.1f} {y_of(value):.1f}")
            pen = "L"
            if line.dots:
                parts.append(f'<circle class="dot-{number}" cx="{x_of(x):.1f}" cy="{y_of(value):.1f}" r="3.5"/>')
        parts.append(f'<path class="line-{number}" d="{"".join(path)}"/>')
    words = escape(_words(title, made, scale, limit), quote=True)
    return f'<svg class="lines" viewBox="0 0 {width} {height}" role="img" aria-label="{words}">{"".join(parts)}</svg>'


def _words(title: str, made: Sequence[Line], scale: Scale, limit: tuple[float, str] | None) -> str:
    parts = []
    for line in made:
        known = [y for _, y in line.points if y is not None]
        if known:
            parts.append(
                f"{line.label}: from {scale.show(min(known))} to {scale.show(max(known))}, last {scale.show(known[-1])}"
            )
    return f"{title}. {'; '.join(parts)}{f'; {limit[1]}' if limit else ''}"


def nice(high: float) -> list[float]:
    """Round steps from 0 to at least `high`, three to six of them."""
    if not 1e-300 < high < 1e300:  # nor what has no quarter, or no multiple, as a float
        return [0.0, 1.0]
    raw = high / 4
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.999)
    return [step * number for number in range(math.ceil(high / step - 1e-9) + 1)]


def bar(parts: Sequence[tuple[str, float]], length: float, mark: float | None, words: str) -> str:
    """A bar of parts, (class, size), over `length`; `mark` is a level that was measured."""
    if length <= 0:
        return ""
    made, start = ['<rect class="part-free" y="2" width="200" height="10" rx="2"/>'], 0.0
    for name, size in parts:
        left, wide = start / length * 200, size / length * 200
        made.append(f'<rect class="part-{name}" x="{left:.1f}" y="2" width="{max(wide, 0.3):.1f}" height="10"/>')
        start += size
    if mark is not None:
        made.append(
            f'<rect class="part-used" x="{max(min(mark / length, 1) * 200 - 1, 0):.1f}" y="0" width="2.5" height="14"/>'
        )
    text = escape(words, quote=True)
    head = 'class="membar" viewBox="0 0 200 14" preserveAspectRatio="none" role="img"'
    return f'<svg {head} aria-label="{text}">{"".join(made)}</svg>'
