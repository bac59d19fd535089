"""From records to curves, and from curves to charts as inline SVG, styled by the page's stylesheet.

Pure functions. A number that is missing is NaN. What report.js shows of a chart under the pointer
stands in the ``data-`` attributes of its curves.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from jaxrlhf.core.stats import wilson
from jaxrlhf.run.display import number
from jaxrlhf.run.folder import RunFiles
from jaxrlhf.run.metrics import COUNTS, DRAWN, HELD_OUT, METRICS, Metric

FAR = 1e100
"""Beyond it nothing is drawn: widths of axes would not be finite."""

MOST_POINTS = 240
"""Points of a curve; more are averaged in equal stretches."""

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 34
"""Space around the plot for the axes' labels, in the units of the drawing; ``LEFT`` at least."""

DIGIT = 6.6
"""Width of a character of a label."""

COLOURS = 6
"""Series that the stylesheet has a colour for; more begin again."""


Records = Sequence[Mapping[str, Any]]


class Point(NamedTuple):
    """A mean, and the half width of its 95 % interval (NaN: not known)."""

    x: float
    y: float
    ci: float = math.nan


class Policy(NamedTuple):
    """A policy on its way from the reference, and what it is worth by the two measures.

    The points' x is KL(π‖π_ref) a sequence in nats, or its square root.
    """

    step: int  # iteration; the n of a best-of-n policy
    proxy: Point
    gold: Point


def number_of(record: Mapping[str, Any], name: str) -> float:
    """A number of a record; NaN where it has none by that name."""
    value = record.get(name)
    return float(value) if isinstance(value, int | float) else math.nan


def drawn(point: Point) -> bool:
    """Whether a point can be drawn: finite, as the width of an axis with it is."""
    return abs(point.x) < FAR and abs(point.y) < FAR


