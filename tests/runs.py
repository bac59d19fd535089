"""Configs of tiny runs, shared by tests: seconds each, a fresh decoder, rewards from functions."""

import json
from dataclasses import replace

from jaxrlhf.config import (
    CheckpointConfig,
    Config,
    CriticConfig,
    DataConfig,
    DecoderConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    RewardConfig,
    RewardModelConfig,
    SampleConfig,
    SFTConfig,
)

WORDS = "good great nice warm bright kind bad poor dull sad cold dark the and"
DECODER = DecoderConfig(
    vocab=16, embed=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=64, context=64
)
GOODNESS = RewardConfig(function="jaxrlhf.demo.words:goodness")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts(folder, count=24):
    words = WORDS.split()
    rows = [{"prompt": f"{words[i % 14]} {words[(3 * i + 1) % 14]} the"} for i in range(count)]
    rows[1]["prompt"] = "the"  # prompts of unequal length
    return write(folder / "prompts.jsonl", rows)


def ppo(folder, **changes):
    config = Config(
        algorithm=PPOConfig(minibatches=2, value_coef=0.5),
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


SEPARATE = CriticConfig(kind="separate", learning_rate=2e-3)
