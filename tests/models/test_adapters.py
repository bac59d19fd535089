"""Adapters of the package peft come in and go out, and compute what peft and torch do with them;
and what others say."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from jaxrlhf.apps import cli
from jaxrlhf.config import LoraConfig, MeshConfig, ModelConfig, RewardConfig
from jaxrlhf.config.model import MoeConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.models.adapters import (
    ADAPTER,
    WEIGHTS,
    Adapter,
    _maps,
    _targets,
    read_adapter,
    read_lora,
    write_adapter,
)
from jaxrlhf.models.hf import write_hf
from jaxrlhf.models.load import Loader, load_model, settle_lora
from jaxrlhf.models.tokenizer import load_tokenizer
from jaxrlhf.models.transformer import Model
from jaxrlhf.run import loop
from jaxrlhf.run.setup import setup
from jaxrlhf.steps.score import reward

MESH = make_mesh(MeshConfig(), jax.devices()[:1])
TOKEN_BT = np.random.default_rng(0).integers(2, 16, (2, 7))
ONES_BT = np.ones_like(TOKEN_BT)


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft", reason="the extra test")


@pytest.fixture(scope="module")
def base(tmp_path_factory, random_params, tiny):
    out = tmp_path_factory.mktemp("base") / "tiny"
    decoder = replace(tiny, vocab=16)
    write_hf(out, decoder, random_params(decoder), load_tokenizer(f"words:{runs.WORDS}"))
    return str(out)


def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor(TOKEN_BT), attention_mask=torch.tensor(ONES_BT)).logits.numpy()


def ours(network):
    """Logits, or scores, of a network with its adapters beside its weights."""
    model, params, lora = network.model, network.params, network.lora
    if "head" in params:
        return np.asarray(reward(model, params, TOKEN_BT, ONES_BT, lora))[:, None]
    hidden_BTD, _ = model.apply(params, jnp.asarray(TOKEN_BT), jnp.asarray(ONES_BT), lora)
    return np.asarray(model.logits(params, hidden_BTD))


SETTINGS = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "rs": {"target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "up_proj", "down_proj"],
        "rank_pattern": {"up_proj": 5, r"layers\.1\.self_attn\.q_proj": 2},
        "alpha_pattern": {"down_proj": 3},
    },
    "dora": {"target_modules": ["q_proj", "o_proj", "down_proj"], "use_dora": True},
    "some layers": {"target_modules": ["o_proj"], "layers_to_transform": [1]},
}


def made_by_peft(peft, base, out, auto=AutoModelForCausalLM, **settings):
    """An adapter that peft has made, all of its numbers random; what it computes with it."""
    torch.manual_seed(0)
    given = (
        {"num_labels": 1, "pad_token_id": 0} if auto is AutoModelForSequenceClassification else {}
    )
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 6, **settings})
    model = peft.get_peft_model(auto.from_pretrained(base, **given), config)
    for name, weight in model.named_parameters():
        if "lora_magnitude" in name:
            weight.data *= 1 + 0.3 * torch.rand_like(weight)
        elif "lora_" in name or "score" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(out)
    return logits_of(model.eval())


@pytest.mark.parametrize("settings", SETTINGS)
def test_an_adapter_of_peft_computes_as_there(peft, base, tmp_path, settings):
    theirs = made_by_peft(peft, base, tmp_path, **SETTINGS[settings])
    network = Loader(MESH).trained(str(tmp_path))
    plain = ours(replace(network, lora=None))
    assert np.abs(plain - theirs).max() > 1
    np.testing.assert_allclose(ours(network), theirs, atol=1e-4)
    model, params, _ = load_model(str(tmp_path), MESH)
    np.testing.assert_allclose(ours(replace(network, params=params, lora=None)), theirs, atol=1e-4)
    assert network.model.lora == read_lora(str(tmp_path), model.decoder)


def test_a_reward_model_of_peft(peft, base, tmp_path):
    """The base has logits, the adapter a score: rewards and critic share the policy's weights."""
    theirs = made_by_peft(
        peft, base, tmp_path / "rm", AutoModelForSequenceClassification,
        task_type="SEQ_CLS", target_modules=["q_proj", "up_proj"],
    )  # fmt: skip
    folder = str(tmp_path / "rm")
    network = Loader(MESH).trained(folder)
    np.testing.assert_allclose(ours(network), theirs, atol=1e-4)
    lora = LoraConfig(rank=2, alpha=4)
    config = runs.ppo(
        tmp_path, model=ModelConfig(base, lora=lora), rewards=(RewardConfig(model=folder),),
        critic=replace(runs.SEPARATE, path=folder), steps=1,
    )  # fmt: skip
    described = setup(config, MESH, abstract=True)
    with jax.set_mesh(MESH):
        run = setup(config, MESH)
    member = run.judge.scorers[0].members[0].network
    everywhere = (run.frozen["policy"], run.frozen["critic"], run.reference.params, member.params)
    bodies = [jax.tree.leaves({k: x for k, x in p.items() if k != "head"}) for p in everywhere]
    assert all(len({id(x) for x in leaf}) == 1 for leaf in zip(*bodies, strict=True))
    assert run.states["critic"].params["lora"].keys() == network.lora.keys()
    shapes, arrays = (
        jax.tree.map(lambda x: (x.shape, x.dtype), (found.states, found.frozen))
        for found in (described, run)
    )
    assert shapes == arrays


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_run_goes_on_with_an_adapter_and_gives_it_back(peft, base, tmp_path, capsys, dora):
    made_by_peft(
        peft, base, tmp_path / "start",
        target_modules=["q_proj"], use_rslora=True, use_dora=dora,
    )  # fmt: skip
    start = str(tmp_path / "start")
    config = runs.sft(tmp_path, steps=1, model=ModelConfig(lora=LoraConfig(path=start)))
    loop.train(config, MESH)
    network = Loader(MESH).trained(config.output)
    assert network.model.lora == LoraConfig(3, 6.0, ("q",), True, start, dora)
    first = read_adapter(start, network.model.decoder).layers["attention"]["q"]
    moved = np.abs(first["lora_b"] - network.lora["attention"]["q"]["lora_b"]).max()
    assert 0 < moved < 0.01
    out = str(tmp_path / "out")
    assert cli.main(["export", config.output, out, "--adapter"]) == 0
    assert f"{out}: adapters of {base}" in capsys.readouterr().out
    there = AutoModelForCausalLM.from_pretrained(base)
    theirs = logits_of(peft.PeftModel.from_pretrained(there, out).eval())
    np.testing.assert_allclose(ours(network), theirs, atol=1e-4)
    again = read_adapter(out, network.model.decoder)
    jax.tree.map(np.testing.assert_array_equal, again.layers, network.lora)
    merged = str(tmp_path / "merged")
    assert cli.main(["export", out, merged]) == 0
    theirs = logits_of(AutoModelForCausalLM.from_pretrained(merged))
    np.testing.assert_allclose(ours(network), theirs, atol=1e-4)


