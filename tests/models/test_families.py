"""Each family computes what transformers and torch do, decodes as it reads, comes back as it was.

A small random model of each is written by transformers, read, and compared: log-probs under padding
on both sides, the gradient of a loss, a token at a time against all at once, and what is exported.
"""

import copy
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from jaxrlhf.config import Config, DataConfig, ModelConfig, SampleConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.models import names
from jaxrlhf.models.cache import empty_cache, slots_of
from jaxrlhf.models.decode import lay_out, read_prompts, step
from jaxrlhf.models.families import FAMILIES
from jaxrlhf.models.hf import read_hf, write_hf
from jaxrlhf.models.hf_config import as_written, naming_of, read_config
from jaxrlhf.models.load import build, check_context
from jaxrlhf.models.transformer import Model
from jaxrlhf.steps.score import score

VOCAB, ROWS, LENGTH, WINDOW = 48, 3, 24, 6
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 64,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 16}
NEAR = {"rope_type": "default", "rope_theta": 50.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0]}
FULL, NEAR_KIND = "full_attention", "sliding_attention"
GEMMA4 = {
    "num_hidden_layers": 7,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_key_value_heads": 4,
    "num_global_key_value_heads": 2,
    "sliding_window": WINDOW,
    "layer_types": [*[NEAR_KIND, NEAR_KIND, FULL] * 2, FULL],
    "rope_parameters": {
        "full_attention": {
            "rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1000.0,
        },
        "sliding_attention": NEAR,
    },
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 5.0,
}  # fmt: skip
"""Its layers repeat, and then there is one that does not."""
CASES = {
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama yarn": ("llama", {"rope_parameters": {**YARN, "beta_fast": 8.0, "truncate": False}}),
    "llama linear": ("llama", {"rope_parameters": {**NEAR, "rope_type": "linear", "factor": 4.0}}),
    "llama dynamic": (
        "llama",
        {"rope_parameters": {**NEAR, "rope_type": "dynamic", "factor": 4.0}},
    ),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "ministral": (
        "ministral",
        {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.2,
            "logits_scaling": 0.25,
        },
    ),
    "qwen2 window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3 yarn": ("qwen3", {"head_dim": 16, "rope_parameters": {**YARN, "attention_factor": 1.2}}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
                "sliding_attention": NEAR,
            },
        },
    ),
    "gemma4": ("gemma4_text", {**GEMMA4, "attention_k_eq_v": True}),
    "gemma4 values": ("gemma4_text", {**GEMMA4, "final_logit_softcapping": None}),
    "gemma4 shared": (
        "gemma4_text",
        {
            **GEMMA4,
            "num_hidden_layers": 9,
            "layer_types": [*[NEAR_KIND, NEAR_KIND, FULL] * 3],
            "hidden_size_per_layer_input": 12,
            "vocab_size_per_layer_input": VOCAB,
            "num_kv_shared_layers": 4,
            "use_double_wide_mlp": True,
        },
    ),
    "gemma4 experts": (
        "gemma4_text",
        {
            **GEMMA4,
            "attention_k_eq_v": True,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
        },
    ),
    "gemma4 folder": (
        "gemma4",
        {
            "text_config": {
                **SHAPE,
                **GEMMA4,
                "attention_k_eq_v": True,
                "model_type": "gemma4_text",
                "pad_token_id": 0,
            }
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo3": (
        "olmo3",
        {
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {"full_attention": YARN, "sliding_attention": NEAR},
        },
    ),
    "phi3": ("phi3", {"pad_token_id": 0}),
    "phi4 mini": (
        "phi3",
        {
            "pad_token_id": 0,
            "original_max_position_embeddings": 64,
            "max_position_embeddings": 256,
            "partial_rotary_factor": 0.5,
            "tie_word_embeddings": True,
            "rope_scaling": LONG,
        },
    ),
    "glm4": ("glm4", {"pad_token_id": 0, "head_dim": 8, "attention_bias": True}),
    "cohere2": (
        "cohere2",
        {
            "sliding_window": WINDOW,
            "logit_scale": 0.5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "pythia": ("gpt_neox", {}),
    "neox serial": ("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 0.5}),
    "mixtral": (
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    ),
    "qwen3 moe": (
        "qwen3_moe",
        {
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
    "olmoe": ("olmoe", {"num_experts": 8, "num_experts_per_tok": 3}),
    "gpt oss": (
        "gpt_oss",
        {
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
    "stablelm parallel": ("stablelm", {"use_parallel_residual": True}),
    "starcoder2": ("starcoder2", {"sliding_window": WINDOW}),
}
"""Name → (model_type, what its config says beside ``SHAPE``)."""

TOKEN = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH))
MASKS = {
    "left": (np.arange(LENGTH) >= np.array([[0], [5], [16]])).astype(np.int32),
    "right": (np.arange(LENGTH) < np.array([[24], [19], [8]])).astype(np.int32),
}


def theirs(family, own):
    """transformers' own model, of random weights: norms and biases too, which start at 1 and 0."""
    shape = {key: x for key, x in SHAPE.items() if family != "gpt2" or "_token_id" in key}
    shape["vocab_size"] = VOCAB
    if "text_config" in own:
        shape = {"vision_config": None, "audio_config": None}
    if family == "gpt_neox":
        shape.pop("num_key_value_heads")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**shape, **own})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    for name, number in model.named_buffers():
        if name.endswith("layer_scalar"):
            torch.nn.init.uniform_(number, 0.7, 1.3)
    return model


def torch_logp(model, mask_BT):
    """log π of each real token but a row's first, [·], with its gradient."""
    token, mask = torch.tensor(TOKEN), torch.tensor(mask_BT)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(token, attention_mask=mask, position_ids=position).logits
    logp = torch.log_softmax(logits[:, :-1], -1).gather(-1, token[:, 1:, None])[..., 0]
    return logp[(mask[:, 1:] * mask[:, :-1]) != 0]


def our_logp(decoder, params, mask_BT):
    logp_BT = score(Model(decoder), params, jnp.array(TOKEN), jnp.array(mask_BT))
    return logp_BT[:, 1:][(mask_BT[:, 1:] * mask_BT[:, :-1]) != 0]


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A family's model by torch, the folder it was written to, and what was read there."""
    model, folder = theirs(*CASES[request.param]), tmp_path_factory.mktemp("family")
    model.save_pretrained(folder)
    decoder, params = read_hf(folder)
    return model, folder, decoder, jax.tree.map(jnp.asarray, params)


def test_every_family_has_a_case():
    plain = {"llama", "gemma"}  # in test_hf.py, with qwen2 and qwen3
    assert {family for family, _ in CASES.values()} | plain == set(FAMILIES)


def test_log_probs_equal_torch(case):
    model, _, decoder, params = case
    for mask_BT in MASKS.values():
        ours = np.asarray(our_logp(decoder, params, mask_BT))
        expected = torch_logp(model, mask_BT).detach().numpy()
        assert np.ptp(expected) > 1  # not a comparison of constants
        np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_gradient_equals_torch(case, tmp_path):
    """Of Σ logp, each tensor as files have it, to a thousandth of its largest number."""
    model, _, decoder, params = case
    mask_BT, model = MASKS["left"], copy.deepcopy(model)
    model.get_input_embeddings().padding_idx = None  # else that row would have no gradient
    torch_logp(model, mask_BT).sum().backward()
    for weight in model.parameters():
        weight.data = weight.grad
    for name, number in model.named_buffers():
        if name.endswith("layer_scalar"):
            number.zero_()  # nothing trains it
    model.save_pretrained(tmp_path)  # under the names of files
    slopes = load_file(tmp_path / "model.safetensors")
    found = jax.jit(jax.grad(lambda params: our_logp(decoder, params, mask_BT).sum()))(params)
    naming, leaves = naming_of(decoder), names.flatten(decoder, found)
    tensors = names.tensors(decoder, naming)
    assert {tensor.name for tensor in tensors} == set(slopes)
    for tensor in tensors:
        expected = slopes[tensor.name]
        ours = names.stored(decoder, naming, leaves, tensor)
        np.testing.assert_allclose(ours, expected, atol=1e-3 * np.abs(expected).max())


def test_a_token_at_a_time_equals_all_at_once(case):
    """With prompts longer than the window, and more new tokens than its ring has slots."""
    *_, decoder, params = case
    model, width = Model(decoder), 8
    token, mask = jnp.array(TOKEN), jnp.array(MASKS["left"]).at[2].set(1).at[2, :6].set(0)
    expected, _ = model.apply(params, token, mask)
    weights = lay_out(model, params)
    hidden, prompts = read_prompts(model, params, token[:, :width], mask[:, :width])
    cache = empty_cache(decoder, "float32", ROWS, LENGTH - width)
    rings = {layer[0].x.shape[2] for layer in cache}
    assert rings <= {slots_of(WINDOW), slots_of(LENGTH - width)}
    run = jax.jit(lambda cache, token, at: step(model, weights, prompts, cache, token, at))
    found = [hidden]
    for at in range(LENGTH - width):
        hidden, cache, _ = run(cache, token[:, width + at], jnp.array(at))
        found.append(hidden)
    np.testing.assert_allclose(jnp.stack(found, 1), expected[:, width - 1 :], atol=2e-5)


def test_export_is_what_was_read(case, tmp_path, tiny_tokenizer):
    """transformers computes the same with it, and it reads back to the last bit."""
    model, _, decoder, params = case
    write_hf(tmp_path / "out", decoder, params, tiny_tokenizer)
    again, back = read_hf(tmp_path / "out")
    assert (again, again.family) == (decoder, as_written(decoder).family)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected, found = (torch_logp(x, MASKS["left"]).detach() for x in (model, loaded))
    np.testing.assert_array_equal(found, expected)


def test_longrope_has_other_factors_for_long_rows(tmp_path):
    """transformers takes them once a row is longer than the first context; so says ``context``."""
    family, own = CASES["phi4 mini"]
    model = theirs(family, {**own, "original_max_position_embeddings": 16})
    model.save_pretrained(tmp_path)
    decoder, params = read_hf(tmp_path)
    assert decoder.context == 16
    expected = torch_logp(model, MASKS["right"]).detach().numpy()
    short = our_logp(decoder, params, MASKS["right"])
    most = round(16 * decoder.rope_scaling.factor)
    config = ModelConfig(str(tmp_path), context=most)
    run = Config(model=config, data=DataConfig(max_prompt_tokens=8), sample=SampleConfig(9))
    check_context(run, build(config))
    with pytest.raises(InputError, match=f"17 tokens exceed .* 16: lower them, or .* to {most}"):
        check_context(run, build(ModelConfig(str(tmp_path))))
    with pytest.raises(InputError, match=f"model.context={most + 1}: the model's is {most} at mos"):
        build(replace(config, context=most + 1))
    long = our_logp(build(config).decoder, params, MASKS["right"])
    np.testing.assert_allclose(long, expected, atol=1e-4)
    assert np.abs(short - expected).max() > 0.1


def test_a_family_with_a_window_says_so(tmp_path):
    """What a config leaves out is what transformers takes: Mistral 7B's first had a window."""
    config = theirs("mistral", {"sliding_window": WINDOW}).config.to_dict()
    config |= {"architectures": ["MistralForCausalLM"]}
    del config["sliding_window"]
    (tmp_path / "config.json").write_text(json.dumps(config, default=str), encoding="utf-8")
    assert read_config(tmp_path / "config.json").windows == (4096,)
