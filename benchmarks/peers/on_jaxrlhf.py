"""jaxrlhf itself, through its own run loop; sampling by ``rl.sample``."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from clock import Clock, Task, task, tell

import jaxrlhf as rl
from jaxrlhf.config import (
    CheckpointConfig,
    Config,
    CriticConfig,
    DataConfig,
    GRPOConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    RewardConfig,
    SampleConfig,
    SFTConfig,
)
from jaxrlhf.run.loop import train

CLOCK = Clock()


def reward(prompts: list[str], completions: list[str]) -> list[float]:
    """The run's reward."""
    return CLOCK.reward(completions)


def sample(given: Task) -> None:
    model, params, tokenizer = rl.load_model(given.folder)
    prompt_QP = jnp.array([tokenizer.encode(text) for text in given.prompts()], jnp.int32)
    settings = SampleConfig(max_new_tokens=given.new, n=1)
    call = jax.jit(rl.sample, static_argnums=(0, 5))
    for seed in range(given.repeats + 2):
        CLOCK.tick()
        rollout = call(model, params, prompt_QP, prompt_QP * 0 + 1, jax.random.key(seed), settings)
        jax.block_until_ready(rollout)
    assert int(rollout.mask_BT.sum()) == given.rows * given.new


def config_of(given: Task, folder: Path) -> Config:
    """The run, with what the others do: AdamW, one epoch, no schedule."""
    texts = given.prompts()[:: given.n]
    rows = [{"prompt": text} for text in texts]
    algorithm = {
        "sft": SFTConfig(),
        "grpo": GRPOConfig(minibatches=given.minibatches, epochs=1),
        "ppo": PPOConfig(minibatches=given.minibatches, epochs=1),
    }[given.learns]
    data = DataConfig(batch_size=len(texts), max_prompt_tokens=given.prompt)
    config = Config(
        algorithm=algorithm,
        model=ModelConfig(path=given.folder),
        critic=CriticConfig(kind="separate" if given.learns == "ppo" else "shared"),
        # Where the others call theirs; a worker would import all of this file.
        rewards=(RewardConfig(function="on_jaxrlhf:reward", in_process=True),),
        sample=SampleConfig(max_new_tokens=given.new, n=given.n),
        optim=OptimConfig(learning_rate=1e-6),
        checkpoint=CheckpointConfig(every=0),
        steps=given.steps,
        output=str(folder / "run"),
    )
    if given.learns == "sft":
        data = replace(data, max_tokens=given.prompt + given.new)
        rows = [{"text": text} for text in given.prompts()]
        config = replace(config, rewards=(), sample=SampleConfig())
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return replace(config, data=replace(data, train=str(path)))


def main() -> None:
    given = task()
    if given.subject == "sampling":
        sample(given)
        tell(given, CLOCK)
        return
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(given, Path(folder))
        if given.learns != "sft":
            train(config)
            tell(given, CLOCK)
            return
        train(config, feed=lambda phase: CLOCK.tick())
        # It is called three times before the first step, then after each, and at the end.
        CLOCK.ticks = CLOCK.ticks[2 : 2 + given.steps]
        tell(given, CLOCK)


if __name__ == "__main__":
    import on_jaxrlhf  # by the name that the config gives, so that there is one clock

    on_jaxrlhf.main()
