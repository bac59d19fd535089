"""A mixture of experts: by hand, a token at a time, and on meshes with an expert axis."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_decode import stepwise, whole
from test_transformer import TOKEN

from jaxrlhf.config import LoraConfig, MeshConfig, MoeConfig, SampleConfig, check_mesh
from jaxrlhf.core.errors import InputError
from jaxrlhf.mesh.sharding import DECODE, RULES, make_mesh, shardings
from jaxrlhf.models.experts import Experts
from jaxrlhf.models.transformer import Model
from jaxrlhf.run.speed import matrices
from jaxrlhf.steps.sample import sample
from jaxrlhf.steps.score import forward

MESHES = [
    {"expert": 4, "data": 2},
    {"expert": 2, "context": 2, "tensor": 2},
]


GPT_OSS = {"mlp_bias": True, "activation": "clamped", "attention_sinks": True}


@pytest.fixture(scope="module")
def mixture(decoder):
    """With all that a mixture can have, as gpt-oss."""
    return Model(replace(decoder, moe=MoeConfig(experts=8, per_token=3), mlp=16, **GPT_OSS))


@pytest.fixture(scope="module")
def weights(mixture, random_weights):
    return random_weights(mixture.shapes(), 3)


def by_hand(layer, x, decoder):
    """Each token through each expert that it takes, one after the other."""
    kernel = {name: np.asarray(part["kernel"], np.float64) for name, part in layer.items()}
    bias = {name: np.asarray(part.get("bias", np.zeros(99))) for name, part in layer.items()}
    moe, clamped = decoder.moe, decoder.activation == "clamped"
    out = np.zeros_like(x)
    for place in np.ndindex(x.shape[:2]):
        logits = x[place] @ kernel["router"] + bias["router"][: moe.experts]
        chance = np.exp(logits - logits.max())
        chance /= chance.sum()
        taken = np.argsort(-chance)[: moe.per_token]
        share = chance[taken] / (chance[taken].sum() if moe.normalise else 1)
        for expert, part in zip(taken, share, strict=True):
            gate, up = (
                x[place] @ kernel[name][expert] + bias[name][expert] for name in ("gate", "up")
            )
            if clamped:
                gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
                wide = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
            else:
                wide = gate / (1 + np.exp(-gate)) * up
            out[place] += part * (wide @ kernel["down"][expert] + bias["down"][expert])
    return out


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("activation", ["silu", "clamped"])
def test_experts_by_hand(mixture, weights, normalise, activation):
    """Of gpt-oss with numbers that are clamped, and without biases."""
    moe, ours = replace(mixture.decoder.moe, normalise=normalise), activation == "clamped"
    decoder = replace(mixture.decoder, moe=moe, activation=activation, mlp_bias=ours)
    layer = jax.tree.map(lambda x: x[0], weights["layers"]["mlp"])
    if not ours:
        layer = {name: {"kernel": part["kernel"]} for name, part in layer.items()}
    graph, _ = nnx.split(Experts(decoder, nnx.Rngs(0), None))
    x = 4 * np.random.default_rng(0).standard_normal((2, 5, 32)).astype(np.float32)
    assert np.abs(x @ np.asarray(layer["gate"]["kernel"][0])).max() > 7
    found, _ = nnx.merge(graph, layer)(jnp.asarray(x), RULES)
    np.testing.assert_allclose(found, by_hand(layer, x, decoder), rtol=1e-5, atol=2e-5)


def test_a_token_at_a_time_equals_all_at_once(mixture, weights):
    np.testing.assert_allclose(stepwise(mixture, weights), whole(mixture, weights), atol=2e-5)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_meshes_compute_the_same(mixture, weights, sizes):
    """Log-probs and their gradients, what routers say, and the tokens that are drawn."""
    token, mask = jnp.tile(TOKEN, (3, 1))[:8], jnp.ones((8, TOKEN.shape[1]), jnp.int32)
    mask = mask.at[1, :3].set(0)
    config = SampleConfig(max_new_tokens=6)

    def total(params):
        found = forward(mixture, params, token, mask, routers=True)
        return found.logp_BT.sum(), found.routers

    def drawn(params):
        rows = token[:, :6], mask[:, :6]
        return sample(mixture, params, *rows, jax.random.key(0), config).token_BT

    slope = jax.value_and_grad(total, has_aux=True)
    expected = jax.jit(slope)(weights), jax.jit(drawn)(weights)
    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}))
    with jax.set_mesh(mesh):
        placed = jax.device_put(weights, shardings(mixture.axes(), mesh))
        found = jax.jit(slope)(placed), jax.jit(drawn)(placed)
    np.testing.assert_array_equal(found[1], expected[1])

    def close(x, y):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())

    jax.tree.map(close, found[0], expected[0])


def test_a_device_has_its_share_of_the_experts(mixture, weights):
    """E / 4 of them, in decoding too."""
    mesh = make_mesh(MeshConfig(data=2, expert=4))
    placed = jax.device_put(weights, shardings(mixture.axes(), mesh))
    gate = placed["layers"]["mlp"]["gate"]["kernel"]
    assert gate.sharding.shard_shape(gate.shape) == (2, 2, 32, 16)
    assert DECODE["experts"] == "expert"


def test_what_a_mesh_and_adapters_must_fit(mixture):
    with pytest.raises(InputError, match=r"experts=8 % expert=3 is not 0: mesh.expert can be 1$|3"):
        check_mesh(MeshConfig(data=1, expert=3), mixture.decoder, 3, 3)
    with pytest.raises(InputError, match=r"experts=1 % expert=2 is not 0"):
        check_mesh(MeshConfig(data=1, expert=2), replace(mixture.decoder, moe=None), 2, 2)
    adapted = replace(mixture, lora=LoraConfig())
    with pytest.raises(InputError, match=r"model\.lora\.targets: down, gate, up: experts take no"):
        adapted.lora_shapes()
    assert replace(mixture, lora=LoraConfig(targets=("q", "o"))).lora_shapes()


def test_a_token_is_multiplied_by_the_experts_that_it_takes(mixture):
    c = mixture.decoder
    attention = 32 * 8 * (2 * 4 + 2 * 2)
    assert matrices(c, vocab=False) == c.layers * (attention + 32 * (8 + 3 * 3 * 16))


def test_experts_do_not_multiply_again_for_a_gradient(mixture):
    """Where elementwise operations alone are computed twice; with ``dots`` they do."""
    rows = (jax.ShapeDtypeStruct((3, 12), jnp.int32),) * 2

    def loops(remat):
        network = replace(mixture, remat=remat)
        slope = jax.grad(lambda params, *rows: network.apply(params, *rows)[0].sum())
        # over the tiles of each product
        return str(jax.make_jaxpr(slope)(network.shapes(), *rows)).count("while[")

    assert loops("elementwise") == loops("none") < loops("dots")
