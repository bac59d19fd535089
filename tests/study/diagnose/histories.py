"""Histories of runs that never were: one that is well, of each kind, and one for each illness."""

import zlib
from dataclasses import replace

import numpy as np

from jaxrlhf.config import Config, DPOConfig, GRPOConfig, PPOConfig, RewardModelConfig, SampleConfig
from jaxrlhf.study.diagnose.history import History, Series

STEPS = 40
RISE = np.arange(STEPS) / (STEPS - 1)
NOUNS = ("the soup", "our guide", "a long walk", "his coat", "that film", "the last train")
VERBS = ("was", "seemed", "felt", "looked", "stayed", "turned out")
ADJECTIVES = ("warm", "grey", "kind", "slow", "early", "bright", "plain")


def severity_of(finding):
    """None where nothing is found."""
    return finding and finding.severity


def line(start, end, scatter=0.0):
    """From ``start`` to ``end`` over the run, with a scatter drawn from the two numbers."""
    seed = zlib.crc32(f"{start} {end} {scatter}".encode())
    return start + (end - start) * RISE + scatter * np.random.default_rng(seed).normal(size=STEPS)


def texts(count, seed=0):
    """Unlike sentences of about ten words."""
    rng = np.random.default_rng(seed)
    return [
        " and ".join(
            f"{rng.choice(NOUNS)} {rng.choice(VERBS)} {rng.choice(ADJECTIVES)}" for _ in range(2)
        )
        for _ in range(count)
    ]


def rows(completions, **columns):
    names = list(columns)
    return tuple(
        {"prompt": "p", "completion": text, **dict(zip(names, values, strict=True))}
        for text, *values in zip(completions, *columns.values(), strict=True)
    )


def held_out(seed, count=60):
    rng = np.random.default_rng(seed)
    return rows(texts(count, seed), proxy=rng.normal(size=count).tolist())


def policy(algorithm=None, **training):
    """PPO that learns as it should; ``training`` changes its metrics (None takes one away)."""
    values = {
        "score": line(0.0, 0.8, 0.05),
        "score_std": line(0.6, 0.4, 0.02),
        "kl": line(0.0, 6.0, 0.2),
        "length": line(22.0, 24.0, 0.5),
        "ended": line(0.8, 0.7, 0.02),
        "entropy_estimate": line(2.5, 1.8, 0.05),
        "explained_variance": line(-0.2, 0.6, 0.05),
        "clip_fraction": line(0.08, 0.1, 0.01),
        "approx_kl": line(0.005, 0.005, 0.001),
        "weight": np.ones(STEPS),
        "ratio_max": line(1.4, 1.6, 0.05),
        "sample_ratio": np.ones(STEPS),
        "sample_gap": np.zeros(STEPS),
        "groups_without_signal": line(0.1, 0.2, 0.02),
        "valid": np.ones(STEPS),
        "skipped": np.zeros(STEPS),
    }
    values = {name: x for name, x in (values | training).items() if x is not None}
    when = np.array([0, 20, 40])
    measured = {
        "proxy": np.array([0.0, 0.4, 0.8]),
        "gold": np.array([0.0, 0.3, 0.5]),
        "proxy_ci": np.full(3, 0.05),
        "gold_ci": np.full(3, 0.05),
        "kl_nats": np.array([0.0, 3.0, 6.0]),
        "distinct_2": np.array([0.8, 0.75, 0.7]),
    }
    rng = np.random.default_rng(1)
    return History(
        Config(algorithm=algorithm or PPOConfig(), sample=SampleConfig(max_new_tokens=48)),
        Series(np.arange(1, STEPS + 1), values),
        Series(when, measured),
        {i + 1: rows(texts(4, i), reward=rng.normal(size=4).tolist()) for i in range(STEPS)},
        {int(step): held_out(int(step)) for step in when},
    )


def grpo(**training):
    return policy(GRPOConfig(epochs=2), explained_variance=None, **training)


def offline(algorithm, evaluation=None, **training):
    values = {
        "loss": line(0.69, 0.4, 0.02),
        "accuracy": line(0.5, 0.85, 0.03),
        "margin": line(0.0, 2.0, 0.1),
        "skipped": np.zeros(STEPS),
        **training,
    }
    measured = {
        "loss": np.array([0.69, 0.5, 0.45]),
        "accuracy": np.array([0.5, 0.75, 0.8]),
        "rows": np.full(3, 200.0),
        **(evaluation or {}),
    }
    return History(
        Config(algorithm=algorithm),
        Series(np.arange(1, STEPS + 1), values),
        Series(np.array([0, 20, 40]), measured),
    )


def reward_model(evaluation=None, **training):
    pairs = {"pairs": np.full(3, 200.0)}
    return offline(RewardModelConfig(), {**pairs, **(evaluation or {})}, **training)


def dpo(evaluation=None, **training):
    return offline(DPOConfig(), evaluation, **{"nll": line(1.5, 1.5, 0.03), **training})


