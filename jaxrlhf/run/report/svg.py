"""Charts as inline SVG: pure functions from points to markup, styled by the page's stylesheet."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from markupsafe import Markup

from jaxrlhf.run.display import number
from jaxrlhf.run.report.curves import Point

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 34
"""Space around the plot for the axes' labels, in the units of the drawing."""

COLOURS = 6
"""Series that the stylesheet has a colour for; more begin again."""


class Series(NamedTuple):
    """A curve of a chart."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    dashed: bool = False
    dots: bool = False
    """Mark the points, which are few, and show their intervals."""


class Scale(NamedTuple):
    """Values → places along an axis of the drawing."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def chart(curves: Sequence[Series], title: str, x: str) -> Markup:
    """Curves over one pair of axes, with a legend if they are several; nothing without a point.

    Args:
      curves: points that are not finite are left out.
      title: text above, with the unit of the values; also what a screen reader says.
      x: name of the axis across, with its unit; it begins at 0 where that is near.
    """
    curves = [curve._replace(points=_finite(curve.points)) for curve in curves]
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return Markup("")
    points = [point for curve in curves for point in curve.points]
    ends = [p.y + sign * (0 if math.isnan(p.ci) else p.ci) for p in points for sign in (-1, 1)]
    left, right = spread([p.x for p in points], 0.0)
    across = Scale(0.0 if 0 < left < right / 10 else left, right, LEFT, WIDTH - RIGHT)
    up = Scale(*spread(ends, 0.06), HEIGHT - BOTTOM, TOP)
    parts = [*_axes(across, up, x), *(part for c in curves for part in _curve(c, across, up))]
    return Markup(
        '<figure><figcaption>{title}</figcaption><svg viewBox="0 0 {w} {h}" role="img" '
        'aria-label="{title}">{parts}</svg>{legend}</figure>'
    ).format(title=title, w=WIDTH, h=HEIGHT, parts=Markup("").join(parts), legend=_legend(curves))


def spread(values: Sequence[float], margin: float) -> tuple[float, float]:
    """The range of an axis: from lowest to highest value, ``margin`` of that wider at both ends.

    One value alone lies in the middle.
    """
    low, high = min(values), max(values)
    if low == high:
        room = abs(low) / 2 or 0.5
        return low - room, high + room
    return low - margin * (high - low), high + margin * (high - low)


def ticks(low: float, high: float, count: int = 4) -> list[str]:
    """Round numbers from ``low`` to ``high``, about ``count``, as text: steps of 1, 2, 5 · 10ᵏ."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(
        m for m, most in {1: 1.5, 2: 3.5, 5: 7.5, 10: 10}.items() if raw <= most * power
    )
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    small = step >= 1e-4 and max(abs(low), abs(high)) < 1e6
    return [f"{i * step:.{places}f}" if small else f"{i * step:.3g}" for i in numbers]


def _axes(across: Scale, up: Scale, x: str) -> Iterator[Markup]:
    line = Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>')
    text = Markup('<text class="{}" x="{}" y="{}">{}</text>')
    for label in ticks(up.low, up.high):
        place = up.at(float(label))
        yield line.format(LEFT, WIDTH - RIGHT, place, place)
        yield text.format("row", LEFT - 6, place + 4, label)
    for label in ticks(across.low, across.high, 5):
        yield text.format("column", across.at(float(label)), HEIGHT - BOTTOM + 15, label)
    yield text.format("column name", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 3, x)


def _curve(curve: Series, across: Scale, up: Scale) -> Iterator[Markup]:
    colour = f"c{curve.colour % COLOURS}" + (" dashed" if curve.dashed else "")
    places = [(across.at(p.x), up.at(p.y)) for p in curve.points]
    if len(places) > 1:
        path = " ".join(f"{a},{b}" for a, b in places)
        yield Markup('<polyline class="line {}" points="{}"/>').format(colour, path)
    if not curve.dots and len(places) > 1:
        return
    for point, (a, b) in zip(curve.points, places, strict=True):
        told = f"{curve.name}: {number(point.y)} at {number(point.x)}"
        if not math.isnan(point.ci):
            ends = up.at(point.y - point.ci), up.at(point.y + point.ci)
            told += f" (± {number(point.ci)})"
            yield Markup('<line class="bar {}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                colour, a, a, *ends
            )
        yield Markup(
            '<circle class="dot {}" cx="{}" cy="{}" r="3"><title>{}</title></circle>'
        ).format(colour, a, b, told)


def _legend(curves: Sequence[Series]) -> Markup:
    if len(curves) < 2:
        return Markup("")
    items = [
        Markup('<span class="key c{}{}">{}</span>').format(
            curve.colour % COLOURS, " dashed" if curve.dashed else "", curve.name
        )
        for curve in curves
    ]
    return Markup('<p class="legend">{}</p>').format(Markup(" ").join(items))


def _finite(points: Sequence[Point]) -> list[Point]:
    return [p for p in points if math.isfinite(p.x) and math.isfinite(p.y)]
