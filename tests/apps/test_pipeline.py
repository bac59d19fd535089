"""A pipeline from data to evaluation: what its stages name is looked for before the first begins;
what is done is skipped, what has changed refused, and what was killed gone on with."""

import json
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import runs
import yaml
from command import start
from targets import Target, contents, untimed

from jaxrlhf.apps.pipeline import _as_now, check_stages, run_pipeline
from jaxrlhf.config import PipelineConfig, PreferencesConfig, StageConfig, dump, load_pipeline
from jaxrlhf.core import remote
from jaxrlhf.core.errors import InputError
from jaxrlhf.run import copying
from jaxrlhf.run.record import plain
from jaxrlhf.run.session import lock

SHORT = {
    "sft": {"steps": 8, "checkpoint.every": 2},
    "reward_model": {"steps": 6, "checkpoint.every": 2},
    "ppo": {"steps": 4, "checkpoint.every": 1, "eval.n": 1, "algorithm.epochs": 1},
}
"""What makes the stages of the tiny demo short, and save often."""


def short(folder, **changes):
    """The tiny demo's pipeline with short runs, as a file."""
    source = Path("configs/pipelines/demo_tiny.yaml").resolve()
    content = yaml.safe_load(source.read_text())
    for stage in content["stages"]:
        if "train" in stage:
            stage["train"] = str((source.parent / stage["train"]).resolve())
            stage["set"] |= SHORT[stage["name"]] | changes.get(stage["name"], {})
        if "preferences" in stage:
            stage["preferences"] |= {"train_rounds": 1, "eval_rounds": 1}
    path = folder / "short.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def launch(path, out):
    """``jaxrlhf pipeline`` in a process of its own that has one device."""
    flags = [x for x in os.environ["XLA_FLAGS"].split() if "device_count" not in x]
    return start("pipeline", str(path), "--output", str(out), XLA_FLAGS=" ".join(flags))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(pipeline's file, results of an uninterrupted run of it, its folder)."""
    folder = tmp_path_factory.mktemp("pipeline")
    path = short(folder)
    process = launch(path, folder / "out")
    told = process.communicate()[0]
    assert process.returncode == 0, told
    return path, json.loads((folder / "out/summary.json").read_text()), folder / "out"


def test_run_pipeline_hands_on_and_sums_up(done):
    _, results, folder = done
    assert list(results) == ["corpus", "sft", "pairs", "reward_model", "ppo", "evaluation"]
    assert results["pairs"]["train_pairs"] > 100
    assert results["ppo"]["steps"] == 4
    assert 0 <= results["evaluation"]["win_rate"]["gold"] <= 1
    assert (folder / "ppo" / "report.html").exists()
    assert (folder / "ppo" / "diagnosis.json").exists()


def test_run_pipeline_skips_what_is_done(done, capsys, monkeypatch):
    path, results, folder = done
    monkeypatch.setattr("jaxrlhf.apps.pipeline.train", None)
    assert run_pipeline(load_pipeline(path, str(folder))) == results
    assert capsys.readouterr().out.count("done before") == 6


def test_run_pipeline_refuses_a_stage_that_was_made_otherwise(done, tmp_path):
    path, _, folder = done
    with pytest.raises(InputError, match=r"corpus: was made with other settings \(seed\)"):
        run_pipeline(load_pipeline(path, str(folder), seed=1))
    config = load_pipeline(path, str(folder))
    corpus, sft, *others = config.stages
    edited = tmp_path / "sft.yaml"
    text = Path(sft.train).read_text()
    edited.write_text(text)
    moved = replace(sft, train=str(edited))
    run_pipeline(replace(config, stages=(corpus, moved)))  # where the file lies is no matter
    edited.write_text(text.replace("warmup: 10", "warmup: 9"))
    for changed in (moved, replace(sft, set={**sft.set, "steps": 9})):
        with pytest.raises(InputError, match=r"sft: was made with other settings \(run\)"):
            run_pipeline(replace(config, stages=(corpus, changed, *others)))


def test_run_pipeline_refuses_a_stage_whose_input_was_made_again(done, tmp_path):
    path, _, folder = done
    copied = tmp_path / "out"
    subprocess.run(["cp", "-r", str(folder), str(copied)], check=True)
    for record in [*copied.glob("*/stage.json"), *copied.glob("*/config.yaml")]:
        record.write_text(record.read_text().replace(str(folder), str(copied)))
    (copied / "corpus" / "stage.json").unlink()
    with pytest.raises(InputError, match=r"sft: was made with other inputs \(corpus\)"):
        run_pipeline(load_pipeline(path, str(copied)))


def test_run_pipeline_finds_a_slip_in_the_last_stage_before_the_first(tmp_path):
    slips = {
        "minibatches=7 is not 0": {"algorithm.minibatches": 7},
        "stage ppo: .*no.jsonl: no such file": {"data.eval": "no.jsonl"},
    }
    for message, slip in slips.items():
        with pytest.raises(InputError, match=message):
            run_pipeline(load_pipeline(short(tmp_path, ppo=slip), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_run_pipeline_takes_one_at_a_time(done):
    path, _, folder = done
    with lock(folder), pytest.raises(InputError, match="another run writes there"):
        run_pipeline(load_pipeline(path, str(folder)))


def test_run_pipeline_ends_with_a_status_when_a_run_is_stopped(tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise SystemExit(0)

    monkeypatch.setattr("jaxrlhf.apps.pipeline.train", stopped)
    config = load_pipeline(short(tmp_path), str(tmp_path / "out"))
    with pytest.raises(SystemExit) as end:
        run_pipeline(config)
    assert end.value.code == 143
    assert "result" not in json.loads((tmp_path / "out/sft/stage.json").read_text())


def one_run(folder, **changes):
    """A pipeline of one run, with the fields of its ``data`` that change."""
    run = runs.sft(folder, steps=1)
    (folder / "sft.yaml").write_text(dump(replace(run, data=replace(run.data, **changes))))
    stage = StageConfig("a", train=str(folder / "sft.yaml"))
    return PipelineConfig((stage,), output=str(folder / "out"))


def test_run_pipeline_takes_other_settings_where_nothing_was_made(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    with pytest.raises(InputError, match=r"bad\.jsonl:1"):
        run_pipeline(one_run(tmp_path, train=str(bad)))
    (tmp_path / "out/a/config.yaml").write_text("of a run that did not get far")
    config = one_run(tmp_path)
    results = run_pipeline(config, runs.one_device())
    assert list(results) == ["a"]
    assert json.loads((tmp_path / "out/summary.json").read_text()) == plain(results)
    with pytest.raises(InputError, match=r"a: was made with other settings \(run\)"):
        run_pipeline(replace(config, seed=1))


@pytest.mark.parametrize("made", ["checkpoints/2/state", "text"])
def test_run_pipeline_keeps_what_an_interrupted_stage_has_made(made, tmp_path):
    config = make_only(tmp_path, text="a") if made == "text" else one_run(tmp_path)
    file = tmp_path / "out/a" / made
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    before = {"settings": {"name": "a", "run": {}} if made != "text" else {"name": "a"}}
    (tmp_path / "out/a/stage.json").write_text(json.dumps(before))
    with pytest.raises(InputError, match="a: was made with other settings"):
        run_pipeline(config)


@pytest.mark.parametrize("text", ['{"settings"', "[]", "{}"])
def test_run_pipeline_refuses_a_torn_record(text, tmp_path):
    (tmp_path / "out/a").mkdir(parents=True)
    (tmp_path / "out/a/stage.json").write_text(text)
    with pytest.raises(InputError, match=r"a/stage\.json: no.*: remove this folder and those"):
        run_pipeline(make_only(tmp_path, text="a"))


def letters(folder, seed, text, times=1):
    """What a stage of the next test makes."""
    (folder / "text").write_text(f"{text * times} {seed}")


def make_only(folder, **options):
    content = {"stages": [{"name": "a", "make": "test_pipeline:letters", "set": options}]}
    path = folder / "make.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_pipeline(path, str(folder / "out"), seed=3)


def test_run_pipeline_calls_a_function_with_its_arguments(tmp_path):
    run_pipeline(make_only(tmp_path, text="ab", times=2))
    assert (tmp_path / "out/a/text").read_text() == "abab 3"
    with pytest.raises(InputError, match=r"a: was made with other settings \(set\)"):
        run_pipeline(make_only(tmp_path, text="ab", times=3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "a.set: test_pipeline:letters: missing a required argument: 'text': mend the names"),
        ({"text": "a", "time": 2}, "got an unexpected keyword argument 'time'"),
    ],
)
def test_run_pipeline_refuses_arguments_before_the_first_stage(options, message, tmp_path):
    with pytest.raises(InputError) as error:
        run_pipeline(make_only(tmp_path, **options))
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def stages(tmp_path):
    """SFT, pairs from it, a reward model, PPO, and an evaluation: all that they name is there."""
    out = tmp_path / "out"
    ppo = runs.ppo(tmp_path)
    made = {"sft": runs.sft(tmp_path), "rm": runs.reward_model(tmp_path), "ppo": ppo}
    for name, run in made.items():
        (tmp_path / f"{name}.yaml").write_text(dump(run))
    wish = PreferencesConfig(
        model=str(out / "sft"),
        judge="jaxrlhf.data.words:goodness",
        train=ppo.data.train,
        eval=ppo.data.train,
        max_prompt_tokens=4,
        max_new_tokens=60,
    )
    model = {"model": {"path": str(out / "sft")}}
    pairs = {"data.train": str(out / "pairs/train.jsonl"), "data.eval": ""}
    rewards = {"rewards": [{"model": str(out / "rm")}]}
    file = {name: str(tmp_path / f"{name}.yaml") for name in made}
    return {
        "sft": StageConfig("sft", train=file["sft"]),
        "pairs": StageConfig("pairs", preferences=wish),
        "rm": StageConfig("rm", train=file["rm"], set=model | pairs),
        "ppo": StageConfig("ppo", train=file["ppo"], set=model | rewards),
        "evaluation": StageConfig("evaluation", evaluate=str(out / "ppo"), set={"n": 2}),
    }


def look(stages, folder, done=()):
    check_stages(PipelineConfig(tuple(stages.values()), output=str(folder / "out")), done)


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("sft", {"data.train": "no.jsonl"}, "stage sft: no.jsonl: no such file"),
        ("sft", {"data.eval": "no.jsonl"}, "stage sft: no.jsonl: no such file"),
        ("sft", {"model": {"path": "no"}}, "stage sft: model.path='no': no such folder"),
        ("pairs", {"judge": "jaxrlhf.data.words:no"}, "stage pairs: reward function"),
        ("pairs", {"train": "no.jsonl"}, "stage pairs: no.jsonl: no such file"),
        ("pairs", {"eval": "no.jsonl"}, "stage pairs: no.jsonl: no such file"),
        ("pairs", {"model": "no"}, "stage pairs: model.path='no': no such folder"),
        ("pairs", {"max_new_tokens": 61}, "= 65 tokens exceed the context of"),
        ("rm", {"data.max_tokens": 65}, "stage rm: data.max_tokens = 65 tokens exceed"),
        ("rm", {"algorithm.normalise_on": "no.jsonl"}, "stage rm: no.jsonl: no such file"),
        ("ppo", {"rewards": [{"function": "no:no"}]}, "stage ppo: reward function 'no:no'"),
        ("ppo", {"rewards": [{"model": "no"}]}, "stage ppo: no: no reward model"),
        ("ppo", {"reference.path": "no"}, "stage ppo: model.path='no': no such folder"),
        ("evaluation", {"data": "no.jsonl"}, "stage evaluation: no.jsonl: no such file"),
        ("evaluation", {"reward": "no:no"}, "stage evaluation: reward function 'no:no'"),
        ("evaluation", {"against": "no"}, "stage evaluation: model.path='no': no such folder"),
    ],
)
def test_check_stages_refuses(stage, changes, message, stages, tmp_path):
    old = stages[stage]
    if old.preferences:
        stages[stage] = replace(old, preferences=replace(old.preferences, **changes))
    else:
        stages[stage] = replace(old, set=old.set | changes)
    with pytest.raises(InputError) as error:
        look(stages, tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_check_stages_of_which_some_are_done(stages, tmp_path):
    """One to come is trusted; one that is done needs its files no more, but what it has made."""
    look(stages, tmp_path)
    (tmp_path / "sft.jsonl").unlink()
    with pytest.raises(InputError, match=r"stage sft: .*no such file"):
        look(stages, tmp_path)
    (tmp_path / "out/sft").mkdir(parents=True)
    (tmp_path / "out/sft/config.yaml").write_text((tmp_path / "sft.yaml").read_text())
    look(stages, tmp_path, ["sft"])
    with pytest.raises(InputError, match=r"stage rm: .*train\.jsonl: no such file"):
        look(stages, tmp_path, ["sft", "pairs"])


@pytest.mark.slow
def test_run_pipeline_killed_in_every_stage_comes_to_the_same(done, tmp_path):
    path, wanted, folder = done
    out = tmp_path / "out"
    target = Target("pipeline", lambda out: ["pipeline", str(path), "--output", str(out)])
    saved = {"sft": "2", "reward_model": "2", "ppo": "1"}
    for stage in wanted:
        sign = out / stage / "checkpoints" / saved[stage] if stage in saved else out / stage
        [process] = target.launch(out)
        deadline = time.monotonic() + 200
        while process.exitcode is None and not sign.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert sign.exists(), stage
        process.kill()
        process.join()
    [process] = target.launch(out)
    process.join(200)
    told = Path(f"{out}.log").read_text(encoding="utf-8")
    assert process.exitcode == 0, told
    assert "done before" in told
    assert told.count("resumed after iteration") == len(saved)
    # Other tests carry out a part of it in the same folder, and sum up that.
    summed_up = json.dumps([untimed(wanted)]).replace(str(folder), "OUT")
    expected = contents(folder) | {"summary.json": json.loads(summed_up)}
    found = contents(out)
    assert len(expected) > 15
    for name in expected | found:
        assert found[name] == expected[name], name


def test_records_of_older_versions_are_read_in_todays_words():
    now = {"run": {"algorithm": {"name": "rloo", "kl_coef": 0.1}, "steps": 3}, "make": "a:b"}
    old = {
        "run": {"algorithm": {"name": "rloo", "kl_coef": 0.1, "epochs": 1}, "steps": 3},
        "make": "jaxrlhf.demo.words:write_corpus",
    }
    new = {**now, "make": "jaxrlhf.data.words:write_corpus"}
    assert _as_now(old, new) == new
    other = {**old, "run": {**old["run"], "more": 1}}
    assert _as_now(other, new) != new  # only an algorithm's settings have gone
    assert _as_now({"set": {"a": 1, "b": 2}}, {"set": {"a": 1}}) != {"set": {"a": 1}}
    assert _as_now({"rows": [1, 2]}, {"rows": [1]}) == {"rows": [1, 2]}


def rows_of_words(folder, seed):
    """What the first stage of the next test makes."""
    rows = [{"prompt": "the", "completion": f"{word} and {word}"} for word in runs.WORDS.split()]
    runs.write(folder / "rows.jsonl", rows)


def test_run_pipeline_by_url_goes_on_on_another_machine(tmp_path, monkeypatch, capsys):
    """Stages find each other's work by URL; the second machine does what the first has not done."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    monkeypatch.setattr(copying, "PAUSE", 1000.0)
    monkeypatch.setattr(remote, "_here", {})
    (tmp_path / "sft.yaml").write_text(dump(runs.sft(tmp_path, steps=1)))
    run = {"train": "sft.yaml", "set": {"data.train": "{rows}/rows.jsonl"}}
    start = {"model": {"path": "{first}"}}
    stages = [
        {"name": "rows", "make": "test_pipeline:rows_of_words"},
        {"name": "first", **run},
        {"name": "second", "train": "sft.yaml", "set": {**run["set"], **start}},
    ]
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"stages": stages}))
    results = []
    for machine, count in (("one", 2), ("two", 3)):
        monkeypatch.setenv("HOME", str(tmp_path / machine))
        config = load_pipeline(path, "memory://bucket/out")
        config = replace(config, stages=config.stages[:count])
        results.append(run_pipeline(config, runs.one_device()))
    told = capsys.readouterr().out
    assert told.count("done before") == 2
    assert list(results[1]) == ["rows", "first", "second"]
    assert results[1]["first"] == plain(results[0]["first"])
    assert json.loads(store.cat_file("/bucket/out/summary.json")) == plain(results[1])
    there = {name.removeprefix("/bucket/out/") for name in store.find("/bucket/out")}
    assert {"rows/rows.jsonl", "first/stage.json", "second/checkpoints/1.whole"} <= there
    assert not any(name.endswith("lease.json") for name in there)
    inputs = json.loads(store.cat_file("/bucket/out/second/stage.json"))["inputs"]
    assert set(inputs) == {"rows", "first"}
    with pytest.raises(InputError, match=r"memory://bucket/out/rows: was made with other settings"):
        run_pipeline(replace(config, seed=1))
    store.store.clear()
