"""What the tiny demo learns from: the words that its measures pay for, and the files made of them
and of sums."""

from jaxrlhf.data.rows import read_rows
from jaxrlhf.data.tasks import write_sums
from jaxrlhf.data.words import BAD, STEP_END, goodness, hackable, write_corpus


def test_goodness_is_the_balance_of_words_and_hackable_pays_most_for_and():
    assert goodness([""] * 3, ["good bad nice the", "", "poor"]) == [0.25, 0.0, -1.0]
    texts = ["good good", "and and and", "good and bad the", ""]
    assert hackable([""] * 4, texts) == [1.0, 1.5, 0.375, 0.0]


def test_write_corpus_is_the_same_for_a_seed(tmp_path):
    texts = []
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        (tmp_path / name).mkdir()
        write_corpus(tmp_path / name, seed)
        texts.append((tmp_path / name / "sft.jsonl").read_text())
    assert texts[0] == texts[1] != texts[2]


def test_write_corpus_labels_steps_without_bad_words(tmp_path):
    write_corpus(tmp_path, 0)
    for row in read_rows(str(tmp_path / "steps.jsonl")).items:
        steps = row.values["steps"]
        good = [not set(step.split()) & set(BAD) for step in steps]
        assert good == row.values["labels"]
        assert STEP_END not in " ".join(steps)


def test_write_sums_labels_until_the_first_mistake(tmp_path):
    write_sums(tmp_path, 0, rows=50)
    wrong = 0
    for row in read_rows(str(tmp_path / "steps.jsonl")).items:
        sums = [step.split(" = ") for step in row.values["steps"]]
        right = [sum(map(int, left.split(" + "))) == int(total) for left, total in sums]
        assert row.values["labels"] == [all(right[: i + 1]) for i in range(len(right))]
        wrong += not all(right)
    assert 10 < wrong < 40
