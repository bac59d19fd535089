"""Every rule between fields, every range: what is refused, and the line that says so."""

import re
from dataclasses import replace
from operator import attrgetter
from typing import get_args

import pytest

from jaxrlhf.config import (
    A2CConfig,
    AlgorithmConfig,
    Config,
    CriticConfig,
    DAPOConfig,
    DataConfig,
    DecoderConfig,
    DPOConfig,
    EvalConfig,
    GKDConfig,
    GRPOConfig,
    KTOConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    MoeConfig,
    OnlineDPOConfig,
    OptimConfig,
    PointwiseRewardModelConfig,
    PPOConfig,
    ProcessRewardModelConfig,
    ReferenceConfig,
    ReinforceConfig,
    RewardConfig,
    RewardModelConfig,
    SampleConfig,
    SFTConfig,
    SimPOConfig,
    check,
    check_mesh,
    check_sample,
    resolve_mesh,
    rows_at_once,
)
from jaxrlhf.config.checks import RANGES
from jaxrlhf.core.errors import InputError

DECODER = DecoderConfig(
    vocab=64, embed=48, layers=2, heads=9, kv_heads=3, head_dim=16, mlp=96, context=88
)
PPO = Config(
    model=ModelConfig(path="smollm2"),
    rewards=(RewardConfig(function="sentiment"),),
    data=DataConfig(train="prompts.jsonl"),
)
SFT = replace(PPO, algorithm=SFTConfig(), rewards=())


def fresh(**changes):
    return ModelConfig(decoder=replace(DECODER, **changes), tokenizer="words:a")


