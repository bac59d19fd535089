"""The demo's prompts: neutral by themselves, so that what is scored is what the policy wrote."""

import difflib

import pytest

from jaxrlhf.data.rows import read_rows
from jaxrlhf.rewards.functions import resolve


def openings(split):
    rows = read_rows(f"jaxrlhf:demo/openings_{split}.jsonl").items
    assert all(row.values.keys() == {"prompt"} for row in rows)
    return [row.values["prompt"] for row in rows]


@pytest.mark.parametrize(("split", "least"), [("train", 160), ("eval", 40)])
def test_openings_are_neutral_and_short(split, least):
    prompts = openings(split)
    assert len(prompts) >= least
    assert resolve("sentiment")([""] * len(prompts), prompts) == [0.0] * len(prompts)
    assert all(4 <= len(prompt.split()) <= 12 for prompt in prompts)
    assert all(prompt == prompt.strip() and prompt[-1].isalpha() for prompt in prompts)


def test_openings_are_distinct_across_the_split():
    train, held_out = openings("train"), openings("eval")
    assert len(set(train + held_out)) == len(train) + len(held_out)
    for prompt in held_out:
        matcher = difflib.SequenceMatcher(b=prompt.split())
        for other in train:
            matcher.set_seq1(other.split())
            assert matcher.ratio() < 0.75, (prompt, other)
