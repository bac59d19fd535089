"""A reward model that left as a Hugging Face folder is loaded, and used everywhere, as the run that
it comes from."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import runs

from jaxrlhf.apps import cli
from jaxrlhf.apps.generate import complete
from jaxrlhf.apps.serve import model_source, serve
from jaxrlhf.config import (
    EvaluateConfig,
    LoraConfig,
    MeshConfig,
    ProcessRewardModelConfig,
    RewardConfig,
    RewardModelConfig,
    SampleConfig,
    save,
)
from jaxrlhf.core.errors import InputError
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.models.load import Loader, load_model
from jaxrlhf.rewards.functions import Asked
from jaxrlhf.run import loop
from jaxrlhf.run.setup import setup
from jaxrlhf.steps.score import reward
from jaxrlhf.study.evaluate import evaluate_model
from jaxrlhf.study.plan.compiled import with_stand_ins

MESH = make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A reward model's run, normalised and with adapters, and the folder it was exported to."""
    folder = tmp_path_factory.mktemp("rm")
    samples = [{"prompt": "the", "completion": word} for word in runs.WORDS.split()]
    config = runs.reward_model(folder, steps=2)
    config = replace(
        config,
        model=replace(config.model, lora=LoraConfig(rank=2, alpha=4)),
        algorithm=RewardModelConfig(normalise_on=runs.write(folder / "samples.jsonl", samples)),
    )
    loop.train(config, MESH)
    out = str(folder / "exported")
    assert cli.main(["export", config.output, out]) == 0
    return config.output, out


def scores(path, mesh=MESH):
    """Of two rows, one padded."""
    network = Loader(mesh).trained(path)
    token_BT, mask_BT = np.array([[2, 3, 9, 14], [8, 15, 0, 0]]), np.array([[1] * 4, [1, 1, 0, 0]])
    score = jax.jit(reward, static_argnums=0)
    return np.asarray(score(network.model, network.params, token_BT, mask_BT, network.lora))


def test_exported_reward_model_scores_as_its_run(pair):
    run, folder = map(scores, pair)
    assert np.ptp(run) > 0.01
    np.testing.assert_allclose(folder, run, rtol=1e-4, atol=1e-5)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    kernel = Loader(mesh).trained(pair[1]).params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size / 8
    np.testing.assert_allclose(scores(pair[1], mesh), run, rtol=1e-4, atol=1e-5)


def test_export_says_what_transformers_leaves_out(pair, tmp_path, capsys):
    bias = float(Loader(MESH).trained(pair[0]).params["head"]["bias"])
    assert cli.main(["export", pair[1], str(tmp_path / "again")]) == 0
    assert f"its scores are {-bias:+.4g} from" in capsys.readouterr().out
    assert abs(bias) > 1e-3


def test_load_model_reads_an_exported_reward_model(pair):
    model, params, tokenizer = load_model(pair[1], MESH)
    assert params["head"]["kernel"].shape == (model.decoder.embed,)
    assert tokenizer.encode("good") == [runs.WORDS.split().index("good") + 2]


def test_serving_an_exported_reward_model(pair):
    asked = Asked(["the", "good"], ["nice", "bad"], {}, [True, True])
    wanted = model_source(pair[0], 2)(asked).score_B
    np.testing.assert_allclose(model_source(pair[1], 2)(asked).score_B, wanted, rtol=1e-4)
    with serve(pair[1], port=0, batch_size=2, max_tokens=2) as server:
        scored = server.source(asked)
    assert np.isnan(scored.score_B).all()
    assert scored.problem == "3 tokens, and the reward model reads max_tokens=2"


def test_ppo_on_an_exported_reward_model(pair, tmp_path):
    """Rewards of the run or of the folder are the same; the critic starts from the folder."""
    after = []
    for i, path in enumerate(pair):
        critic = replace(runs.SEPARATE, path=pair[1])
        config = runs.ppo(tmp_path, steps=1, rewards=(RewardConfig(model=path),), critic=critic)
        data = replace(config.data, eval=config.data.train)
        config = replace(config, data=data, output=str(tmp_path / str(i)))
        after.append(loop.train(config, MESH)["proxy_after"])
    assert after[0] == pytest.approx(after[1], rel=1e-3)


def test_exported_reward_model_computes_as_the_policy(pair, tmp_path):
    config = runs.ppo(tmp_path, rewards=(RewardConfig(model=pair[1]),))
    config = replace(config, model=replace(config.model, dtype="bfloat16"))
    run = setup(config, MESH, abstract=True)
    assert run.judge.scorers[0].members[0].network.model.dtype == "bfloat16"
    assert with_stand_ins(config)[1] == []  # a plan takes it as it is


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2, alpha=4)])
def test_a_critic_starts_from_an_exported_reward_model(lora, pair, tmp_path):
    config = runs.ppo(tmp_path, critic=replace(runs.SEPARATE, path=pair[1]), steps=1)
    config = replace(config, model=replace(config.model, lora=lora))
    theirs = Loader(MESH).trained(pair[1]).params["head"]
    with jax.set_mesh(MESH):
        run = setup(config, MESH)
        jax.tree.map(np.testing.assert_array_equal, run.states["critic"].params["head"], theirs)
        assert ("lora" in run.states["critic"].params) == (lora is not None)


def test_a_reward_model_completes_nothing(pair, tmp_path):
    for path in pair:
        refused = pytest.raises(InputError, match="a reward model, which completes nothing")
        with refused:
            complete(path, ("the",), SampleConfig(max_new_tokens=2))
        with refused:
            evaluate_model(EvaluateConfig(path, output=str(tmp_path)), MESH)


def test_export_refuses_a_process_reward_model(tmp_path, capsys):
    config = replace(
        runs.reward_model(tmp_path), algorithm=ProcessRewardModelConfig(separator="the")
    )
    save(config, tmp_path / "config.yaml")
    assert cli.main(["export", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "a process reward model; transformers has no such class" in capsys.readouterr().err
