"""The names' tree is the model's, and kernels become the matrices of files and come back."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from jaxrlhf.config import MoeConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.models import names
from jaxrlhf.models.families import FAMILIES
from jaxrlhf.models.source import Source, weight_reader
from jaxrlhf.models.transformer import Model

NAMING = FAMILIES["llama"].naming


def tree_of(decoder, naming, find):
    return Source(decoder, weight_reader(decoder, naming, find), lambda _: "float32").tree()


@pytest.mark.parametrize(
    "features", [{}, {"tied": False}, {"qkv_bias": True}, {"qk_norm": True, "tied": False}]
)
def test_weights_are_those_of_the_model(tiny, random_params, features):
    decoder = replace(tiny, **features)
    have = jax.tree.map(lambda x: (x.shape, x.dtype), random_params(decoder))
    want = jax.tree.map(lambda x: (x.shape, x.dtype), Model(decoder=decoder).shapes())
    assert have == want


def test_a_kernel_computes_what_the_stored_matrix_does(tiny):
    rng = np.random.default_rng(0)
    stored = {}

    def read(tensor):
        x = rng.standard_normal(tensor.shape).astype(np.float32)
        return stored.setdefault(tensor.name, x)

    attention = tree_of(tiny, NAMING, read)["layers"]["attention"]
    x_D = rng.standard_normal(tiny.embed)  # float64: no processor rounds much
    for layer in range(tiny.layers):
        query_NH = np.einsum("D,DNH->NH", x_D, attention["q"]["kernel"][layer])
        flat = stored[f"model.layers.{layer}.self_attn.q_proj.weight"] @ x_D
        np.testing.assert_allclose(query_NH.reshape(-1), flat, rtol=1e-9, atol=1e-9)
        out_D = np.einsum("NH,NHD->D", query_NH, attention["o"]["kernel"][layer])
        flat = stored[f"model.layers.{layer}.self_attn.o_proj.weight"] @ query_NH.reshape(-1)
        np.testing.assert_allclose(out_D, flat, rtol=1e-9, atol=1e-9)


def test_stored_is_the_inverse_of_reading(tiny, random_params):
    for family in ("llama", "phi3", "glm4", "gpt_neox", "gpt2"):
        every = {"qkv_bias": True, "o_bias": True}
        every |= {"gated": False, "mlp_bias": True} if family.startswith("gpt") else {}
        decoder = replace(tiny, tied=False, kv_heads=4, **every)
        decoder = replace(decoder, norms="both" if family == "glm4" else "before", rotary_dim=4)
        _goes_round(replace(decoder, family=family), random_params)


def test_stored_is_the_inverse_of_reading_experts_that_are_one_tensor(tiny, random_params):
    """Each [in, out], gate and up in turns, their biases too."""
    moe, how = MoeConfig(experts=4, per_token=2), {"family": "gpt_oss", "tied": False}
    decoder = replace(tiny, moe=moe, mlp_bias=True, attention_sinks=True, **how)
    leaves, stored = _goes_round(decoder, random_params)
    shapes = {t.name: t.shape for t in names.tensors(decoder, FAMILIES["gpt_oss"].naming)}
    prefix, gate = "model.layers.1.mlp.experts.gate_up_proj", leaves["layers/mlp/gate/kernel"]
    assert shapes[prefix] == (4, decoder.embed, 2 * decoder.mlp)
    np.testing.assert_array_equal(stored[prefix][3, :, 6], gate[1, 3, :, 3])
    bias = leaves["layers/mlp/up/bias"]
    np.testing.assert_array_equal(stored[f"{prefix}_bias"][2, 7], bias[1, 2, 3])
    assert shapes["model.layers.0.self_attn.sinks"] == (decoder.heads,)


def _goes_round(decoder, random_params):
    """Leaves, and what files have of them by name, which reads back to the same."""
    naming, params = FAMILIES[decoder.family].naming, random_params(decoder)
    leaves = names.flatten(decoder, params)
    stored = partial(names.stored, decoder, naming, leaves)
    again = tree_of(decoder, naming, stored)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    return leaves, {tensor.name: stored(tensor) for tensor in names.tensors(decoder, naming)}


def test_flatten_names_the_first_difference(tiny, random_params):
    params = random_params(tiny)
    with pytest.raises(InputError, match=r"unembed/kernel is missing.*\(32, 48\)"):
        names.flatten(replace(tiny, tied=False), params)
    with pytest.raises(InputError, match=r"head/kernel is \(32,\).*no such weight"):
        names.flatten(tiny, {**params, "head": {"kernel": np.zeros(32)}})
    with pytest.raises(InputError, match=r"embed/table is \(48, 32\).*\(50, 32\)"):
        names.flatten(replace(tiny, vocab=50), params)
