"""The table of metrics: what a name is looked up as; the page of the docs has all of it.

That every figure of every algorithm's run is in the table is asserted by ``runs.trained``.
"""

from pathlib import Path

import pytest

from jaxrlhf.run.metrics import COUNTS, DRAWN, HELD_OUT, METRICS, TERMINAL, lookup, tables, titled

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_the_page_of_the_docs_ends_with_the_tables():
    assert PAGE.read_text(encoding="utf-8").endswith(tables())


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("kl", "KL to the reference, in training"),
        ("reward/a.b:c", "Reward by a.b:c"),
        ("reward/excluded", "Rows without a reward"),
        ("applies/x/y", "Rows that x/y applies to"),
        ("critic/grad_norm", "Gradient norm"),
        ("eval/length", "Length"),
        ("eval/gold_ci", "Gold measure"),
        ("eval/margin", "Margin"),
        ("eval/accuracy_gap_3", "Accuracy, quarter 3 of the gaps"),
        ("eval/score_p95", "Percentile 95 of scores"),
    ],
)
def test_lookup(name, title):
    assert lookup(name).title == title


@pytest.mark.parametrize(
    "name", ["", "x", "eval/x", "eval/", "critic/x", "reward/", "x/kl", "step"]
)
def test_lookup_of_what_is_in_no_table(name):
    assert lookup(name) is None


def test_titled_falls_back_on_the_name():
    assert titled("gold") == "Gold measure"
    assert titled("own_measure") == "own_measure"


def test_what_is_shown_is_in_the_table():
    assert {*TERMINAL, *DRAWN} <= METRICS.keys()
    assert set(COUNTS) <= {*HELD_OUT, *METRICS}


def test_tables_escape_what_ends_a_cell():
    assert r"Mean \|guess − target\|" in tables()
