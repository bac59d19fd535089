"""Tasks of reasoning-gym as rows: what is written is read, asked and checked."""

import json

import pytest

from jaxrlhf.apps import cli
from jaxrlhf.core.errors import InputError
from jaxrlhf.data.rows import read_rows, write_rows
from jaxrlhf.data.tasks import task_rows, write_task_files
from jaxrlhf.rewards.verifiers import make, verify

pytest.importorskip("reasoning_gym")


def test_rows_that_are_written_are_checked_as_they_were(tmp_path):
    for task in ("chain_sum", "letter_counting", "rearc"):  # the last has tuples in its metadata
        rows = task_rows(task, 4, completion=" {answer}")
        write_rows(tmp_path / "tasks.jsonl", rows)
        read = [row.values for row in read_rows(str(tmp_path / "tasks.jsonl")).items]
        columns = {name: [row[name] for row in read] for name in read[0]}
        assert verify(make("reasoning_gym"), columns["completion"], columns) == [1.0] * 4
        assert max(verify(make("reasoning_gym"), ["none"] * 4, columns)) < 0.1


def test_task_rows_follow_from_the_seed():
    assert task_rows("chain_sum", 3) == task_rows("chain_sum", 3) == task_rows("chain_sum", 5)[:3]
    assert task_rows("chain_sum", 3) != task_rows("chain_sum", 3, seed=1)


def test_task_rows_options_and_templates():
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    rows = task_rows("chain_sum", 2, 0, options, "Q: {question}\nA:", " {answer}")
    for row in rows:
        assert row["prompt"] == f"Q: {row['question']}\nA:"
        assert row["completion"] == f" {row['answer']}"
        assert len(row["metadata"]["expression"]) == len("1 + 2")
    (row,) = task_rows("chain_sum", 1, chat=True)
    assert row["prompt"] == [{"role": "user", "content": row["question"]}]
    assert "completion" not in row
    (row,) = task_rows("graph_color", 1)
    assert row["answer"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chain_sums", 1), "task=chain_sums: .*did you mean chain_sum"),
        (("chain_sum", 1, 0, {"terms": 1}), "task=chain_sum, options={'terms': 1}: "),
        (("chain_sum", 1, 0, {"min_terms": 0}), "task=chain_sum, options={'min_terms': 0}: "),
        (("chain_sum", 1, 0, {}, "Q"), r"prompt='Q': {question} must stand in it"),
        (("chain_sum", 1, 0, {}, "{question}", "A"), r"completion='A': {answer} must stand"),
        (("graph_color", 1, 0, {}, "{question}", "{answer}"), "graph_color gives no answers"),
    ],
)
def test_task_rows_bad_input(arguments, message):
    with pytest.raises(InputError, match=message):
        task_rows(*arguments)


def test_tasks_command(tmp_path, capsys):
    out = tmp_path / "tasks.jsonl"
    words = ["tasks", "chain_sum", str(out), "--size", "2", "--option", "max_terms=2"]
    assert cli.main(words) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == task_rows("chain_sum", 2, options={"max_terms": 2})
    assert cli.main([*words[:-1], "max_terms"]) == 2
    assert "--option max_terms: give name=value" in capsys.readouterr().err
    for value in ("[", "\x00"):
        assert cli.main([*words[:-1], f"max_terms={value}"]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: --option 'max_terms=")
        assert "the value is not YAML: " in err
        assert err.count("\n") == 1
    assert cli.main(["tasks", "chain_sum", str(tmp_path / "no" / "tasks.jsonl")]) == 2
    assert "cannot be written" in capsys.readouterr().err


SMALL = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
"""Two hundred different sums, so that a draw has some of them twice."""


def test_write_task_files_holds_questions_out(tmp_path):
    write_task_files(tmp_path, 0, "chain_sum", 300, 40, 20, SMALL, completion=" {answer}")
    rows = {
        name: [row.values for row in read_rows(str(tmp_path / f"{name}.jsonl")).items]
        for name in ("prompts", "held_out", "warm_start")
    }
    asked = {name: [row["prompt"] for row in part] for name, part in rows.items()}
    assert len(asked["held_out"]) == len(set(asked["held_out"])) == 40
    assert not set(asked["held_out"]) & set(asked["prompts"])
    assert len(set(asked["prompts"])) < len(asked["prompts"]) < 300
    assert asked["warm_start"] == asked["prompts"][:20]
    pairs = zip(rows["warm_start"], rows["prompts"], strict=False)
    for imitated, row in pairs:
        assert imitated == {"prompt": row["prompt"], "completion": f" {row['answer']}"}
    assert "completion" not in rows["prompts"][0]
    columns = {name: [row[name] for row in rows["held_out"]] for name in rows["held_out"][0]}
    assert verify(make("reasoning_gym"), columns["answer"], columns) == [1.0] * 40


def test_write_task_files_without_a_warm_start(tmp_path):
    write_task_files(tmp_path, 0, "graph_color", 2, 1)  # it has no answer to imitate
    assert sorted(p.name for p in tmp_path.iterdir()) == ["held_out.jsonl", "prompts.jsonl"]


def test_write_task_files_too_few_questions(tmp_path):
    with pytest.raises(InputError, match=r"held_out=250: chain_sum gave 1\d\d different questions"):
        write_task_files(tmp_path, 0, "chain_sum", 100, 250, 0, SMALL)
    with pytest.raises(InputError, match=r"leaves \d+ rows to learn from"):
        write_task_files(tmp_path, 0, "chain_sum", 20, 5, 30, SMALL)
    assert not list(tmp_path.iterdir())
