"""What becomes of the completions of a prompt once they are judged, and that a draw does not depend
on its batch."""

import json
from dataclasses import replace

import jax
import pytest
import runs
from runs import one_device

from jaxrlhf.apps.preferences import Group, answers_of, pairs_of, ranking_of, write_pairs
from jaxrlhf.config import PreferencesConfig
from jaxrlhf.core.errors import InputError

GROUP = Group("a", ("b", "c", " ", "b"), (0.5, 0.9, 2.0, 0.5), (True, False, True, True))
WISH = PreferencesConfig("x", "f", "t", "e", max_prompt_tokens=1, max_new_tokens=1)


def test_pairs_of_a_group_with_an_unknown_score():
    scores = (0.0, float("nan"), 2.0, 1.0)
    group = Group("p", ("a", "b", "c", "d"), scores, (True,) * 4)
    (row,) = pairs_of(group, 0.3)
    assert (row["chosen"], row["rejected"], row["gap"]) == ("c", "a", 2.0)


def test_pairs_of_the_best_with_the_worst():
    """Of 2.0, 0.9, 0.5, 0.5 the first is blank; 0.9 with 0.5 is left."""
    (row,) = pairs_of(GROUP, 0.3)
    assert row == {
        "prompt": "a",
        "chosen": "c",
        "rejected": "b",
        "gap": 0.4,
        "chosen_ended": False,
        "rejected_ended": True,
    }


def test_rankings_and_answers_of_each_text_once():
    (row,) = ranking_of(GROUP)
    assert (row["responses"], row["ranks"], row["scores"]) == (["b", "c"], [2, 1], [0.5, 0.9])
    assert row["ended"] == [True, False]
    tied = Group("a", ("b", "c", "d", "e"), (1.0, 0.0, 0.0, float("nan")), (True,) * 4)
    (row,) = ranking_of(tied)
    assert row["ranks"] == [1, 2, 2]
    assert list(ranking_of(Group("a", ("b", "b"), (1.0, 1.0), (True,) * 2))) == []
    assert [row["score"] for row in answers_of(GROUP)] == [0.5, 0.9]


@pytest.fixture
def wish(policy, tmp_path):
    """Pairs of that policy, on three prompts."""
    prompts = runs.write(tmp_path / "prompts.jsonl", [{"prompt": "the good"}] * 3)
    return replace(
        WISH, model=policy, judge="jaxrlhf.data.words:goodness", max_prompt_tokens=2,
        max_new_tokens=6, n=2, train_rounds=2, min_gap=0.0, train=prompts, eval=prompts,
    )  # fmt: skip


def test_write_pairs_draws_the_same_in_any_batch(wish, tmp_path):
    """Each completion has a key of its own: by its file, its round, and its place in them."""
    made, again = tmp_path / "made", tmp_path / "again"
    with jax.set_mesh(one_device()):
        for folder, batch_size in ((made, 2), (again, 9)):
            folder.mkdir()
            write_pairs(replace(wish, batch_size=batch_size), folder, 0, one_device())
    for file in sorted(path.name for path in made.iterdir()):
        assert (made / file).read_text() == (again / file).read_text()
    scored = {name: (made / f"{name}_scored.jsonl").read_text() for name in ("train", "eval")}
    drawn = [
        json.loads(line)["completion"] for text in scored.values() for line in text.split("\n")[:-1]
    ]
    assert len(set(drawn)) > 0.9 * len(drawn) > 10


def test_write_pairs_refuses_to_write_none(wish, tmp_path):
    (out := tmp_path / "out").mkdir()
    with jax.set_mesh(one_device()), pytest.raises(InputError) as error:
        write_pairs(replace(wish, min_gap=100.0), out, 0, one_device())
    assert str(error.value) == (
        "preferences.train: no pairs: of 12 completions, n=2 a prompt, jaxrlhf.data.words:goodness "
        "scored 12, and no two with words lie min_gap=100 apart: lower min_gap, or raise n"
    )
    assert not list(out.iterdir())
