"""What `eval` is asked to measure, and the stages of a pipeline: read, and refused."""

from pathlib import Path

import pytest

from jaxrlhf.config import (
    EvaluateConfig,
    check,
    check_evaluate,
    load_pipeline,
    parse_evaluate,
    stage_evaluation,
    stage_run,
)
from jaxrlhf.core.errors import InputError

SFT = """
algorithm: {name: sft}
model: {path: smollm2}
data: {train: nowhere.jsonl, max_tokens: 16}
steps: 3
output: elsewhere
"""

PREFERENCES = "{model: a, judge: b, train: c, eval: d, max_prompt_tokens: 1, max_new_tokens: 1}"


def written(folder, stages, more=""):
    (folder / "sft.yaml").write_text(SFT)
    path = folder / "pipeline.yaml"
    path.write_text(f"output: out\n{more}stages:\n{stages}")
    return path


TWO = """
  - {name: words, make: "jaxrlhf.data.words:write_corpus"}
  - name: sft
    train: sft.yaml
    set: {data.train: "{words}/sft.jsonl", optim.warmup: 2}
"""


def test_load_pipeline_hands_on_the_folders_of_earlier_stages(tmp_path):
    config = load_pipeline(written(tmp_path, TWO))
    assert config.stages[1].set["data.train"] == "out/words/sft.jsonl"
    assert config.stages[1].train == str(tmp_path / "sft.yaml")
    config = load_pipeline(written(tmp_path, TWO), output="other", seed=3)
    assert (config.output, config.seed) == ("other", 3)
    assert config.stages[1].set["data.train"] == "other/words/sft.jsonl"


def test_load_pipeline_hands_on_folders_to_a_function(tmp_path):
    stages = """
  - {name: a, make: "x:y"}
  - {name: b, make: "x:y", set: {source: "{a}/rows.jsonl", options: {size: 3}, n: [1, "{a}"]}}
"""
    config = load_pipeline(written(tmp_path, stages))
    expected = {"source": "out/a/rows.jsonl", "options": {"size": 3}, "n": [1, "out/a"]}
    assert config.stages[1].set == expected


def test_stage_run_changes_the_fields_of_the_file(tmp_path):
    stage = load_pipeline(written(tmp_path, TWO)).stages[1]
    run = stage_run(stage, "there", 5)
    assert run.data.train == "out/words/sft.jsonl"
    assert run.data.max_tokens == 16
    assert (run.optim.warmup, run.steps, run.output, run.seed) == (2, 3, "there", 5)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("  []", "stages: empty"),
        ("  - {name: a}", "stages.0: a: give one of make, preferences, train, evaluate, not none"),
        ("  - {name: a, make: x, train: y}", "not make and train"),
        ("  - {name: a b, make: x}", "stages.0.name='a b': letters"),
        ("  - {name: a, make: x}\n  - {name: a, make: x}", "stages.1.name=a: an earlier stage"),
        ("  - {name: a, make: x, set: {y: '{b}'}}", "no earlier stage is called b"),
        (f"  - {{name: a, preferences: {PREFERENCES}, set: {{y: 1}}}}", "set: a stage with pref"),
        (
            "  - {name: a, train: x, set: {y: '{b}'}}",
            "no earlier stage is called b (earlier: none)",
        ),
        ("  - {name: a, train: x, set: {y: '{'}}", "write {{ for a brace"),
        *(
            (
                f"  - {{name: a, make: x}}\n  - {{name: b, make: x, set: {{y: '{text}'}}}}",
                "all that can",
            )
            for text in ("{a:>2000000000}", "{a.__class__}", "{a[0]}", "{a!r}", "{}", "{0}")
        ),
        ("  - {name: a, train: x, set: {output: y}}", "set: output: the pipeline's own"),
        ("  - {name: a, evaluate: x, set: {model: y}}", "set: model: the pipeline's own"),
        (
            f"  - {{name: a, preferences: {PREFERENCES[:-1]}, n: 1}}}}",
            "stages.0.preferences.n=1: must be at least 2",
        ),
        (
            f"  - {{name: a, preferences: {PREFERENCES[:-1]}, batch_size: 0}}}}",
            "stages.0.preferences.batch_size=0: must be at least 1",
        ),
        (
            f"  - {{name: a, preferences: {PREFERENCES[:-1]}, train_rounds: 0}}}}",
            "stages.0.preferences.train_rounds=0: must be at least 1",
        ),
        ("  - {name: a, trian: x}", "stages.0.trian: unknown key (did you mean train?)"),
    ],
)
def test_load_pipeline_refuses(stages, message, tmp_path):
    with pytest.raises(InputError) as error:
        load_pipeline(written(tmp_path, stages))
    assert message in str(error.value)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_load_pipeline_refuses_a_seed_out_of_range(seed, tmp_path):
    with pytest.raises(InputError, match=f"seed={seed}: give 0 or more"):
        load_pipeline(written(tmp_path, TWO), seed=seed)


