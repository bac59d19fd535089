"""What router replay mends in bfloat16: python benchmarks/router_replay.py

Random mixtures draw 16 rows of 64 tokens after prompts of 16, and score them with the routers' own
choice and with the sampler's. Prints, of each model and dtype, how often a token takes other
experts in a layer, and of |log π scored − log π sampled| the mean and the 99 % quantile in nats,
and the share of ratios that are off by over 10 %. A minute of one core.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.config import DecoderConfig, MoeConfig, SampleConfig
from jaxrlhf.core.types import Array, Rollout
from jaxrlhf.models.replay import by_layer, joined
from jaxrlhf.models.transformer import Model
from jaxrlhf.steps.sample import sample
from jaxrlhf.steps.score import score

WIDE = DecoderConfig(
    vocab=1024, embed=256, layers=12, heads=8, kv_heads=4, head_dim=32, mlp=512, qk_norm=True
)
MODELS = {
    "2 of 8 experts, 8 layers": replace(WIDE, layers=8, moe=MoeConfig(8, 2)),
    "8 of 64 experts, 12 layers": replace(WIDE, mlp=128, moe=MoeConfig(64, 8)),
    "no experts, 12 layers": WIDE,
}
DRAW = SampleConfig(max_new_tokens=64, n=2)


def main() -> None:
    for name, decoder in MODELS.items():
        model = Model(decoder)
        params = model.init(jax.random.key(0))
        for dtype in ("float32", "bfloat16"):
            measure(f"{name}, {dtype}", replace(model, dtype=dtype), params)


def measure(name: str, model: Model, params: dict) -> None:
    """One line without replay, and of a mixture one with it."""
    token_QP = jnp.array(np.random.default_rng(0).integers(5, 1024, (8, 16)), jnp.int32)
    config = replace(DRAW, router_replay=model.routes)
    draw = jax.jit(sample, static_argnums=(0, 5))
    rollout = draw(model, params, token_QP, jnp.ones_like(token_QP), jax.random.key(1), config)
    print(f"{name}: {differences(model, params, rollout, None)}")
    if model.routes:
        print(f"  {other_choices(model, params, rollout):.1%} of choices differ")
        print(f"  with replay: {differences(model, params, rollout, rollout.expert_BTM)}")


def differences(model: Model, params: dict, rollout: Rollout, expert_BTM: Array | None) -> str:
    """Of the sampler's log-probs and those that are scored."""
    texts = rollout.token_BT, rollout.attention_mask_BT
    again = jax.jit(score, static_argnums=0)
    gap_BT = again(model, params, *texts, expert_BTM=expert_BTM) - rollout.logp_BT
    gap = np.abs(np.asarray(gap_BT)[np.asarray(rollout.mask_BT) != 0])
    off = (np.abs(np.expm1(gap)) > 0.1).mean()
    return f"mean {gap.mean():.2g}, 99 % {np.quantile(gap, 0.99):.2g} nats; {off:.1%} off by 10 %"


def other_choices(model: Model, params: dict, rollout: Rollout) -> float:
    """Share of (token, layer) in which whole rows take another set of experts."""
    texts = rollout.token_BT, rollout.attention_mask_BT
    kept = jax.jit(lambda: joined(model.apply(params, *texts, keep=True)[1].expert))()
    sets = [np.sort(by_layer(model.decoder, x), axis=-1) for x in (kept, rollout.expert_BTM)]
    return float((sets[0] != sets[1]).any(-1)[:, :, :-1].mean())


if __name__ == "__main__":
    main()
