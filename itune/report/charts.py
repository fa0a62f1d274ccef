"""Curves as SVG that needs nothing else: lines over steps, in the colours of the page's style sheet."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Point = tuple[float, float]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 230, 58, 10, 10, 24
MOST = 700  # points of a line; more are no longer told apart


class Series(NamedTuple):
    """A named line over steps; `kind` is its classes in the style sheet (one, two, dash), `dots` marks every point.

    `ranges`: step -> (low, high), drawn as a bar through the point.
    """

    name: str
    points: Sequence[Point]
    kind: str = "one"
    dots: bool = False
    ranges: Mapping[float, Point] = {}


def series(records: Sequence[Mapping[str, Any]], key: str, name: str, kind: str = "one") -> Series:
    """The series of a logged number; steps without a finite one are left out."""
    points = [(record["step"], record[key]) for record in records if is_finite(record.get(key))]
    return Series(name, points, kind)


def chart(title: str, given: Sequence[Series], unit: str = "") -> str:
    """A figure with these series; "" where none has a point."""
    lines = [one for one in given if one.points]
    if not lines:
        return ""
    points = [point for one in lines for point in one.points]
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    ends = [end for one in lines for bounds in one.ranges.values() for end in bounds]
    low_y, high_y = _window([*(y for _, y in points), *ends])

    def place(x: float, y: float) -> Point:
        across = (x - low_x) / ((high_x - low_x) or 1)
        up = (min(y, high_y) - low_y) / ((high_y - low_y) or 1)
        return LEFT + (WIDTH - LEFT - RIGHT) * across, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * up

    parts = [f"<title>{html.escape(title)}</title>"]
    for tick in ticks(low_y, high_y):
        y = place(low_x, tick)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in ticks(low_x, high_x):
        x, anchor = place(tick, low_y)[0], "end" if tick == high_x else "middle"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{short(tick)}</text>')
    for one in lines:
        for step, bounds in one.ranges.items():
            (x, bottom), (_, top) = (place(step, end) for end in bounds)
            parts.append(f'<line class="bar {one.kind.split()[0]}" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom:.1f}" '
                         f'y2="{top:.1f}"/>')
        parts.append(_line(one, [place(*point) for point in thinned(one.points)]))
    legend = "".join(f'<span class="{one.kind.split()[0]}">{"●" if one.dots else "—"} {html.escape(one.name)}</span>'
                     for one in lines if one.name)  # fmt: skip
    head = f"<b>{html.escape(title)}</b>" + (f' <span class="dim">{html.escape(unit)}</span>' if unit else "")
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{head} {legend}</figcaption>{picture}</figure>"


def _line(one: Series, placed: Sequence[Point]) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    text = f'<polyline class="line {one.kind}" points="{path}"/>'
    if one.dots or len(placed) == 1:
        for (step, value), (x, y) in zip(thinned(one.points), placed, strict=True):
            text += (f'<circle class="dot {one.kind.split()[0]}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
                     f"<title>step {step:g}: {value:.6g}</title></circle>")
    return text


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most about MOST of the points: of each run of neighbours the lowest and the highest stay."""
    if len(points) <= MOST:
        return list(points)
    width, kept = math.ceil(2 * len(points) / MOST), []
    for start in range(0, len(points), width):
        part = points[start : start + width]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def _window(values: Sequence[float]) -> Point:
    """The range to show: all, but a few first values far above the rest are cut at the top."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    near = ordered[min(len(ordered) - 1, int(0.98 * len(ordered)))]
    if len(ordered) >= 50 and high - low > 4 * (near - low) > 0:
        high = low + 1.3 * (near - low)
    margin = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    return (0.0 if low >= 0 and low - margin < 0 else low - margin), high + margin


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers between low and high."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first = math.ceil(low / step)
    return [round(index * step, 12) for index in range(first, math.floor(high / step) + 1)]


def short(value: float) -> str:
    """A tick's label: 12k, 0.002, 1e-5."""
    if abs(value) >= 10_000:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    return f"{value:.4g}"


def forest(mean: float, low: float | None, high: float | None, limit: float, sure: bool) -> str:
    """A difference and its interval on a line around 0, which reaches from -limit to limit."""
    def at(value: float) -> float:
        return 100 + 95 * max(-1.0, min(1.0, value / (limit or 1)))

    if not math.isfinite(mean):
        return '<svg class="forest" viewBox="0 0 200 20" role="img"></svg>'
    ends = [at(-limit if low is None else low), at(limit if high is None else high)]
    kind = ' class="sure"' if sure else ""
    return (f'<svg class="forest" viewBox="0 0 200 20" role="img"><line class="zero" x1="100" x2="100" y1="1" y2="19"/>'
            f'<line{kind} x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="10" y2="10"/>'
            f'<circle{kind} cx="{at(mean):.1f}" cy="10" r="4"/></svg>')


def is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