GKD = replace(PPO, algorithm=GKDConfig(), rewards=(), reference=ReferenceConfig("teacher"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": ReferenceConfig()}, "reference.path: missing: gkd learns from it: name"),
        ({"rewards": PPO.rewards}, "rewards: algorithm.name=gkd learns from its teacher alone"),
        ({"max_excluded": 0.1}, "max_excluded=0.1: gkd asks for no rewards: leave it out"),
        ({"algorithm": GKDConfig(beta=1.1)}, "algorithm.beta=1.1: must be in [0, 1]"),
        ({"algorithm": GKDConfig(lmbda=-0.1)}, "algorithm.lmbda=-0.1: must be in [0, 1]"),
        ({"algorithm": GKDConfig(lmbda=0.5)}, "sample.n=4: with algorithm.lmbda=0.5 prompts have"),
        ({"algorithm": GKDConfig(length=3)}, "algorithm.length=3: aggregation=token does not"),
        ({"critic": CriticConfig(kind="separate")}, "critic: algorithm.name=gkd learns no value"),
        ({"sample": SampleConfig(router_replay=True)}, "sample.router_replay=true: gkd does not"),
    ],
)
def test_check_refuses_distillation(changes, message):
    with pytest.raises(InputError) as error:
        check(replace(GKD, **changes))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        PPO,
        SFT,
        replace(SFT, algorithm=RewardModelConfig()),
        replace(PPO, model=fresh()),
        replace(SFT, algorithm=SimPOConfig(beta=10, margin=3.0)),  # the paper's
        replace(SFT, algorithm=DPOConfig(), reference=ReferenceConfig(path="p")),
        replace(PPO, optim=OptimConfig(learning_rate=0.0)),
        replace(PPO, algorithm=PPOConfig(kl_controller="adaptive", kl_target=3.0, kl_horizon=50.0)),
        replace(
            PPO,
            algorithm=PPOConfig(off_policy="token", old_logp="rescore", off_policy_cap=3.0),
        ),
        replace(PPO, critic=CriticConfig(kind="separate")),
        replace(SFT, sample=SampleConfig(stop=(2,), pad=2)),  # as a run's own config.yaml says
        GKD,
        replace(GKD, algorithm=GKDConfig(beta=0.0), sample=SampleConfig(cache="int8")),
    ],
)
def test_check_passes(config):
    check(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0: must be at least 1"),
        (
            {"critic": CriticConfig(warmup=1), "optim": OptimConfig(weight_decay=0.1)},
            "critic.warmup=1: optim.weight_decay=0.1 would move the shared trunk",
        ),
        (
            {"optim": OptimConfig(state_dtype="bfloat16", b2=0.999)},
            "optim.b2=0.999: what a step adds to a bfloat16 moment would be lost",
        ),
        (
            {
                "reference": ReferenceConfig(offload=True),
                "model": replace(PPO.model, lora=LoraConfig()),
            },
            "reference.offload: with model.lora the reference is the weights under the adapters",
        ),
        (
            {"rewards": (RewardConfig("f", offload=True),)},
            "rewards.0.offload=True: a function does not read it: leave it out",
        ),
        ({"seed": -1}, "seed=-1: must be at least 0"),
        ({"seed": 2**32}, "seed=4294967296: must be below 4294967296"),
        ({"output": ""}, "output: empty"),
        ({"sample": SampleConfig(temperature=0.0)}, "greedy; refused in training"),
        ({"sample": SampleConfig(cache="int8")}, "sample.cache=int8: log-probs of the sampler are"),
        ({"sample": SampleConfig(temperature=-1.0)}, "sample.temperature=-1.0: must be at least 0"),
        ({"sample": SampleConfig(top_p=0.0)}, "sample.top_p=0.0: must be in (0, 1]"),
        ({"sample": SampleConfig(top_p=1.1)}, "sample.top_p=1.1: must be in (0, 1]"),
        ({"sample": SampleConfig(n=0)}, "sample.n=0: must be at least 1"),
        ({"sample": SampleConfig(stop=(-1,))}, "sample.stop=[-1]"),
        ({"sample": SampleConfig(stop=(2, 2**31))}, "sample.stop=[2, 2147483648]: must be below"),
        ({"steps": 2**31}, "steps=2147483648: must be below 2147483648"),
        ({"optim": OptimConfig(warmup=2**31)}, "optim.warmup=2147483648: must be below"),
        ({"algorithm": PPOConfig(lam=1.1)}, "algorithm.lam=1.1: must be in [0, 1]"),
        ({"algorithm": PPOConfig(gamma=-0.1)}, "algorithm.gamma=-0.1: must be in [0, 1]"),
        ({"algorithm": PPOConfig(kl_coef=-0.1)}, "algorithm.kl_coef=-0.1: must be at least 0"),
        ({"algorithm": PPOConfig(epochs=0)}, "algorithm.epochs=0: must be at least 1"),
        ({"algorithm": PPOConfig(dual_clip=1.0)}, "algorithm.dual_clip=1.0: must be above 1"),
        ({"algorithm": PPOConfig(length=3)}, "algorithm.length=3: aggregation=token"),
        ({"algorithm": PPOConfig(minibatches=3)}, "32 rows % algorithm.minibatches=3"),
        (
            {"algorithm": PPOConfig(minibatches=4), "optim": OptimConfig(microbatches=16)},
            "32 rows / algorithm.minibatches=4 % optim.microbatches=16",
        ),
        (
            {"data": replace(PPO.data, batch_size=1), "sample": SampleConfig(n=1)},
            "algorithm.whiten_advantages: one row has no variance",
        ),
        ({"algorithm": GRPOConfig(), "sample": SampleConfig(n=1)}, "sample.n=1: grpo compares"),
        (
            {"algorithm": DAPOConfig(kl_in="loss", kl_estimator="k1")},
            "algorithm.kl_estimator=k1: as a loss",
        ),
        ({"algorithm": GRPOConfig(kl_coef=0.0, kl_controller="adaptive")}, "algorithm.kl_coef=0"),
        ({"algorithm": GRPOConfig(off_policy="token")}, "algorithm.off_policy=token: the old log"),
        (
            {"algorithm": GRPOConfig(overlong_buffer=4, normalise="each")},
            "algorithm.overlong_buffer=4: algorithm.normalise=each takes the scores",
        ),
        ({"algorithm": GRPOConfig(overlong_buffer=25)}, "algorithm.overlong_buffer=25: more"),
        ({"algorithm": OnlineDPOConfig(kind="exo_pair")}, "algorithm.kind=exo_pair"),
        (
            {"algorithm": OnlineDPOConfig(), "sample": SampleConfig(router_replay=True)},
            "sample.router_replay=true: online_dpo does not compare log-probs",
        ),
        (
            {"model": fresh(), "sample": SampleConfig(router_replay=True)},
            "sample.router_replay=true: model.decoder is no mixture of experts",
        ),
        (
            {"algorithm": OnlineDPOConfig(minibatches=3)},
            "data.batch_size=8 % algorithm.minibatches",
        ),
        (
            {"algorithm": GRPOConfig(), "critic": CriticConfig(kind="separate")},
            "critic: algorithm.name=grpo learns no value function",
        ),
        (
            {
                "algorithm": ReinforceConfig(),
                "data": replace(PPO.data, batch_size=1),
                "sample": SampleConfig(n=1),
            },
            "algorithm.baseline=mean: one row",
        ),
        ({"rewards": ()}, "rewards: missing"),
        ({"rewards": (RewardConfig(),)}, "rewards.0: give either function or model"),
        ({"rewards": (RewardConfig("f", "m"),)}, "rewards.0: function and model are both given"),
        (
            {"eval": EvalConfig(gold=(RewardConfig(),)), "data": replace(PPO.data, eval="e")},
            "eval.gold.0: give either",
        ),
        ({"eval": EvalConfig(every=5)}, "eval.every=5: there are no rows"),
        (
            {"eval": EvalConfig(gold=(*PPO.rewards, RewardConfig(model="runs/rm")))},
            "eval.gold=sentiment, runs/rm: there are no rows to evaluate on: give data.eval",
        ),
        (
            {"algorithm": PPOConfig(kl_controller="adaptive", kl_horizon=6.4)},
            "algorithm.kl_horizon=6.4: must exceed a fifth of the rows",
        ),
        (
            {"algorithm": PPOConfig(kl_target=3.0)},
            "algorithm.kl_target=3: kl_controller=fixed does not read it: leave it out",
        ),
        ({"algorithm": GRPOConfig(kl_horizon=50.0)}, "algorithm.kl_horizon=50: kl_controller=fix"),
        ({"algorithm": PPOConfig(off_policy_cap=3.0)}, "algorithm.off_policy_cap=3: off_policy=no"),
        (
            {
                "algorithm": A2CConfig(value_coef=0.5),
                "critic": CriticConfig(kind="separate"),
            },
            "algorithm.value_coef=0.5: a separate critic has a loss of its own",
        ),
        ({"data": DataConfig()}, "data.train: missing"),
        ({"model": ModelConfig()}, "model.path: missing"),
        ({"model": replace(fresh(), path="p")}, "model.path=p: model.decoder is given too"),
        ({"model": replace(fresh(), tokenizer="")}, "model.tokenizer: missing"),
        ({"model": fresh(kv_heads=2)}, "heads=9 % kv_heads=2"),
        ({"model": fresh(head_dim=3)}, "model.decoder.head_dim=3: must be even"),
        ({"model": fresh(context=87)}, "model.decoder.context=87: rows are 88 tokens wide"),
        ({"model": ModelConfig("p", lora=LoraConfig(targets=()))}, "model.lora.targets: empty"),
        (
            {"eval": EvalConfig(patience=1, every=1), "data": replace(PPO.data, eval="e")},
            "eval.patience=1: ppo has no held-out loss: leave it out",
        ),
        ({"eval": EvalConfig(patience=-1)}, "eval.patience=-1: must be at least 0"),
        ({"critic": CriticConfig(path="p")}, "critic.path=p: a shared critic has none"),
        ({"mesh": MeshConfig(fsdp=0)}, "mesh.fsdp=0: must be at least 1, or -1"),
        (
            {"mesh": MeshConfig(fsdp=-1)},
            "mesh: data=-1, fsdp=-1, expert=1, context=1, tensor=1: only one axis",
        ),
    ],
)
def test_check_refuses(changes, message):
    with pytest.raises(InputError) as error:
        check(replace(PPO, **changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": PPO.rewards}, "rewards: algorithm.name=sft learns from its data alone"),
        ({"optim": OptimConfig(microbatches=3)}, "data.batch_size=8 % optim.microbatches=3"),
        ({"model": fresh(context=127)}, "rows are 128 tokens wide"),
        (
            {"algorithm": DPOConfig(), "data": replace(PPO.data, packing=True)},
            "data.packing: only sft packs rows, not dpo: leave it out",
        ),
        (
            {"eval": EvalConfig(patience=2), "data": replace(PPO.data, eval="e")},
            "eval.patience=2: counts evaluations, and there are none",
        ),
        ({"eval": EvalConfig(patience=2, every=5)}, "eval.every=5: there are no rows to evaluate"),
        (
            {"algorithm": KTOConfig(), "optim": OptimConfig(microbatches=2)},
            "optim.microbatches=2: kto has a mean",
        ),
        (
            {"algorithm": KTOConfig(), "data": replace(PPO.data, batch_size=1)},
            "data.batch_size=1: kto compares",
        ),
        ({"algorithm": DPOConfig(kind="exo_pair")}, "algorithm.label_smoothing=0"),
        (
            {"algorithm": DPOConfig(kind="ipo", label_smoothing=0.1)},
            "algorithm.label_smoothing=0.1: kind=ipo does not read it",
        ),
        ({"sample": SampleConfig(n=2)}, "sample: algorithm.name=sft does not read it"),
        ({"critic": CriticConfig(kind="separate")}, "critic: algorithm.name=sft does not read it"),
        ({"sample": SampleConfig(stop=(-1,))}, "sample.stop=[-1]: must be at least 0"),
        ({"eval": EvalConfig(n=4)}, "eval.n=4: algorithm.name=sft samples nothing: leave it out"),
        ({"reference": ReferenceConfig(path="p")}, "reference: algorithm.name=sft does not read"),
        (
            {"eval": EvalConfig(gold=PPO.rewards), "data": replace(PPO.data, eval="e")},
            "eval.gold: algorithm.name=sft samples nothing",
        ),
    ],
)
def test_check_refuses_offline(changes, message):
    with pytest.raises(InputError) as error:
        check(replace(SFT, **changes))
    assert message in str(error.value)


