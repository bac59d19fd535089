"""One record of what ends a response: the same in a run, in what is made with it, and outside."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import runs
import tiny_models
from transformers import AutoModelForCausalLM, GenerationConfig

from jaxrlhf.apps.generate import complete
from jaxrlhf.apps.others import export
from jaxrlhf.apps.preferences import write_pairs
from jaxrlhf.config import (
    DataConfig,
    EvaluateConfig,
    GRPOConfig,
    ModelConfig,
    PreferencesConfig,
    RewardConfig,
    SampleConfig,
    load,
)
from jaxrlhf.models.ends import read_ends
from jaxrlhf.rewards.functions import Scored
from jaxrlhf.run.setup import setup
from jaxrlhf.study.evaluate import read_entrants

TOKENIZER = tiny_models.byte_level()
EOS, DOT, BREAK = TOKENIZER.convert_tokens_to_ids(["<eos>", ".", "Ċ"])
SIZE = len(TOKENIZER)


def lengths(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


HERE = RewardConfig(function=f"{__name__}:lengths", in_process=True)


def grpo(folder, path, **sample):
    """A run from a model's folder, two steps of four prompts."""
    rows = [{"prompt": text} for text in ("hi", "so", "good", "he is")]
    return replace(
        runs.ppo(folder),
        algorithm=GRPOConfig(),
        model=ModelConfig(path=str(path)),
        rewards=(HERE,),
        data=DataConfig(train=runs.write(folder / "rows.jsonl", rows), batch_size=4),
        sample=SampleConfig(max_new_tokens=8, n=2, **sample),
        steps=2,
        output=str(folder / "run"),
    )


def trained(config):
    runs.train(config, runs.one_device())
    return [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").open()]


def said(folder, name):
    return json.loads((Path(folder) / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("where", ["generation", "config"])
def test_what_the_models_files_name_ends_its_responses(tmp_path, where):
    start = {"eos_token_id": [EOS, DOT], "temperature": 0.6, "top_p": 0.9, "do_sample": True}
    given = {where: start if where == "generation" else {"eos_token_id": start["eos_token_id"]}}
    path = tiny_models.rigged_folder(tmp_path / "model", TOKENIZER, SIZE, always=DOT, **given)
    for metrics in trained(grpo(tmp_path, path)):
        assert (metrics["length"], metrics["ended"]) == (1, 1)
    ((answer,),) = complete(path, ["hi"], SampleConfig(n=1, max_new_tokens=8))
    assert answer.text == "."
    export(path, str(tmp_path / "out"))
    generation = said(tmp_path / "out", "generation_config.json")
    assert generation["eos_token_id"] == [EOS, DOT]
    if where == "generation":
        assert {name: generation[name] for name in start} == start


def test_what_a_run_adds_goes_wherever_its_policy_goes(tmp_path):
    path = tiny_models.rigged_folder(tmp_path / "model", TOKENIZER, SIZE, always=DOT)
    config = grpo(tmp_path, path, stop=(DOT,))
    assert trained(config)[-1]["length"] == 1
    run, out = config.output, str(tmp_path / "out")
    export(run, out)
    stops = {run: (EOS, DOT), out: (EOS, DOT)}
    (tmp_path / "again").mkdir()
    again = grpo(tmp_path / "again", out)
    assert trained(again)[-1]["length"] == 1
    stops[again.output] = (EOS, DOT)
    for place, stop in stops.items():
        assert read_ends(place, TOKENIZER, SIZE).stop == stop
        ((answer,),) = complete(place, ["hi"], SampleConfig(n=1, max_new_tokens=8))
        assert answer.text == "."
        wish = EvaluateConfig(place, data=config.data.train, output=str(tmp_path))
        bench, _ = read_entrants(wish, load_config(place), runs.one_device())
        assert bench.sampling.stop == stop
    assert load(Path(again.output) / "config.yaml").sample.stop == (EOS, DOT)
    # Outside: transformers stops where the run did.
    assert GenerationConfig.from_pretrained(out).eos_token_id == [EOS, DOT]
    assert said(out, "config.json")["eos_token_id"] == [EOS, DOT]
    theirs = AutoModelForCausalLM.from_pretrained(out)
    prompt = TOKENIZER("hi", return_tensors="pt").input_ids
    assert theirs.generate(prompt, max_new_tokens=8)[0, prompt.shape[1] :].tolist() == [DOT]


def load_config(place):
    from jaxrlhf.study.evaluate import config_of  # noqa: PLC0415

    return config_of(place)


def test_preferences_of_a_run_end_as_it_does(tmp_path, monkeypatch):
    path = tiny_models.rigged_folder(tmp_path / "model", TOKENIZER, SIZE, always=DOT)
    config = grpo(tmp_path, path, stop=(DOT,))
    trained(config)
    seen = []

    def judge(asked):
        seen.extend(asked.completions)
        return Scored.of(range(len(asked)))

    monkeypatch.setattr("jaxrlhf.apps.preferences.host_source", lambda _: judge)
    rows = config.data.train
    wish = PreferencesConfig(
        config.output, "x", rows, rows, n=2, max_new_tokens=8, max_prompt_tokens=16, batch_size=4
    )
    write_pairs(wish, tmp_path, 0, runs.one_device())
    assert set(seen) == {"."}


def test_a_string_ends_a_response_wherever_it_is_sampled(tmp_path):
    """'\\n\\n' is two tokens here; the second completes it."""
    path = tiny_models.rigged_folder(tmp_path / "model", TOKENIZER, SIZE, always=BREAK)
    config = grpo(tmp_path, path, stop_strings=("\n\n", "END"))
    for metrics in trained(config):
        assert (metrics["length"], metrics["ended"]) == (2, 1)
    export(config.output, str(tmp_path / "out"))
    assert GenerationConfig.from_pretrained(tmp_path / "out").stop_strings == ["\n\n", "END"]
    for place in (config.output, str(tmp_path / "out")):
        ((answer,),) = complete(place, ["hi"], SampleConfig(n=1, max_new_tokens=8))
        assert answer.text == "\n\n"


def test_ids_that_are_no_tokens_are_never_drawn(tmp_path):
    """The likeliest id by far has a row in the embedding and no text: the rest share the draw."""
    spare = SIZE + 7
    path = tiny_models.rigged_folder(tmp_path / "model", TOKENIZER, SIZE + 20, always=spare)
    config = grpo(tmp_path, path)
    run = setup(config, runs.one_device())
    assert run.config.sample.forbidden == ((SIZE, SIZE + 20),)
    assert run.notes == (f"20 ids of the model are no tokens of its tokenizer, and never drawn: "
                         f"{SIZE} to {SIZE + 19}",)  # fmt: skip
    answers = complete(path, ["hi"], SampleConfig(n=64, max_new_tokens=8))[0]
    assert all(answer.text for answer in answers)
    assert len({answer.text for answer in answers}) > 32
    trained(config)
    rows = [json.loads(line) for line in (Path(config.output) / "samples.jsonl").open()]
    assert all(row["completion"] for row in rows)