def test_dora_learns_as_in_peft(peft, base, tmp_path):
    """The gradients of A, B and magnitudes are torch's, which takes the norm for a constant."""
    settings = {"target_modules": ["v_proj", "down_proj"], "use_dora": True}
    made_by_peft(peft, base, tmp_path, **settings)
    there = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path, is_trainable=True
    )
    torch.sin(there(torch.tensor(TOKEN_BT)).logits).sum().backward()
    network = Loader(MESH).trained(str(tmp_path))

    def total(lora):
        hidden_BTD, _ = network.model.apply(
            network.params, jnp.asarray(TOKEN_BT), jnp.asarray(ONES_BT), lora
        )
        return jnp.sin(network.model.logits(network.params, hidden_BTD)).sum()

    slopes = jax.jit(jax.grad(total))(network.lora)
    assert network.model.lora.targets == ("v", "down")
    for name, weight in there.named_parameters():
        if weight.grad is None:
            continue
        part, layer = ("mlp", "down") if "down" in name else ("attention", "v")
        leaf = next(x for x in ("lora_A", "lora_B", "lora_magnitude") if x in name).lower()
        found = np.asarray(slopes[part][layer][leaf])[int(name.split("layers.")[1][0])]
        expected = weight.grad.numpy().T.reshape(found.shape)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_dora_that_leaves_out_layers_is_refused(peft, base, tmp_path):
    made_by_peft(peft, base, tmp_path, target_modules=["o_proj"], use_dora=True,
                 layers_to_transform=[1])  # fmt: skip
    with pytest.raises(InputError, match="DoRA of o in 1 of 2 layers: the magnitudes"):
        load_model(str(tmp_path), MESH)