def test_check_ranges_name_real_fields():
    fields = {"decoder": replace(fresh().decoder, moe=MoeConfig(4, 2)), "lora": LoraConfig()}
    full = replace(PPO, model=replace(fresh(), **fields))
    configs = [replace(full, algorithm=kind()) for kind in get_args(AlgorithmConfig)]
    for key in " ".join(keys for *_, keys in RANGES).split():
        part, _, name = key.rpartition(".")
        owners = [attrgetter(part)(config) if part else config for config in configs]
        assert any(hasattr(owner, name) for owner in owners), key


def test_check_sample_allows_greedy():
    check_sample(SampleConfig(temperature=0.0))
    with pytest.raises(InputError, match=r"sample\.n=0: must be at least 1"):
        check_sample(SampleConfig(n=0))


def test_rows_at_once():
    split = replace(PPO, algorithm=PPOConfig(minibatches=2), optim=OptimConfig(microbatches=4))
    assert rows_at_once(PPO) == 32
    assert rows_at_once(split) == 4
    assert rows_at_once(replace(SFT, optim=OptimConfig(microbatches=4))) == 2


ENSEMBLE = Config(
    model=ModelConfig(path="smollm2"),
    rewards=(RewardConfig(ensemble=("a", "b"), combine="lcb", k=0.5),),
    data=DataConfig(train="prompts.jsonl"),
)