def measured(history, **evaluation):
    """``history`` with other figures of its three evaluations."""
    values = {**history.evaluation.values, **{k: np.array(x) for k, x in evaluation.items()}}
    return replace(history, evaluation=Series(history.evaluation.step_I, values))


def ending(history, completions, **columns):
    """``history`` whose last evaluation has these completions."""
    last = max(history.eval_samples)
    return replace(
        history, eval_samples={**history.eval_samples, last: rows(completions, **columns)}
    )


def short(steps=13):
    """A short run on a language model, as GRPO makes of a reward in [−1, 1]: the responses are
    sentences cut after 24 tokens, 32 an iteration, of which few end; gold rises, at 12 nats."""
    few = np.array([2, 3, 1, 2, 1, 4, 2, 0, 2, 2, 3, 0, 0]) / 32
    score = [0.31, 0.05, 0.17, 0.3, 0.35, 0.4, 0.51, 0.44, 0.64, 0.65, 0.76, 0.85, 0.8]
    kl = [0, 0.03, 0.19, 0.86, 1.6, 2.5, 3.3, 4.6, 5.8, 7.0, 7.6, 11.6, 12.2]
    training = {
        "score": np.array(score),
        "score_std": np.linspace(0.42, 0.2, 13),
        "kl": np.array(kl),
        "length": 24 - 4 * few,
        "ended": few,
        "entropy_estimate": np.linspace(3.7, 2.2, 13),
        "clip_fraction": np.full(13, 0.005),
        "weight": np.ones(13),
        "ratio_max": np.array([2.7, 78.0, *[1.3] * 11]),  # one token, while the rate warms up
    }
    measured = {
        "proxy": np.array([0.15, 0.82]),
        "gold": np.array([0.15, 0.75]),
        "proxy_ci": np.array([0.1, 0.05]),
        "gold_ci": np.array([0.1, 0.06]),
        "kl_nats": np.array([0.0, 13.0]),
        "distinct_2": np.array([0.88, 0.8]),
    }
    config = Config(algorithm=GRPOConfig(epochs=2), sample=SampleConfig(max_new_tokens=24, n=4))
    return History(
        config,
        Series(np.arange(1, steps + 1), {name: x[:steps] for name, x in training.items()}),
        Series(np.array([0, 13]), measured),
        {},
        {step: held_out(step) for step in (0, 13)},
    )


HEALTHY = {
    "ppo": policy(),
    "short": short(),
    "shorter": short(steps=2),
    "grpo": grpo(),
    "reward_model": reward_model(),
    "dpo": dpo(),
}

ILL = {
    "reward_hacking": measured(policy(), gold=[0.0, 0.4, -0.2]),
    "held_out_gap": measured(policy(), proxy=[0.0, 0.05, 0.05]),
    "length_takeover": policy(length=line(20, 45, 1.0)),
    "repetition": ending(policy(), ["so so so so so so so so"] * 60),
    "phrase_takeover": ending(policy(), [f"{t} I am so happy" for t in texts(60)]),
    "kl_blow_up": policy(kl=line(0, 90, 1.0)),
    "kl_stall": policy(kl=line(0, 0, 1e-3), score=line(0, 0, 0.05)),
    "kl_negative": policy(kl=line(0, -3, 0.2)),
    "entropy_collapse": policy(entropy_estimate=line(2.5, 0.01, 0.01)),
    "large_updates": policy(clip_fraction=line(0.1, 0.5, 0.02)),
    "sampler_mismatch": policy(sample_gap=line(0.01, 0.2, 0.01)),
    "non_finite_updates": policy(skipped=np.where(np.arange(STEPS) == 17, 0.5, 0)),
    "value_function": policy(explained_variance=line(0.0, -0.2, 0.05)),
    "no_eos": policy(ended=np.zeros(STEPS)),
    "empty_responses": policy(length=np.ones(STEPS)),
    "equal_rewards": policy(score=np.ones(STEPS), score_std=np.zeros(STEPS)),
    "groups_without_signal": grpo(groups_without_signal=line(0.9, 0.9, 0.02)),
    "reward_scale": policy(score_std=line(50, 50, 1.0)),
    "length_correlation": replace(
        policy(),
        eval_samples={
            0: rows(["ab " * (i + 4) for i in range(60)], proxy=[0.1 * i for i in range(60)])
        },
    ),
    "excluded_rows": policy(valid=line(0.8, 0.8, 0.02)),
    "chance_accuracy": reward_model({"accuracy": np.array([0.5, 0.5, 0.52])}),
    "overfitting": reward_model({"loss": np.array([0.69, 0.5, 0.7])}),
    "chosen_logp_falls": dpo(nll=line(1.5, 2.2, 0.03)),
    "margin_explosion": dpo(margin=line(0.0, 40.0, 1.0)),
}
"""By detector: a run that it must speak of."""