def rows_of(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Columns of equal length → rows."""
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def series(records: Records, name: str) -> list[Point]:
    """A metric over the iterations: every record that has it, at most ``MOST_POINTS`` means."""
    found = [
        Point(record["step"], number_of(record, name), number_of(record, f"{name}_ci"))
        for record in records
        if math.isfinite(number_of(record, name))
    ]
    return thin(found)


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most ``most`` points, each the mean of an equal stretch; intervals are then left out."""
    count = len(points)
    if count <= most:
        return list(points)
    # Whole records a stretch, so their numbers differ by one at most.
    stretches = [points[i * count // most : (i + 1) * count // most] for i in range(most)]
    return [
        Point(sum(p.x for p in part) / len(part), sum(p.y for p in part) / len(part))
        for part in stretches
    ]


def gold_against_proxy(records: Records, root: bool = False) -> list[Policy]:
    """Proxy and gold reward over the KL to the reference, at every evaluation in a run.

    As a policy moves away from the reference, the reward that it is trained on goes on rising while
    the gold measure turns: over-optimisation. Over √KL both curves are nearly straight at first,
    and gold is d·(α − β·d) for best-of-n, d·(α − β·log d) for RL, with d = √KL (arXiv:2210.10760).

    Args:
      records: lines of metrics.jsonl; those with ``eval/kl_nats`` and either measure are read.
      root: take √KL.
    """
    policies = [_policy(record["step"], record, root, "eval/") for record in records]
    return [
        p
        for p in policies
        if math.isfinite(p.gold.x) and not (math.isnan(p.proxy.y) and math.isnan(p.gold.y))
    ]


def best_of_n(evaluation: Mapping[str, Any], root: bool = False) -> list[Policy]:
    """The best-of-n curve of evaluation.json, in the same form; empty if it has none."""
    return [_policy(at.get("n") or 0, at, root) for at in rows_of(evaluation.get("best_of_n", {}))]


def _policy(step: int, record: Mapping[str, Any], root: bool, start: str = "") -> Policy:
    kl = number_of(record, f"{start}kl_nats")
    x = math.sqrt(max(kl, 0.0)) if root else kl  # an estimate of 0 may fall below it
    proxy, gold = (
        Point(x, number_of(record, start + name), number_of(record, f"{start}{name}_ci"))
        for name in ("proxy", "gold")
    )
    return Policy(step, proxy, gold)


def peak(policies: Sequence[Policy]) -> Policy | None:
    """Where the gold measure is highest; None if nothing has one."""
    known = [policy for policy in policies if math.isfinite(policy.gold.y)]
    return max(known, key=lambda policy: policy.gold.y, default=None)


def reliability(summary: Mapping[str, Any]) -> list[Point]:
    """What came true over what a reward model predicted, from ``reliability`` of summary.json."""
    curve = summary.get("reliability") or {}
    names = ("predicted", "observed", "count")
    points = []
    if not all(name in curve for name in names):
        return []
    for row in rows_of({name: curve[name] for name in names}):
        predicted, share, count = (number_of(row, name) for name in names)
        # So written that NaN fails too.
        if not (0 <= share <= 1 and 0 < count < FAR):
            continue
        low, high = wilson(share, count)  # not symmetric: its farther end is what is drawn
        points.append(Point(predicted, share, max(high - share, share - low)))
    return points


class Series(NamedTuple):
    """A curve of a chart."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    dashed: bool = False
    dots: bool = False  # mark the points, which are few, and show their intervals


class Scale(NamedTuple):
    """Values → places along an axis of the drawing."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def training_curves(metrics: Mapping[str, Records]) -> tuple[list[Markup], list[str]]:
    """The iterations' metrics, a chart each, a curve a run: name → lines of metrics.jsonl.

    Returns:
      Charts, and a line that names the metrics that never change, of which there is none.
    """
    drawn, still = [], []
    for name in DRAWN:
        curves, metric = _curves(metrics, name), METRICS[name]
        values = {point.y for curve in curves for point in curve.points}
        if len(values) > 1:
            drawn.append(chart(curves, _titled(metric.title, metric.unit), "iteration", metric))
        elif any(len(curve.points) > 1 for curve in curves):
            still.append(f"{metric.title} {number(values.pop())}")
    return drawn, [f"Always the same: {'; '.join(still)}."] if still else []


def held_out_curves(metrics: Mapping[str, Records]) -> list[Markup]:
    """Held-out measures over the iterations, for runs that were measured more than twice."""
    out = []
    for name, metric in HELD_OUT.items():
        curves = _curves(metrics, f"eval/{name}", dots=True)
        values = {point.y for curve in curves for point in curve.points}
        often = any(len(curve.points) > 2 for curve in curves)
        if name not in COUNTS and often and len(values) > 1:
            title = _titled(f"{metric.title}, held out", metric.unit)
            out.append(chart(curves, title, "iteration", metric))
    return out


def over_optimisation(named: Mapping[str, RunFiles]) -> list[Markup]:
    """Proxy and gold over √KL, and best-of-n beside them where it has been measured."""
    curves: dict[str, list[Series]] = {"proxy": [], "gold": []}
    for i, (name, run) in enumerate(named.items()):
        trained = name, gold_against_proxy(run.metrics, root=True), False
        best = f"{name}, best of n", best_of_n(run.evaluation, root=True), True
        for label, policies, dashed in (trained, best):
            for measure, found in curves.items():
                points = [getattr(policy, measure) for policy in policies]
                found.append(Series(label, points, i, dashed, dots=True))
    x = "√KL to the reference, √nats"
    return [
        chart(found, f"{HELD_OUT[measure].title} over √KL (reward units)", x)
        for measure, found in curves.items()
    ]


def _curves(metrics: Mapping[str, Records], metric: str, dots: bool = False) -> list[Series]:
    return [
        Series(name, series(records, metric), i, dots=dots)
        for i, (name, records) in enumerate(metrics.items())
    ]


def _titled(title: str, unit: str) -> str:
    return f"{title} ({unit})" if unit else title


def chart(curves: Sequence[Series], title: str, x: str, about: Metric | None = None) -> Markup:
    """Curves over one pair of axes, with a legend if they are several; nothing without a point.

    Args:
      curves: points that are not finite are left out.
      title: text above, with the unit of the values; also what a screen reader says.
      x: name of the axis across, with its unit; it begins at 0 where that is near.
      about: what is said of the metric below.
    """
    curves = [curve._replace(points=[p for p in curve.points if drawn(p)]) for curve in curves]
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return Markup("")
    points = [point for curve in curves for point in curve.points]
    ends = [p.y + sign * (0 if math.isnan(p.ci) else p.ci) for p in points for sign in (-1, 1)]
    left, right = spread([p.x for p in points], 0.0)
    up = Scale(*spread(ends, 0.06), HEIGHT - BOTTOM, TOP)  # SVG counts from the top
    start = max(LEFT, math.ceil(8 + DIGIT * max(map(len, ticks(up.low, up.high)))))
    across = Scale(0.0 if 0 < left < right / 10 else left, right, start, WIDTH - RIGHT)
    parts = [*_axes(across, up, x), *(_curve(c, across, up) for c in curves)]
    return Markup(
        '<figure><figcaption>{title}</figcaption><svg viewBox="0 0 {w} {h}" role="img" '
        'aria-label="{title}">{parts}</svg>{legend}{about}</figure>'
    ).format(
        title=title,
        w=WIDTH,
        h=HEIGHT,
        parts=Markup("").join(parts),
        legend=_legend(curves),
        about=_about(about),
    )


def _about(metric: Metric | None) -> Markup:
    """What a metric says, in its first sentence, and where it should be."""
    if metric is None:
        return Markup("")
    healthy = f" Healthy: {metric.healthy}." if metric.healthy else ""
    said = f"{metric.says.split('. ')[0]}.{healthy}"
    return Markup('<p class="about">{}</p>').format(said.replace("`", ""))


def spread(values: Sequence[float], margin: float) -> tuple[float, float]:
    """The range of an axis: from lowest to highest value, ``margin`` of that wider at both ends.

    One value alone lies in the middle.
    """
    low, high = min(values), max(values)
    # Nearer to each other than numbers can tell apart.
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-100):
        room = abs(low) / 2 or 0.5
        return low - room, high + room
    return low - margin * (high - low), high + margin * (high - low)


def ticks(low: float, high: float, count: int = 4) -> list[str]:
    """Round numbers from ``low`` to ``high``, about ``count``, as text: steps of 1, 2, 5 · 10ᵏ."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    # The nearest of the steps: each ends about half way to the next.
    step = power * next(
        m for m, most in {1: 1.5, 2: 3.5, 5: 7.5, 10: 10}.items() if raw <= most * power
    )
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    # 1e-9: a bound that is a step itself stays in, whatever the division rounds to.
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    small = step >= 1e-4 and max(abs(low), abs(high)) < 1e6
    return [f"{i * step:.{places}f}" if small else f"{i * step:.3g}" for i in numbers]


def _axes(across: Scale, up: Scale, x: str) -> Iterator[Markup]:
    line = Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>')
    text = Markup('<text class="{}" x="{}" y="{}">{}</text>')
    for label in ticks(up.low, up.high):
        place = up.at(float(label))
        yield line.format(across.start, across.end, place, place)
        yield text.format("row", across.start - 6, place + 4, label)
    for label in ticks(across.low, across.high, 5):
        yield text.format("column", across.at(float(label)), HEIGHT - BOTTOM + 15, label)
    yield text.format("column name", (across.start + across.end) / 2, HEIGHT - 3, x)


def _curve(curve: Series, across: Scale, up: Scale) -> Markup:
    """A curve, and beside it the values that stand at its places."""
    parts = Markup("").join(_marks(curve, across, up))
    told = [f"{number(p.y)}" + _half(p) for p in curve.points]
    return Markup('<g data-name="{}" data-x="{}" data-y="{}" class="c{}">{}</g>').format(
        curve.name,
        "|".join(_short(p.x) for p in curve.points),
        "|".join(told),
        curve.colour % COLOURS,
        parts,
    )


def _short(x: float) -> str:
    """Where a point lies: a step in full, else two or three digits."""
    return f"{x:.0f}" if x % 1 == 0 and abs(x) < 1e9 else number(x)


def _half(point: Point) -> str:
    return "" if math.isnan(point.ci) else f" ± {number(point.ci)}"


def _marks(curve: Series, across: Scale, up: Scale) -> Iterator[Markup]:
    colour = f"c{curve.colour % COLOURS}" + (" dashed" if curve.dashed else "")
    places = [(across.at(p.x), up.at(p.y)) for p in curve.points]
    if len(places) > 1:
        path = " ".join(f"{a},{b}" for a, b in places)
        yield Markup('<polyline class="line {}" points="{}"/>').format(colour, path)
        if not curve.dots:
            return
    bar = Markup('<line class="bar {}" x1="{}" x2="{}" y1="{}" y2="{}"/>')
    dot = Markup('<circle class="dot {}" cx="{}" cy="{}" r="3"><title>{}</title></circle>')
    for point, (a, b) in zip(curve.points, places, strict=True):
        told = f"{curve.name}: {number(point.y)} at {number(point.x)}"
        if not math.isnan(point.ci):
            told += f" (± {number(point.ci)})"
            ends = up.at(point.y - point.ci), up.at(point.y + point.ci)
            yield bar.format(colour, a, a, *ends)
        yield dot.format(colour, a, b, told)


def _legend(curves: Sequence[Series]) -> Markup:
    if len(curves) < 2:
        return Markup("")
    key = Markup('<span class="key c{}{}">{}</span>')
    items = [key.format(c.colour % COLOURS, " dashed" if c.dashed else "", c.name) for c in curves]
    return Markup('<p class="legend">{}</p>').format(Markup(" ").join(items))