def test_check_passes_an_ensemble():
    check(ENSEMBLE)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (RewardConfig("f", ensemble=("a", "b")), "rewards.0: function and ensemble are both given"),
        (RewardConfig(ensemble=("a",)), "rewards.0.ensemble: one member"),
        (
            RewardConfig(model="a", combine="min"),
            "rewards.0.combine='min': a model does not read it",
        ),
        (RewardConfig(ensemble=("a", "b"), k=2.0), "rewards.0.k=2.0: combine=mean does not read"),
        (RewardConfig(ensemble=("a", "b"), combine="lcb", k=-1.0), "rewards.0.k=-1.0: must be"),
    ],
)
def test_ensemble_problems(source, message):
    with pytest.raises(InputError) as error:
        check(replace(ENSEMBLE, rewards=(source,)))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (PointwiseRewardModelConfig(delta=2.0), "algorithm.delta=2.0: kind=mse does not read it"),
        (
            PointwiseRewardModelConfig(kind="huber", delta=0.0),
            "algorithm.delta=0.0: must be",
        ),
        (ProcessRewardModelConfig(separator=""), "algorithm.separator: empty"),
        (ProcessRewardModelConfig(score_l2=-1.0), "algorithm.score_l2=-1.0: must be at least 0"),
    ],
)
def test_reward_model_problems(algorithm, message):
    with pytest.raises(InputError) as error:
        check(replace(ENSEMBLE, algorithm=algorithm, rewards=()))
    assert str(error.value).startswith(message)


