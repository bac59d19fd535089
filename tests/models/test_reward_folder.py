"""Reward models of Hugging Face, …ForSequenceClassification, against transformers and torch."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_hf import FAMILIES, FEATURES
from transformers import AutoModelForSequenceClassification

from jaxrlhf.core.errors import InputError
from jaxrlhf.models.hf import read_hf, write_hf
from jaxrlhf.models.transformer import Model
from jaxrlhf.steps.score import reward

BIAS = 0.75


@pytest.fixture(scope="module")
def rows():
    """Random tokens, of which the last 0, 5 and 30 of 40 are padding, 0."""
    token_BT = np.random.default_rng(0).integers(1, 48, (3, 40))
    mask_BT = (np.arange(40) < np.array([[40], [35], [10]])).astype(np.int32)
    return token_BT * mask_BT, mask_BT


def torch_scores(model, rows):
    token_BT, mask_BT = (torch.tensor(x) for x in rows)
    with torch.no_grad():
        return model(token_BT, attention_mask=mask_BT).logits.numpy()[:, 0]


def our_scores(decoder, params, rows):
    return np.asarray(reward(Model(decoder=decoder), params, *map(jnp.asarray, rows)))


def assert_agree(ours_B, theirs_B):
    assert np.ptp(theirs_B) > 0.1  # not a comparison of zeros
    np.testing.assert_allclose(ours_B, theirs_B, atol=1e-4)


@pytest.fixture
def with_head(random_params):
    def make(decoder):
        kernel = np.random.default_rng(1).standard_normal(decoder.embed, np.float32)
        return random_params(decoder) | {"head": {"kernel": kernel, "bias": np.float32(BIAS)}}

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_read_reward_model_scores_equal_torch(tmp_path, rows, family):
    torch.manual_seed(0)
    config = FAMILIES[family].__class__(
        **FAMILIES[family].to_dict() | {"num_labels": 1, "pad_token_id": 0}
    )
    model = AutoModelForSequenceClassification.from_config(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(tmp_path)
    decoder, params = read_hf(tmp_path, head=True)
    assert params["head"]["bias"] == 0
    assert "unembed" not in params
    assert_agree(our_scores(decoder, params, rows), torch_scores(model, rows))


@pytest.mark.parametrize("features", FEATURES)
def test_write_reward_model_is_loaded_by_transformers(
    tmp_path, tiny, with_head, tiny_tokenizer, rows, features
):
    decoder = replace(tiny, **FEATURES[features])
    params = with_head(decoder)
    write_hf(tmp_path / "out", decoder, params, tiny_tokenizer, head=True)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_agree(our_scores(decoder, params, rows), torch_scores(model, rows) + BIAS)
    read_decoder, again = read_hf(tmp_path / "out", head=True)
    assert read_decoder == replace(decoder, tied=True)
    params = {name: part for name, part in params.items() if name != "unembed"}
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_write_reward_model_padding_is_not_its_end(tmp_path, tiny, with_head, tiny_tokenizer):
    """transformers looks for the padding's id in front of which a score is read."""
    write_hf(tmp_path / "a", tiny, with_head(tiny), tiny_tokenizer, head=True)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["pad_token_id"] == 0
    tiny_tokenizer.pad_token = tiny_tokenizer.eos_token
    try:
        write_hf(tmp_path / "b", tiny, with_head(tiny), tiny_tokenizer, head=True)
    finally:
        tiny_tokenizer.pad_token = tiny_tokenizer.decode([0])
    assert "pad_token_id" not in json.loads((tmp_path / "b" / "config.json").read_text())


def test_write_reward_model_needs_a_head(tmp_path, tiny, random_params, tiny_tokenizer):
    with pytest.raises(InputError, match="head is missing"):
        write_hf(tmp_path / "out", tiny, random_params(tiny), tiny_tokenizer, head=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["LlamaForCausalLM"]},
            "architectures='LlamaForCausalLM'; give a …ForSeq",
        ),
        ({"score_bias": "1"}, "score_bias='1'; it must be a number"),
        ({"score_bias": True}, "score_bias=True; it must be a number"),
        ({"hidden_size": 64, "head_dim": 8}, "implies"),
    ],
)
def test_read_reward_model_refuses(tmp_path, tiny, with_head, tiny_tokenizer, change, message):
    write_hf(tmp_path / "out", tiny, with_head(tiny), tiny_tokenizer, head=True)
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError) as caught:
        read_hf(tmp_path / "out", head=True)
    assert message in str(caught.value)


def test_read_reward_model_refuses_two_labels(tmp_path):
    config = FAMILIES["llama tied"].__class__(
        **FAMILIES["llama tied"].to_dict() | {"num_labels": 2}
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"score\.weight has shape \[2, 32\].* implies \[1, 32\]"):
        read_hf(tmp_path, head=True)
