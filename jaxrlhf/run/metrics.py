"""What a run measures: the one table of its metrics, which the terminal, the report and
docs/metrics.md read.

Names are those of metrics.jsonl. ``eval/NAME`` is of held-out rows (``HELD_OUT``, else as in
training); ``NAME_ci`` is half of the mean's 95 % interval; ``critic/NAME`` is of the update of a
separate critic; ``reward/NAME``, ``applies/NAME`` and ``excluded/NAME`` are of one of the rewards.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Metric(NamedTuple):
    """One line of the table."""

    title: str
    """What it is called, over a chart and in a table."""
    unit: str
    """Of the values; empty where they have none, or that of the loss."""
    says: str
    """What it tells, and how it is computed."""
    healthy: str = ""
    """Where it should be, or what it should do; empty where no value is better than another."""


REWARDS = {
    "reward": Metric(
        "Reward, in training",
        "reward units",
        "The score less penalties and the β·KL charged in the reward: what is learnt from. Of KTO "
        "and BCO the implicit reward β·(log π − log π_ref); of a process reward model its verdict",
        "rises",
    ),
    "score": Metric(
        "Score",
        "reward units",
        "Mean of what the rewards said of the completions, weighted and summed",
        "rises; `eval/gold` with it",
    ),
    "score_std": Metric(
        "Spread of scores",
        "reward units",
        "Standard deviation of the scores of an iteration",
        "0.02 to 20; nothing is learnt where it is 0",
    ),
    "kl": Metric(
        "KL to the reference, in training",
        "nats a sequence",
        "Mean of Σ_t log π − log π_ref over the policy's own samples (k1). Of KTO z₀, from answers "
        "to other prompts",
        "starts at 0, rises slowly; below 2 nats a token",
    ),
    "kl_reward": Metric(
        "KL charged in the reward",
        "reward units",
        "Mean of −β·Σ_t KL, part of `reward`; 0 where the KL is in the loss",
        "smaller than what `score` has risen",
    ),
    "kl_coef": Metric(
        "KL coefficient β",
        "reward units a nat",
        "As charged in this iteration; an adaptive one moves",
    ),
    "kl_loss": Metric(
        "KL in the loss", "", "β·KL, estimated under the loss's weights, part of `loss`"
    ),
    "reward/NAME": Metric(
        "Reward by NAME", "reward units", "Mean score by one of the rewards, unweighted", "rises"
    ),
    "applies/NAME": Metric(
        "Rows that NAME applies to", "share", "The other rows got `None` from it"
    ),
    "excluded/NAME": Metric(
        "Rows on which NAME failed",
        "share",
        "Of those it applies to; they are left out of learning",
        "0; below 0.05",
    ),
    "reward/excluded": Metric(
        "Rows without a reward", "share", "Left out of learning", "0; below 0.05"
    ),
    "valid": Metric("Rows with a reward", "share", "Those that are learnt from", "1"),
}
"""Of what is learnt from, on policy."""

ROLLOUT = {
    "length": Metric(
        "Length, in training",
        "tokens",
        "Mean tokens of a response, the stop token included",
        "neither 1 nor `sample.max_new_tokens`; no steady climb",
    ),
    "ended": Metric(
        "Ended", "share", "Responses that ended by themselves", "above 0.005; not falling"
    ),
    "entropy_estimate": Metric(
        "Entropy, in training",
        "nats a token",
        "−log π of the sampled tokens, mean",
        "falls slowly; above 0.2 of its start",
    ),
    "sample_ratio": Metric(
        "Update's over sampler's probability",
        "",
        "Mean exp(log π − log π of the draw); truncation makes it differ from 1",
        "0.95 to 1.05 without truncation",
    ),
    "sample_gap": Metric(
        "Sampler's mismatch",
        "nats a token",
        "Mean |log π − log π of the draw|",
        "below 0.05; 1e-5 in float32",
    ),
    "on_policy": Metric(
        "Own texts",
        "share",
        "1 where an iteration learnt from the student's own texts, 0 where from the answers in the "
        "data (GKD)",
    ),
    "rounds": Metric(
        "Rounds of sampling", "count", "Until enough groups had rewards that differ (DAPO)", "1"
    ),
    "groups_kept": Metric(
        "Groups kept", "share", "Groups with a signal among those learnt from (DAPO)", "above 0.5"
    ),
    "groups_without_signal": Metric(
        "Groups without a signal",
        "share",
        "Groups whose rewards are all equal, from which nothing is learnt",
        "below 0.8",
    ),
    "pairs": Metric(
        "Pairs", "count", "Pairs that the policy's samples, or held-out rankings, made"
    ),
    "gap": Metric(
        "Gap within pairs",
        "reward units",
        "Mean difference of the scores of chosen and rejected samples (online DPO)",
    ),
}
"""Of what the policy has sampled."""

UPDATE = {
    "loss": Metric("Loss", "", "What the update descends", "finite"),
    "divergence": Metric(
        "Divergence from the teacher",
        "nats a token",
        "Generalised Jensen-Shannon divergence of whole distributions, by `algorithm.beta` (GKD)",
        "falls",
    ),
    "policy_loss": Metric(
        "Policy loss", "", "The policy's part of it", "around 0 where advantages are whitened"
    ),
    "value_loss": Metric(
        "Value loss", "reward units²", "½ of the mean squared error of the values", "falls"
    ),
    "clip_fraction": Metric(
        "Clipped ratios",
        "share",
        "Tokens whose ratio the clip stopped (of CISPO: bounded)",
        "0 to 0.3; 0.05 to 0.2 is usual",
    ),
    "approx_kl": Metric(
        "Step away from the sampler", "nats a token", "KL(π_old‖π) by k3, mean", "below 0.05"
    ),
    "ratio_max": Metric(
        "Largest ratio", "", "The largest π/π_old of an iteration's tokens", "below 10"
    ),
    "logp": Metric(
        "Log-probability",
        "nats",
        "Of the tokens under the loss's weights; of preference losses, of the answers, sums",
    ),
    "entropy": Metric(
        "Entropy",
        "nats a token",
        "Of the whole distribution at each token; measured where `entropy_coef` asks for it",
    ),
    "grad_norm": Metric(
        "Gradient norm",
        "",
        "Global norm before clipping",
        "finite, within a factor of 10 of its median",
    ),
    "learning_rate": Metric("Learning rate", "", "Of the last update; a schedule moves it"),
    "skipped": Metric(
        "Updates skipped", "share", "Those whose gradient was not finite", "0; below 0.05"
    ),
    "updates": Metric(
        "Updates", "count", "Optimizer steps of the iteration; `target_kl` may end it early"
    ),
    "router_load_max": Metric("Busiest expert", "", "Its tokens, over its layer's mean", "steady"),
    "router_entropy": Metric("Entropy of routers", "nats a token", "Of experts, mean over layers"),
    "router_aux_loss": Metric(
        "Load-balancing loss", "", "Before its weight", "experts a token takes, at equal loads"
    ),
    "router_z_loss": Metric("Router z-loss", "nats²", "Mean of (log Σ exp logits)²"),
    "weight": Metric("Weight", "", "Sum of the loss's weights", "1"),
    "tokens": Metric("Tokens trained on", "count", "Of a batch of SFT"),
}
"""Of the update."""

CRITIC = {
    "explained_variance": Metric(
        "Explained variance of the value function",
        "share",
        "1 − var(return − value) / var(return)",
        "above 0 after some 20 iterations; 1 is perfect",
    ),
    "advantage_mean": Metric(
        "Mean advantage", "reward units", "Before whitening, over tokens", "near 0"
    ),
    "return_mean": Metric("Mean return", "reward units", "What the values are to predict"),
    "return_sq": Metric("Squared return", "reward units²", "Mean over tokens"),
    "value_mean": Metric(
        "Mean value", "reward units", "What the critic says", "follows `return_mean`"
    ),
    "value_error_sq": Metric(
        "Squared error of values", "reward units²", "Mean over tokens", "below `return_sq`"
    ),
    "value_clip_fraction": Metric(
        "Clipped values", "share", "Tokens whose value `value_clip` held back", "below 0.3"
    ),
}
"""Of the value function."""

ROWS = {
    "accuracy": Metric(
        "Accuracy, in training",
        "share",
        "Pairs in which the chosen answer has the higher (implicit) reward, a tie one half; labels "
        "on the right side of 0",
        "above 0.5; not far above `eval/accuracy`",
    ),
    "margin": Metric(
        "Margin",
        "reward units",
        "Reward of the chosen answer less that of the rejected",
        "rises; below 20",
    ),
    "chosen_reward": Metric(
        "Implicit reward of chosen answers",
        "reward units",
        "β·(log π − log π_ref); without a reference, of log π alone",
        "not falling far",
    ),
    "rejected_reward": Metric(
        "Implicit reward of rejected answers", "reward units", "As of the chosen", "falls"
    ),
    "desirable_reward": Metric(
        "Implicit reward of desirable answers",
        "reward units",
        "Sum over them, of all rows (KTO, BCO)",
        "rises",
    ),
    "undesirable_reward": Metric(
        "Implicit reward of undesirable answers", "reward units", "As of desirable ones", "falls"
    ),
    "desirable": Metric("Desirable answers", "share", "Of the rows of a batch"),
    "nll": Metric(
        "Negative log-likelihood",
        "nats a token",
        "Of the chosen, or desirable, answers",
        "rises by less than 0.1",
    ),
    "log_odds_ratio": Metric(
        "Log odds ratio", "nats", "Of chosen over rejected answers (ORPO)", "rises"
    ),
    "chosen": Metric("Score of chosen answers", "reward units", "By the reward model"),
    "rejected": Metric("Score of rejected answers", "reward units", "By the reward model"),
    "best": Metric("Highest score of a ranking", "reward units", "Mean over rankings"),
    "mean": Metric("Mean score of a ranking", "reward units", "Mean over rankings", "near 0"),
    "error": Metric("Error of scores", "reward units", "Mean |guess − target|", "falls"),
    "target": Metric("Target of scores", "reward units", "Mean over rows"),
    "steps": Metric("Steps", "count", "Of a row, mean (process reward models)"),
    "rows": Metric("Rows", "count", "Packed in a batch; held out: measured"),
    "packing_efficiency": Metric(
        "Packed tokens", "share", "Tokens of a packed batch that are no padding", "above 0.9"
    ),
}
"""Of learning from rows."""

SPEED = {
    "seconds": Metric("Seconds", "s", "Of the iteration, evaluations and saves left out"),
    "tokens_per_second": Metric(
        "Speed of an iteration",
        "tokens a second",
        "Generated tokens over the iteration's seconds; from rows: tokens of the batch",
        "steady",
    ),
    "mfu": Metric(
        "MFU: FLOPs of the update that the model needs, of the peak",
        "share",
        "6·N + 12·L·(heads·H)·T a token that is no padding, over the update's seconds",
        "above 0.3 on accelerators",
    ),
    "bandwidth_share": Metric(
        "Weights and keys that decoding reads, of the peak bandwidth",
        "share",
        "Bytes that decoding has to read over the seconds of sampling",
        "above 0.4 on accelerators",
    ),
    "sample_share": Metric(
        "Time of sampling in an iteration",
        "share",
        "Of the seconds of its phases",
        "0.3 to 0.7",
    ),
    "idle_share": Metric(
        "Steps of decoding for rows that had ended",
        "share",
        "1 − Σ (length − 1) / (rows at once · steps); `sample.slots` lowers it",
        "below 0.5",
    ),
    "recompiles": Metric(
        "Programs compiled anew",
        "count",
        "Those that an iteration after the first had to wait for",
        "0",
    ),
    "failed_saves": Metric(
        "Saves that failed", "count", "In a row; the run goes on, and tries again", "absent"
    ),
    "failed_uploads": Metric(
        "Copies to the output's URL that failed",
        "count",
        "Since the start; the run goes on, and tries again",
        "absent",
    ),
}
"""Of the machine."""

HELD_OUT = {
    "gold": Metric(
        "Gold measure",
        "reward units",
        "What `eval.gold` says, never trained on",
        "rises with `eval/proxy`",
    ),
    "proxy": Metric("Reward (proxy)", "reward units", "What the rewards say", "rises"),
    "kl_nats": Metric(
        "KL to the reference",
        "nats a sequence",
        "Mean of Σ_t log π − log π_ref at T = 1",
        "no more than the gold measure is worth",
    ),
    "length": Metric("Length", "tokens", "As in training", "below 1.5 times its start"),
    "ended": Metric("Ended", "share", "Completions that ended by themselves", "above 0.005"),
    "entropy": Metric(
        "Entropy", "nats a token", "−log π of the sampled tokens", "above 0.2 of its start"
    ),
    "distinct_1": Metric("Distinct tokens", "share", "Different tokens over tokens"),
    "distinct_2": Metric(
        "Distinct bigrams",
        "share",
        "Different bigrams over bigrams, of all completions",
        "above 0.3 of its start",
    ),
    "repetition_3": Metric(
        "Repeated 3-grams", "share", "3-grams of a completion that it has had before", "below 0.3"
    ),
    "unknown": Metric("Without a score", "share", "Completions that no reward judged", "0"),
    "accuracy": Metric(
        "Accuracy",
        "share",
        "Pairs, labels or steps that are judged right, a tie one half",
        "above 0.6",
    ),
    "accuracy_large_gap": Metric(
        "Accuracy, large gap", "share", "Of pairs at least 0.5 apart", "above `eval/accuracy`"
    ),
    "loss": Metric("Loss", "", "The training objective on held-out rows", "falls"),
    "accuracy_gap_N": Metric(
        "Accuracy, quarter N of the gaps", "share", "1 is of the closest pairs, 4 of the clearest"
    ),
    "ece": Metric(
        "Calibration error",
        "share",
        "Mean |share that came true − probability| over bins",
        "below 0.1",
    ),
    "pairs_large_gap": Metric("Pairs of a large gap", "count", "Those at least 0.5 apart"),
    "correlation": Metric("Correlation", "", "Pearson's, of score and target", "above 0.5"),
    "rank_correlation": Metric("Rank correlation", "", "Spearman's", "above 0.5"),
    "length_correlation": Metric(
        "Correlation with length", "", "Pearson's, of score and tokens", "within ± 0.5"
    ),
    "score_mean": Metric("Mean score", "reward units", "Over answers"),
    "score_std": Metric("Spread of scores", "reward units", "Standard deviation over answers"),
    "score_pN": Metric("Percentile N of scores", "reward units", "N is 5, 50 or 95"),
    "completions": Metric("Completions", "count", "How many were measured"),
    "rows": Metric("Rows", "count", "How many were measured"),
}
"""Of held-out rows (``eval/NAME``), where that differs from training, in their order."""

COUNTS = ("completions", "rows", "pairs", "pairs_large_gap")
"""Held-out figures that say how much was measured, which are not drawn."""

GROUPS: Mapping[str, Mapping[str, Metric]] = {
    "Rewards": REWARDS,
    "Sampling": ROLLOUT,
    "Updates": UPDATE,
    "Value function": CRITIC,
    "Learning from rows": ROWS,
    "Speed": SPEED,
}
"""All of an iteration, by what they are of."""

METRICS: Mapping[str, Metric] = {
    name: metric for group in GROUPS.values() for name, metric in group.items()
}
"""All of an iteration, by name."""

TERMINAL = {
    "reward": "reward",
    "kl": "KL",
    "entropy_estimate": "entropy",
    "loss": "loss",
    "accuracy": "accuracy",
    "explained_variance": "value expl. var.",
    "tokens_per_second": "tokens/s",
    "mfu": "MFU",
    "bandwidth_share": "bandwidth",
    "sample_share": "sampling",
    "idle_share": "idle",
}
"""What the terminal shows where a run has it, in this order, and what it is called there."""

DRAWN = (
    "reward",
    "score",
    "kl",
    "length",
    "entropy_estimate",
    "loss",
    "accuracy",
    "margin",
    "explained_variance",
    "clip_fraction",
    "approx_kl",
    "grad_norm",
    "learning_rate",
    "reward/excluded",
    "skipped",
    "tokens_per_second",
    "mfu",
    "bandwidth_share",
    "sample_share",
    "idle_share",
    "recompiles",
)
"""What the report draws over the iterations, in this order."""


def lookup(name: str) -> Metric | None:
    """The line of the table that a name of metrics.jsonl falls under, NAME and N in its title
    filled in; None if there is none."""
    if name in METRICS:
        return METRICS[name]
    family, _, rest = name.partition("/")
    if family in ("reward", "applies", "excluded") and rest:
        found = METRICS[f"{family}/NAME"]
        return found._replace(title=found.title.replace("NAME", rest))
    if family == "critic":
        return METRICS.get(rest)
    if family != "eval":
        return None
    bare = rest.removesuffix("_ci")
    stem = bare.rstrip("0123456789")
    if f"{stem}N" in HELD_OUT:
        found = HELD_OUT[f"{stem}N"]
        return found._replace(title=found.title.replace("N", bare[len(stem) :]))
    return HELD_OUT.get(bare) or METRICS.get(bare)


def titled(name: str) -> str:
    """What a held-out figure is called: its title, or its name where the table has none."""
    found = lookup(f"eval/{name}")
    return found.title if found else name


def tables() -> str:
    """The tables of docs/metrics.md, as Markdown."""
    groups = {**GROUPS, "Held-out rows (`eval/…`)": HELD_OUT}
    return "\n".join(f"## {title}\n\n{_table(group)}" for title, group in groups.items())


def _table(group: Mapping[str, Metric]) -> str:
    rows = (
        " | ".join(text.replace("|", "\\|") for text in (f"`{name}`", *metric))
        for name, metric in group.items()
    )
    head = "| name | what it is | unit | what it says | healthy |\n|---|---|---|---|---|\n"
    return head + "".join(f"| {row} |\n" for row in rows).replace("|  |", "| |")