def test_stage_run_names_the_stage_of_a_bad_field(tmp_path):
    stages = "  - {name: sft, train: sft.yaml, set: {optim.learning_rat: 1}}"
    stage = load_pipeline(written(tmp_path, stages)).stages[0]
    with pytest.raises(InputError, match=r"with stage sft: optim\.learning_rat: unknown key"):
        stage_run(stage, "x", 0)
    stages = "  - {name: sft, train: sft.yaml, set: {steps.learning_rate: 1}}"
    stage = load_pipeline(written(tmp_path, stages)).stages[0]
    with pytest.raises(InputError, match=r"sft\.set: steps\.learning_rate: steps is no section"):
        stage_run(stage, "x", 0)


def test_stage_run_refuses_a_file_that_is_a_list(tmp_path):
    stage = load_pipeline(written(tmp_path, TWO)).stages[1]
    (tmp_path / "sft.yaml").write_text("- a\n- b\n")
    with pytest.raises(InputError, match=r"sft\.yaml: should be keys with values"):
        stage_run(stage, "x", 0)


def test_stage_evaluation_takes_the_options_of_eval(tmp_path):
    stages = "  - {name: judge, evaluate: smollm2, set: {n: 4, best_of: 16}}"
    stage = load_pipeline(written(tmp_path, stages)).stages[0]
    wish = stage_evaluation(stage, "there", 5)
    assert (wish.model, wish.n, wish.best_of) == ("smollm2", 4, 16)
    assert (wish.output, wish.seed) == ("there", 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [("{m: 4}", "stage judge: m: unknown key"), ("{n: 0}", "n=0: must be at least 1")],
)
def test_stage_evaluation_refuses(options, message, tmp_path):
    stages = f"  - {{name: judge, evaluate: smollm2, set: {options}}}"
    stage = load_pipeline(written(tmp_path, stages)).stages[0]
    with pytest.raises(InputError, match=message):
        stage_evaluation(stage, "there", 5)


@pytest.mark.parametrize("path", sorted(Path("configs/pipelines").glob("*.yaml")), ids=str)
def test_pipelines_of_the_project_can_be_started(path):
    config = load_pipeline(path)
    for stage in config.stages:
        if stage.train:
            check(stage_run(stage, "x", 0))
    header = path.read_text(encoding="utf-8").split("output:")[0]
    for word in ("# Launch:", "# Takes:", "Expect", "jaxrlhf pipeline"):
        assert word in header


def test_parse_evaluate():
    words = ["runs/a", "--best-of", "0", "--correct-at", "0.5", "--reward", "sentiment"]
    expected = EvaluateConfig("runs/a", best_of=0, correct_at=0.5, reward="sentiment")
    assert parse_evaluate(words) == expected
    with pytest.raises(SystemExit):
        parse_evaluate([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "n=0: must be at least 1"),
        ({"best_of": -1}, "best_of=-1: must be at least 0"),
        ({"fsdp": 0}, "fsdp=0: must be at least 1"),
        ({"seed": -1}, "seed=-1: must be at least 0"),
        ({"seed": 10**20}, "seed=100000000000000000000: must be below 4294967296"),
        ({"correct_at": float("nan")}, "correct_at=nan: must be a finite number"),
        ({"correct_at": float("inf")}, "correct_at=inf: must be a finite number"),
        ({"reward": "a", "reward_model": "b"}, "both given"),
    ],
)
def test_check_evaluate_refuses(change, message):
    with pytest.raises(InputError, match=message):
        check_evaluate(EvaluateConfig("runs/a", **change))
