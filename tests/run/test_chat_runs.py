"""Chats by SmolLM2's own template, from file to batch: only the assistant's tokens are trained."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import runs

from jaxrlhf.config import (
    DataConfig,
    DecoderConfig,
    DPOConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    PPOConfig,
    RewardConfig,
    RewardModelConfig,
    SampleConfig,
    SFTConfig,
)
from jaxrlhf.core.shown import asked
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.run import loop
from jaxrlhf.run.feed import batches, example

DECODER = DecoderConfig(
    vocab=49152, embed=8, layers=1, heads=2, kv_heads=1, head_dim=4, mlp=8, context=96
)
QUESTIONS = ["Is it cold?", "And now?"]
GOOD, BAD = ["Yes, it is.", "No longer."], ["Who knows?", "I cannot say."]
END = "<|im_end|>"


def turns(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


CHAT = turns(QUESTIONS[0], GOOD[0], QUESTIONS[1])
ANSWERS = [[{"role": "assistant", "content": text}] for text in (GOOD[1], BAD[1])]
PAIR = {"prompt": CHAT, "chosen": ANSWERS[0], "rejected": ANSWERS[1]}


def long_answers(prompts, completions, **columns):
    """Of messages: what is asked last, and the answer to it."""
    assert all(prompt[-1]["content"] in QUESTIONS for prompt in prompts)
    return [float(len(answer[0]["content"])) for answer in completions]


def config_of(kind, folder, rows, **changes):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(
        runs.sft(folder),
        algorithm=kind,
        model=ModelConfig(decoder=DECODER, tokenizer="smollm2"),
        data=DataConfig(train=str(path), batch_size=2, max_tokens=96, max_prompt_tokens=80),
        eval=EvalConfig(),
        steps=1,
    )
    return replace(config, **changes)


def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def prepared(config):
    with jax.set_mesh(mesh()):
        return loop.setup(config, mesh(), abstract=True)


def stretches(tokenizer, token_T, weight_T):
    """The texts of a row that have weight, each up to where weight ends."""
    at = np.flatnonzero(weight_T)
    cuts = np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)
    return [tokenizer.decode(token_T[cut]) for cut in cuts]


def learning(config):
    """A step of the run with every gradient finite."""
    summary = loop.train(config, mesh())
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["skipped"] == 0
    return summary


@pytest.mark.parametrize(
    ("train_on", "packing"), [("assistant", False), ("assistant", True), ("completion", False)]
)
def test_sft_on_chats_trains_on_answers_alone(train_on, packing, tmp_path):
    rows = [{"messages": CHAT + ANSWERS[0]}, {"prompt": CHAT[:1], "completion": ANSWERS[1]}]
    config = config_of(SFTConfig(train_on=train_on), tmp_path, rows)
    if packing:
        data = replace(config.data, packing=True, batch_size=1, max_tokens=180)
        config = replace(
            config, data=data, model=replace(config.model, decoder=replace(DECODER, context=180))
        )
    run = prepared(config)
    batch = batches(run)(0)
    found = [
        stretches(run.tokenizer, token, weight)
        for token, weight in zip(batch.token_BT, batch.weight_BT, strict=True)
    ]
    first = [GOOD[0] + END, GOOD[1] + END] if train_on == "assistant" else [GOOD[1] + END]
    if packing:
        assert sorted(text for texts in found for text in texts) == sorted([*first, BAD[1] + END])
        assert batch.segment_BT.max() == 2
    else:
        assert sorted(found) == sorted([first, [BAD[1] + END]])
    if train_on == "assistant":
        learning(config)


@pytest.mark.parametrize("kind", [RewardModelConfig(), DPOConfig()], ids=lambda kind: kind.name)
def test_pairs_of_chats_train_on_answers_alone(kind, tmp_path):
    config = config_of(kind, tmp_path, [PAIR, PAIR])
    run = prepared(config)
    batch = batches(run)(0)
    for row in range(2):
        for c, text in enumerate((GOOD[1], BAD[1])):
            token, mask = batch.token_BCT[row, c], batch.mask_BCT[row, c]
            assert stretches(run.tokenizer, token, mask) == [text + END]
            real = batch.attention_mask_BCT[row, c] != 0
            assert run.tokenizer.decode(token[real]).endswith(f"assistant\n{text}{END}")
    learning(config)


def test_ppo_on_chats_learns_from_responses_alone(tmp_path):
    """Its prompts end with the assistant's header, and nothing before the response has weight."""
    config = config_of(
        PPOConfig(),
        tmp_path,
        [{"prompt": CHAT}, {"prompt": CHAT[:1]}],
        rewards=(RewardConfig("test_chat_runs:long_answers", in_process=True),),
        sample=SampleConfig(max_new_tokens=4, n=2),
    )
    seen = []
    with jax.set_mesh(mesh()):
        run = loop.setup(config, mesh())
        assert {
            row.source.text.endswith("<|im_start|>assistant\n") for row in run.train_rows.items
        } == {True}
        targets = run.programs.targets

        def heard(*given):
            seen.append(targets(*given))
            return seen[-1]

        run = replace(run, programs=replace(run.programs, targets=heard))
        session = loop.Session(run)
        session.host["kl_coef"] = 0.05
        _, metrics, rollout, judgement = loop.iterate(run, session, 0)
        samples = loop.shown(run, rollout, judgement)
    batch = seen[0][0]
    mask = np.asarray(batch.weight_BT) != 0
    np.testing.assert_array_equal(mask, np.asarray(rollout.mask_BT) != 0)
    assert not mask[:, : config.data.max_prompt_tokens].any()
    assert mask[:, config.data.max_prompt_tokens].all()
    assert metrics["skipped"] == 0
    # The template begins with a system prompt; people see what was asked last.
    assert all(sample["prompt"].startswith("system\n") for sample in samples)
    assert {asked(sample) for sample in samples} == set(QUESTIONS[::-1])
    texts = [len(sample["completion"]) for sample in samples]
    np.testing.assert_array_equal(np.asarray(judgement.reward_B), texts)


def test_train_shows_and_writes_an_example(tmp_path, capsys):
    config = config_of(SFTConfig(train_on="assistant"), tmp_path, [{"messages": CHAT + ANSWERS[0]}])
    learning(config)
    text = (Path(config.output) / "example.txt").read_text()
    assert text == example(prepared(config)) + "\n"
    for answer in GOOD:
        assert f"<|im_start|>assistant\n⟦{answer}{END}⟧\n" in text + "\n"
    assert text.count("⟦") == 2
    out = capsys.readouterr().out
    assert "an example, what is trained on between ⟦ and ⟧:\n" in out
    assert f"\n  ⟦{GOOD[1]}{END}⟧\n" in out