def test_a_reward_model_goes_to_peft(peft, base, tmp_path):
    config = runs.reward_model(tmp_path, steps=1)
    config = replace(config, model=ModelConfig(base, lora=LoraConfig(rank=2, alpha=4)))
    loop.train(config, MESH)
    out = str(tmp_path / "out")
    assert cli.main(["export", config.output, out, "--adapter"]) == 0
    network = Loader(MESH).trained(config.output)
    there = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
    theirs = logits_of(peft.PeftModel.from_pretrained(there, out).eval())
    bias = float(network.params["head"]["bias"])
    np.testing.assert_allclose(ours(network) - bias, theirs, atol=1e-4)
    np.testing.assert_allclose(ours(Loader(MESH).trained(out)), theirs, atol=1e-4)


@pytest.fixture
def adapter(base, tmp_path):
    """A folder as peft writes it, by hand."""
    config = {
        "peft_type": "LORA", "base_model_name_or_path": base, "r": 2, "lora_alpha": 4,
        "target_modules": ["q_proj"], "bias": "none",
    }  # fmt: skip
    key = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    tensors = {}
    for layer in range(2):
        tensors[key.format(layer, "A")] = np.ones((2, 32), np.float32)
        tensors[key.format(layer, "B")] = np.ones((32, 2), np.float32)
    (tmp_path / ADAPTER).write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, tmp_path / WEIGHTS)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported, only 'LORA'"),
        ({"lora_bias": True}, "lora_bias=True is not supported, only False"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save has 'lm_head': only a reward model's"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices=\[1\] is not supported"),
        ({"rank_pattern": 3}, "rank_pattern=3: not of the kind"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path=None: give the folder"),
    ],
)
def test_adapters_that_are_refused(adapter, change, message):
    path = adapter / ADAPTER
    path.write_text(json.dumps(json.loads(path.read_text()) | change), encoding="utf-8")
    with pytest.raises(InputError, match=f"adapter_config.json: {message}"):
        load_model(str(adapter), MESH)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.embed_tokens.lora_embedding_A", (2, 16), "has no place here .1 in all.: adapters"),
        ("model.layers.2.self_attn.q_proj.lora_A.weight", (2, 32), "has no place here"),
        (
            "model.layers.0.self_attn.q_proj.lora_A.weight",
            (2, 31),
            "is it the adapter of this base",
        ),
        ("model.layers.0.self_attn.k_proj.lora_A.weight", (2, 32), r"lora_B have shapes .*None"),
    ],
)
def test_tensors_that_are_refused(adapter, name, shape, message):
    tensors = load_file(adapter / WEIGHTS)
    tensors[f"base_model.model.{name}"] = np.zeros(shape, np.float32)
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(InputError, match=rf"adapter_model.safetensors: .*{message}"):
        load_model(str(adapter), MESH)


def test_settings_beside_an_adapter_are_its_own(adapter, base):
    lora = settle_lora(ModelConfig(lora=LoraConfig(path=str(adapter)))).lora
    assert lora == LoraConfig(2, 4.0, ("q",), False, str(adapter))
    assert settle_lora(ModelConfig(base, lora=lora)).lora == lora  # as a run's config.yaml has it
    with pytest.raises(InputError, match=r"model.lora.rank=8: the adapter .* has 2: leave it out"):
        settle_lora(ModelConfig(lora=LoraConfig(rank=8, path=str(adapter))))
    with pytest.raises(InputError, match=r"model.lora.path=.*: no adapter"):
        settle_lora(ModelConfig(lora=LoraConfig(path=base)))


def test_maps_that_have_no_adapters_of_their_own(tiny):
    """Experts and their router take none; what shares a tensor with others in files has no name."""
    assert _targets(_maps(replace(tiny, moe=MoeConfig(4, 2), family="mixtral"))) == [
        "q",
        "k",
        "v",
        "o",
    ]
    assert _targets(_maps(replace(tiny, family="phi3"))) == ["o", "down"]


def test_queries_that_files_have_in_another_order_come_back(tiny, tmp_path):
    decoder = replace(tiny, family="glm4", norms="both", rotary_dim=4)
    lora, rng = LoraConfig(2, 4.0, ("q", "o")), np.random.default_rng(0)
    shapes = Model(decoder, lora=lora).lora_shapes()
    layers = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)
    write_adapter(tmp_path, decoder, Adapter(lora, "base", layers, None), np.dtype("float32"))
    held = load_file(tmp_path / WEIGHTS)
    out = held["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    plain = layers["attention"]["q"]["lora_b"][0].reshape(2, -1).T
    assert not np.array_equal(out, plain)
    np.testing.assert_array_equal(np.sort(out, axis=0), np.sort(plain, axis=0))
    found = read_adapter(str(tmp_path), decoder)
    assert found.lora == lora
    jax.tree.map(np.testing.assert_array_equal, found.layers, layers)
