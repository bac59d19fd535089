"""Tunix: its sampler and its SFT, GRPO and PPO, on one CPU device."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clock import Clock, Task, task, tell
from flax import nnx
from transformers import AutoTokenizer
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.models.llama3.params import create_model_from_safe_tensors
from tunix.rl import rl_cluster as cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.ppo.ppo_learner import PPOConfig, PPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

CLOCK = Clock()


def shape(folder: str) -> ModelConfig:
    """The folder's decoder; SmolLM2 is a Llama."""
    c = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return ModelConfig(
        num_layers=c["num_hidden_layers"],
        vocab_size=c["vocab_size"],
        embed_dim=c["hidden_size"],
        hidden_dim=c["intermediate_size"],
        num_heads=c["num_attention_heads"],
        head_dim=c["head_dim"],
        num_kv_heads=c["num_key_value_heads"],
        rope_theta=c.get("rope_theta") or c["rope_parameters"]["rope_theta"],
        norm_eps=c["rms_norm_eps"],
        weight_tying=True,
    )


def slots(given: Task) -> int:
    """Of the cache: Tunix pads prompts to at least 16 tokens."""
    return max(given.prompt, 16) + given.new


def load(folder: str, mesh: jax.sharding.Mesh) -> Llama3:
    return create_model_from_safe_tensors(folder, shape(folder), mesh, jnp.float32)


def read_tokenizer(folder: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Tunix begins each prompt with it, and pads one token more than 64 to 128.
    tokenizer.bos_token = None
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def sample(given: Task, mesh: jax.sharding.Mesh) -> None:
    c = shape(given.folder)
    cache = CacheConfig(slots(given), c.num_layers, c.num_kv_heads, c.head_dim)
    sampler = Sampler(load(given.folder, mesh), read_tokenizer(given.folder), cache)
    for seed in range(given.repeats + 2):
        CLOCK.tick()
        out = sampler(
            given.prompts(),
            max_generation_steps=given.new,
            max_prompt_length=given.prompt,
            temperature=1.0,
            top_p=1.0,
            seed=seed,
        )
        assert all(len(tokens) == given.new for tokens in out.tokens)


def sft(given: Task, mesh: jax.sharding.Mesh) -> None:
    tokenizer = read_tokenizer(given.folder)
    length = given.prompt + given.new
    end = tokenizer.eos_token_id
    rows = np.array([[*tokenizer.encode(text), end] for text in given.prompts()])
    assert rows.shape == (given.rows, length)

    def batches() -> Iterator[TrainingInput]:
        for _ in range(given.steps + 1):
            CLOCK.tick()
            yield TrainingInput(input_tokens=rows, input_mask=np.ones_like(rows))

    def inputs(x: TrainingInput) -> dict[str, Any]:
        causal = jnp.tril(jnp.ones((len(rows), length, length), bool))
        places = jnp.broadcast_to(jnp.arange(length), rows.shape)
        return {
            "input_tokens": x.input_tokens,
            "input_mask": x.input_mask,
            "positions": places,
            "attention_mask": causal,
        }

    # One step in flight, so that a batch is asked for when the last one is learnt.
    settings = TrainingConfig(
        eval_every_n_steps=1000, max_steps=given.steps, max_inflight_computations=1
    )
    trainer = PeftTrainer(load(given.folder, mesh), optax.adamw(1e-6), settings)
    trainer.with_gen_model_input_fn(inputs).train(batches())


class Critic(nnx.Module):
    """A decoder with a scalar head for its projection, called as Tunix calls a critic."""

    def __init__(self, trunk: Llama3, width: int):
        self.trunk = trunk
        self.score = nnx.Linear(width, 1, use_bias=False, rngs=nnx.Rngs(0))

    def __call__(self, tokens: Any, positions: Any, cache: Any, attention_mask: Any, **_: Any):
        x = self.trunk.embedder.encode(tokens)
        for layer in self.trunk.layers:
            _, x = layer(x, positions, None, attention_mask)
        return self.score(self.trunk.final_norm(x))


def learn(given: Task, mesh: jax.sharding.Mesh) -> None:
    is_ppo = given.learns == "ppo"
    prompts = given.prompts()[:: given.n]
    roles = [cluster.Role.ACTOR, cluster.Role.REFERENCE, cluster.Role.ROLLOUT]
    roles += [cluster.Role.CRITIC] * is_ppo
    training = cluster.RLTrainingConfig(
        eval_every_n_steps=1000,
        max_steps=given.steps * given.minibatches,
        actor_optimizer=optax.adamw(1e-6),
        critic_optimizer=optax.adamw(1e-6) if is_ppo else None,
        mini_batch_size=len(prompts) // given.minibatches,
        train_micro_batch_size=len(prompts) // given.minibatches,
        rollout_micro_batch_size=len(prompts),
        compute_logps_micro_batch_size=len(prompts),
    )
    rollout = RolloutConfig(
        max_tokens_to_generate=given.new,
        max_prompt_length=given.prompt,
        kv_cache_size=slots(given),
        temperature=1.0,
        top_p=1.0,
    )
    width = shape(given.folder).embed_dim
    made = cluster.RLCluster(
        actor=load(given.folder, mesh),
        reference=load(given.folder, mesh),
        critic=Critic(load(given.folder, mesh), width) if is_ppo else None,
        tokenizer=read_tokenizer(given.folder),
        cluster_config=cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            training_config=training,
            rollout_config=rollout,
        ),
    )

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return CLOCK.reward(completions)

    if is_ppo:
        learner: Any = PPOLearner(made, PPOConfig(num_iterations=1), reward)
    else:
        learner = GRPOLearner(made, GRPOConfig(num_generations=given.n, beta=0.04), reward)
    learner.train([{"prompts": np.array(prompts)}] * given.steps)
    # PPO asks for the rewards of a minibatch at a time.
    CLOCK.ticks = CLOCK.ticks[:: len(CLOCK.ticks) // given.steps]


def main() -> None:
    given = task()
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    do = {"sampling": sample, "sft": sft}.get(given.subject, learn)
    with jax.set_mesh(mesh):
        do(given, mesh)
    tell(given, CLOCK)


if __name__ == "__main__":
    main()
