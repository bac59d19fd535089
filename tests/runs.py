"""Configs of tiny runs, shared by tests: seconds each, a fresh decoder, rewards from functions."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args

import jax
import pytest
from tiny_models import rigged_folder
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from jaxrlhf.config import (
    AlgorithmConfig,
    CheckpointConfig,
    Config,
    CriticConfig,
    DataConfig,
    DecoderConfig,
    EvalConfig,
    GKDConfig,
    MeshConfig,
    ModelConfig,
    OnPolicyConfig,
    OptimConfig,
    PPOConfig,
    ReferenceConfig,
    RewardConfig,
    RewardModelConfig,
    SampleConfig,
    SFTConfig,
)
from jaxrlhf.mesh.checkpoint import load
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.models.tokenizer import load_tokenizer
from jaxrlhf.run.loop import train
from jaxrlhf.run.metrics import lookup
from jaxrlhf.run.session import Session
from jaxrlhf.run.setup import setup

WORDS = "good great nice warm bright kind bad poor dull sad cold dark the and"
DECODER = DecoderConfig(
    vocab=16, embed=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=64, context=64
)
GOODNESS = RewardConfig(function="jaxrlhf.data.words:goodness")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def tags_tokenizer(folder=None):
    """Words are tokens, 16 in all; TAGS are special ones, as are <pad> 0 and <eos> 1."""
    words = ["<pad>", "<eos>", *TAGS, "Paris", "or", "Rome", "good", "bad", "the", "and", *"abc"]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens([AddedToken(x, special=True) for x in ("<pad>", "<eos>", *TAGS)])
    names = {"pad_token": "<pad>", "eos_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    if folder is not None:
        tokenizer.save_pretrained(folder)
    return tokenizer


def count_traces(monkeypatch, module, **static_argnums):
    """The names of the module's jitted functions, one for each time that one is traced from now on.

    The size of a function's cache says less: full, it is neither cleared nor counted right.
    """
    traced = []
    for name, static in static_argnums.items():
        function = getattr(module, name).__wrapped__

        def seen(*args, name=name, function=function, **kwargs):
            traced.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, jax.jit(seen, static_argnums=static))
    return traced


def prompts(folder, count=24):
    words = WORDS.split()
    rows = [{"prompt": f"{words[i % 14]} {words[(3 * i + 1) % 14]} the"} for i in range(count)]
    rows[1]["prompt"] = "the"  # prompts of unequal length
    return write(folder / "prompts.jsonl", rows)


def ppo(folder, **changes):
    algorithm = PPOConfig(minibatches=2, value_coef=0.5)
    if changes.get("critic", CriticConfig()).kind == "separate":
        algorithm = PPOConfig(minibatches=2)
    config = Config(
        algorithm=algorithm,
        model=ModelConfig(decoder=DECODER, tokenizer=f"words:{WORDS}"),
        rewards=(GOODNESS,),
        data=DataConfig(train=prompts(folder), batch_size=8, max_prompt_tokens=4),
        sample=SampleConfig(max_new_tokens=8, n=2),
        optim=OptimConfig(learning_rate=1e-3),
        checkpoint=CheckpointConfig(every=2, keep=2),
        steps=4,
        output=str(folder / "run"),
    )
    return replace(config, **changes)


def reward_model(folder, **changes):
    words = WORDS.split()
    rows = [
        {
            "prompt": words[i % 14],
            "chosen": f"{words[i % 6]} nice",
            "rejected": f"{words[6 + i % 6]}",
        }
        for i in range(32)
    ]
    config = replace(
        ppo(folder),
        algorithm=RewardModelConfig(),
        rewards=(),
        sample=SampleConfig(),
        data=DataConfig(
            train=write(folder / "pairs.jsonl", rows),
            eval=write(folder / "pairs_eval.jsonl", rows[:10]),
            batch_size=8,
            max_tokens=8,
        ),
    )
    return replace(config, **changes)


def sft(folder, **changes):
    rows = [{"prompt": "the", "completion": f"{word} and {word}"} for word in WORDS.split()]
    config = replace(
        reward_model(folder),
        algorithm=SFTConfig(),
        data=DataConfig(train=write(folder / "sft.jsonl", rows), batch_size=8, max_tokens=8),
        eval=EvalConfig(),
    )
    return replace(config, **changes)


def sft_packed(folder, **changes):
    """Three or four rows in each packed row."""
    config = sft(folder)
    return replace(
        config, data=replace(config.data, batch_size=2, max_tokens=20, packing=True), **changes
    )


SEPARATE = CriticConfig(kind="separate", learning_rate=2e-3)


def labelled(folder):
    words = WORDS.split()
    return write(
        folder / "labelled.jsonl",
        [
            {"prompt": words[i % 14], "completion": f"{words[i % 12]} nice", "label": i % 12 < 6}
            for i in range(32)
        ],
    )


def judged(name, folder):
    """Rows of a reward model that does not learn from pairs: good words are better than bad."""
    words = WORDS.split()
    good, bad = words[:6], words[6:12]
    rows = []
    for i in range(32):
        prompt, first, second = words[i % 14], f"{good[i % 6]} nice", f"{good[i % 5]} {bad[i % 6]}"
        answers = [first, second, f"{bad[i % 6]}", f"{bad[i % 5]} sad sad"][: 2 + i % 3]
        rows.append(
            {
                "listwise_reward_model": {
                    "prompt": prompt,
                    "responses": answers,
                    "ranks": [1, 2, 3, 3][: len(answers)],
                },
                "pointwise_reward_model": {
                    "prompt": prompt,
                    "completion": answers[i % 2],
                    "score": 1.0 - i % 2,
                },
                "process_reward_model": {
                    "prompt": prompt,
                    "steps": [f"{first} ", f" {bad[i % 6]} "][: 1 + i % 2],
                    "labels": [True, False][: 1 + i % 2],
                },
            }[name]
        )
    return [write(folder / f"{name}{end}.jsonl", rows) for end in ("", "_eval")]


def teacher(folder):
    """A Llama of another shape that knows the words, and says "nice" more often than others."""
    tokenizer = load_tokenizer(f"words:{WORDS}")
    token = tokenizer.get_vocab()["nice"]
    return rigged_folder(folder / "teacher", tokenizer, DECODER.vocab, token, strength=3)


def gkd(folder, **changes):
    config = ppo(
        folder, algorithm=GKDConfig(), rewards=(), reference=ReferenceConfig(teacher(folder))
    )
    return replace(config, **changes)


def of(name, folder, **changes):
    """A run of the algorithm called ``name``, at its defaults."""
    kind = next(kind for kind in get_args(AlgorithmConfig) if kind.name == name)
    if name == "gkd":
        return gkd(folder, **changes)
    if issubclass(kind, OnPolicyConfig):
        return ppo(folder, **{"algorithm": kind(), **changes})
    config = {"sft": sft}.get(name, reward_model)(folder)
    if name in ("kto", "bco"):
        data = replace(config.data, train=labelled(folder), eval="")
        config = replace(config, data=data, eval=EvalConfig())
    if kind.rows in ("ranked", "scored", "steps"):
        train, held_out = judged(name, folder)
        config = replace(config, data=replace(config.data, train=train, eval=held_out))
    algorithm = kind(separator="the") if name == "process_reward_model" else kind()
    return replace(config, **{"algorithm": algorithm, **changes})


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def trained(config, mesh=None):
    """The run's last states, as host arrays, and its metrics."""
    mesh = mesh or one_device()
    train(config, mesh)
    with jax.set_mesh(mesh):
        states = setup(config, mesh).states
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), states
        )
        step, found, _ = load(Path(config.output) / "checkpoints", abstract)
    assert step == config.steps
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    # Every figure of every run has its line in docs/metrics.md.
    names = {name for record in records for name in record} - {"step"}
    assert [name for name in names if lookup(name) is None] == []
    return jax.device_get(found), records


def rewind(config, step):
    """Make a run that has ended one that was killed after ``step`` iterations were saved."""
    folder = Path(config.output)
    (folder / "summary.json").unlink()
    assert (folder / "checkpoints" / str(step)).is_dir()
    for path in (folder / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > step:
            shutil.rmtree(path)


def interrupt(config, step, check=lambda: None):
    """Train until ``step`` iterations are saved, and no further; ``check`` comes before saves."""
    save = Session.save

    def cut(session, done):
        check()
        save(session, done)
        if done == step:
            session.checkpoints.wait()
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "save", cut)
        with pytest.raises(KeyboardInterrupt):
            train(config, one_device())
