"""From records to curves, by hand; and charts: where points lie, what is marked and escaped."""

import math
import re

import pytest

from jaxrlhf.run.charts import (
    Point,
    Series,
    best_of_n,
    chart,
    gold_against_proxy,
    peak,
    reliability,
    series,
    spread,
    thin,
    ticks,
)


def held_out(step, kl, proxy, gold):
    measured = {"kl_nats": kl, "proxy": proxy, "proxy_ci": 0.5, "gold": gold, "gold_ci": 0.25}
    return {"step": step} | {f"eval/{name}": x for name, x in measured.items()}


METRICS = [
    held_out(0, -1e-6, 1.0, 0.0),
    {"step": 1, "kl": 0.0},
    {"step": 2, "kl": None},
    held_out(2, 4.0, 2.0, 0.75),
    {"step": 4, "kl": 9.0},
    held_out(4, 9.0, 4.0, 0.5),
]


def test_gold_against_proxy_by_hand():
    path = gold_against_proxy(METRICS, root=True)
    assert path == [
        (0, (0.0, 1.0, 0.5), (0.0, 0.0, 0.25)),
        (2, (2, 2, 0.5), (2, 0.75, 0.25)),
        (4, (3, 4, 0.5), (3, 0.5, 0.25)),
    ]
    assert [policy.gold.x for policy in gold_against_proxy(METRICS)] == [-1e-6, 4, 9]
    assert peak(path).step == 2
    assert peak([]) is None


def test_gold_against_proxy_without_gold():
    records = [{"step": 3, "eval/kl_nats": 1.0, "eval/proxy": 2.0}, {"step": 3, "eval/loss": 1.0}]
    (policy,) = gold_against_proxy(records)
    assert policy.proxy.y == 2
    assert math.isnan(policy.gold.y)
    assert peak([policy]) is None


def test_best_of_n_reads_the_curve():
    curve = {
        "n": [1, 2],
        "kl_nats": [0.0, 0.193],
        "proxy": [1.0, 1.5],
        "proxy_ci": [0.1, 0.1],
        "gold": [0.0, None],
        "gold_ci": [0.2, None],
    }
    first, second = best_of_n({"best_of_n": curve}, root=True)
    assert first == (1, (0, 1, 0.1), (0, 0, 0.2))
    assert second.gold.x == math.sqrt(0.193)
    assert math.isnan(second.gold.y)
    assert best_of_n({}) == []


def test_series_leaves_out_missing_numbers():
    assert [point[:2] for point in series(METRICS, "kl")] == [(1, 0), (4, 9)]


def test_thin_averages_stretches():
    points = [Point(float(i), 2.0 * i) for i in range(10)]
    assert thin(points, 10) == points
    assert [p[:2] for p in thin(points, 5)] == [(0.5, 1), (2.5, 5), (4.5, 9), (6.5, 13), (8.5, 17)]


def test_reliability_by_hand():
    """Wilson's intervals of 50 and of 90 in 100: 0.404 to 0.596, and 0.826 to 0.945."""
    curve = {"predicted": [0.55, 0.95], "observed": [0.5, 0.9], "count": [100, 100]}
    first, last = reliability({"reliability": curve})
    assert first == (0.55, 0.5, pytest.approx(0.0962, abs=1e-4))
    assert last == (0.95, 0.9, pytest.approx(0.0744, abs=1e-4))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, ["0", "2", "4", "6", "8", "10"]),
        (1, 9, ["2", "4", "6", "8"]),
        (-0.13, 0.37, ["-0.1", "0.0", "0.1", "0.2", "0.3"]),
        (0.9312, 0.9334, ["0.9315", "0.9320", "0.9325", "0.9330"]),
        (0, 4e7, ["0", "1e+07", "2e+07", "3e+07", "4e+07"]),
    ],
)
def test_ticks(low, high, expected):
    assert ticks(low, high) == expected


def test_spread():
    assert spread([0.0, 10.0], 0.1) == (-1, 11)
    assert spread([4.0], 0.1) == (2, 6)
    assert spread([0.0, 0.0], 0.1) == (-0.5, 0.5)


def test_chart_places_points():
    # 302 units across; 176 up, of which 0.06/1.12 are below 0 and above 1
    drawn = chart([Series("a", [Point(0, 0), Point(1, 1), Point(2, math.nan)])], "t", "x")
    assert '<polyline class="line c0" points="46.0,176.6 348.0,19.4"/>' in drawn
    assert "circle" not in drawn
    near = chart([Series("a", [Point(1, 0), Point(31, 1)])], "t", "x")  # from 0: 1/31 of 302
    assert 'points="55.7,176.6 348.0,19.4"' in near
    assert chart([Series("a", [Point(0, math.nan)])], "t", "x") == ""


def test_chart_has_room_for_long_labels():
    drawn = chart([Series("a", [Point(0, 0.0008), Point(1, 0.001)])], "t", "x")
    rows = re.findall(r'class="row" x="([\d.]+)" y="[\d.]+">([^<]+)<', drawn)
    assert max(len(label) for _, label in rows) > 5
    # In 11 px of a sans-serif a digit is 6.4 wide.
    assert all(float(end) > 6.4 * len(label) for end, label in rows)
    first = float(re.findall(r'points="([\d.]+),', drawn)[0])
    assert first == float(rows[0][0]) + 6


def test_chart_marks_and_escapes():
    curves = [Series("a<b", [Point(0, 0, 1.0)], dots=True), Series("c", [Point(1, 2)], 7, True)]
    drawn = chart(curves, "t & u", "x")
    assert "<title>a&lt;b: 0.00 at 0.00 (± 1.00)</title>" in drawn
    assert '<span class="key c1 dashed">c</span>' in drawn
    assert drawn.count('class="bar c0"') == 1
    assert drawn.startswith("<figure><figcaption>t &amp; u</figcaption>")