DECODER = DecoderConfig(
    vocab=64, embed=48, layers=2, heads=9, kv_heads=3, head_dim=16, mlp=96, context=88
)


@pytest.mark.parametrize(
    ("mesh", "devices", "resolved"),
    [
        (MeshConfig(), 8, MeshConfig(8, 1, 1)),
        (MeshConfig(2, -1, 2), 8, MeshConfig(2, 2, 2)),
        (MeshConfig(2, 1, 1, -1), 8, MeshConfig(2, 1, 1, 4)),
        (MeshConfig(1, 1, 1), 1, MeshConfig(1, 1, 1)),
    ],
)
def test_resolve_mesh(mesh, devices, resolved):
    assert resolve_mesh(mesh, devices) == resolved


@pytest.mark.parametrize("mesh", [MeshConfig(3), MeshConfig(-1, 3), MeshConfig(2, 2, 1)])
def test_resolve_mesh_wrong_product(mesh):
    with pytest.raises(InputError, match="does not make 8 devices"):
        resolve_mesh(mesh, 8)


@pytest.mark.parametrize(
    ("mesh", "changes", "rows", "message"),
    [
        (MeshConfig(tensor=2), {}, 32, "heads=9 % tensor=2 is not 0: mesh.tensor can be 1 with"),
        (MeshConfig(tensor=2), {"heads": 10}, 32, "kv_heads=3 % tensor=2"),
        (MeshConfig(tensor=2), {"heads": 4, "kv_heads": 2, "mlp": 95}, 32, "mlp=95 % tensor=2"),
        (MeshConfig(tensor=2), {"heads": 4, "kv_heads": 2, "vocab": 63}, 32, "vocab=63 % tensor=2"),
        (
            MeshConfig(tensor=8),
            {"heads": 12, "kv_heads": 12, "vocab": 60},
            32,
            "can be 1, 2, 4 with",
        ),
        (
            MeshConfig(fsdp=4),
            {"embed": 50},
            32,
            "embed=50 % fsdp=4 is not 0: mesh.fsdp can be 1, 2",
        ),
        (
            MeshConfig(fsdp=2, context=2),
            {"embed": 50},
            32,
            "embed=50 % fsdp·context=4 is not 0: mesh.fsdp · mesh.context can be 1, 2 with",
        ),
        (MeshConfig(context=0), {}, 32, "mesh.context=0: must be at least 1"),
        (MeshConfig(fsdp=2), {}, 12, "rows=12 % (data·fsdp)=8 is not 0"),
    ],
)
def test_check_mesh_refuses(mesh, changes, rows, message):
    with pytest.raises(InputError) as error:
        check_mesh(mesh, replace(DECODER, **changes), devices=8, rows=rows)
    assert message in str(error.value)


def test_check_mesh_refuses_slots_that_do_not_divide():
    decoder, given = replace(DECODER, heads=4, kv_heads=2), {"devices": 8, "rows": 4}
    mesh = MeshConfig(fsdp=2, context=2)
    assert check_mesh(mesh, decoder, **given, slots=16).context == 2
    with pytest.raises(InputError, match=r"sample.slots=12 % \(data·fsdp·context\)=8 is not 0"):
        check_mesh(mesh, decoder, **given, slots=12)


def test_check_mesh_resolves():
    decoder = replace(DECODER, heads=4, kv_heads=2)
    mesh = check_mesh(MeshConfig(fsdp=2, tensor=2), decoder, devices=8, rows=4)
    assert mesh == MeshConfig(2, 2, 2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"date": "2026-02-31"}, "data.date=2026-02-31: no such day: give YYYY-MM-DD"),
        ({"date": "20260201"}, "data.date=20260201: no such day: give YYYY-MM-DD"),
        (
            {"template_kwargs": {"tools": []}},
            "data.template_kwargs.tools: comes from the rows or the run: leave it out",
        ),
    ],
)
def test_check_refuses_settings_of_chats(data, message):
    model = ModelConfig(path="x")
    config = Config(SFTConfig(), model, data=DataConfig(train="x.jsonl", **data))
    with pytest.raises(InputError, match=re.escape(message)):
        check(config)
    check(replace(config, data=DataConfig(train="x.jsonl", date="2026-02-28")))
