"""Settings of what learns from the rows of a file: policies first, then reward models."""

from dataclasses import dataclass
from typing import ClassVar, Literal

PreferenceKind = Literal[
    "sigmoid", "robust", "ipo", "hinge", "exo_pair", "sppo_hard", "apo_zero", "apo_down"
]
"""Losses on pairs relative to a reference; preference_loss gives the formulas."""

Rows = Literal["pairs", "completions", "labelled", "judged", "ranked", "scored", "steps"]
"""What the data holds: ``labelled`` answers are compared with answers to other prompts, ``judged``
ones, labelled as well, are not; ``ranked`` are several answers in order, ``scored`` ones have a
number each, ``steps`` a label for each step of an answer."""


@dataclass(frozen=True)
class OfflineConfig:
    """What all of them have; class variables are no settings, but what a run has to provide."""

    rows: ClassVar[Rows] = "pairs"
    has_reference: ClassVar[bool] = False
    """Compares the policy with a reference."""
    whole_batch: ClassVar[bool] = False
    """Has a mean over the batch inside its loss: no microbatches."""
    is_reward_model: ClassVar[bool] = False
    """Trains the scalar head to judge, instead of a policy to write."""
    normalise_on: ClassVar[str] = ""
    """See ``ScalarConfig``; only scores of whole answers are normalised."""

    name: str = ""


@dataclass(frozen=True)
class SFTConfig(OfflineConfig):
    """Supervised fine-tuning: the negative log-likelihood of completions."""

    rows: ClassVar[Rows] = "completions"
    name: Literal["sft"] = "sft"
    train_on: Literal["completion", "assistant"] = "completion"
    """Of chats: imitate the completion (of ``messages``, the last turn), or all turns of the
    assistant's, those in the prompt too."""


@dataclass(frozen=True)
class DPOConfig(OfflineConfig):
    """Direct preference optimisation and its relatives on pairs (arXiv:2305.18290)."""

    has_reference: ClassVar[bool] = True
    name: Literal["dpo"] = "dpo"
    kind: PreferenceKind = "sigmoid"
    """The loss; with label_smoothing, sigmoid is cDPO."""
    beta: float = 0.1
    """β: how strongly the reference holds (nats a unit of implicit reward)."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong (sigmoid, robust, exo_pair)."""
    mean_logp: bool = False
    """Mean log-probs over an answer's tokens instead of sums: IPO per token."""
    sft_coef: float = 0.0
    """Weight of the negative log-likelihood of the chosen answer (nats a token)."""


@dataclass(frozen=True)
class ORPOConfig(OfflineConfig):
    """Odds-ratio preference optimisation: SFT plus an odds-ratio term (arXiv:2403.07691)."""

    name: Literal["orpo"] = "orpo"
    beta: float = 0.1
    """Weight of the odds-ratio term."""
    sft_coef: float = 1.0
    """Weight of the negative log-likelihood of the chosen answer (nats a token)."""


@dataclass(frozen=True)
class SimPOConfig(OfflineConfig):
    """Simple preference optimisation: mean log-probs, a margin, no reference (arXiv:2405.14734)."""

    name: Literal["simpo"] = "simpo"
    beta: float = 2.0
    """Scale of the mean log-prob."""
    margin: float = 1.0
    """The paper's γ: wanted difference of β·mean log-probs."""
    sft_coef: float = 0.0
    """Weight of the negative log-likelihood of the chosen answer (nats a token)."""


@dataclass(frozen=True)
class CPOConfig(OfflineConfig):
    """Contrastive preference optimisation: DPO's loss without reference (arXiv:2401.08417)."""

    name: Literal["cpo"] = "cpo"
    beta: float = 0.1
    """Scale of the summed log-prob."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong."""
    sft_coef: float = 1.0
    """Weight of the negative log-likelihood of the chosen answer (nats a token)."""


@dataclass(frozen=True)
class KTOConfig(OfflineConfig):
    """Kahneman-Tversky optimisation on single labelled answers (arXiv:2402.01306)."""

    rows: ClassVar[Rows] = "labelled"
    has_reference: ClassVar[bool] = True
    whole_batch: ClassVar[bool] = True
    name: Literal["kto"] = "kto"
    beta: float = 0.1
    """β: how strongly the reference holds."""
    desirable_weight: float = 1.0
    """Weight of rows labelled true."""
    undesirable_weight: float = 1.0
    """Weight of rows labelled false."""


@dataclass(frozen=True)
class BCOConfig(OfflineConfig):
    """Binary classifier optimisation on single labelled answers (arXiv:2404.04656)."""

    rows: ClassVar[Rows] = "judged"
    has_reference: ClassVar[bool] = True
    whole_batch: ClassVar[bool] = True
    name: Literal["bco"] = "bco"
    beta: float = 0.1
    """β: how strongly the reference holds."""


@dataclass(frozen=True)
class ScalarConfig:
    """Settings of reward models that give an answer one score."""

    is_reward_model: ClassVar[bool] = True
    score_l2: float = 0.0
    """Weight of the mean of score² over a row's answers."""
    normalise_on: str = ""
    """Rows of prompt and completion, the SFT policy's samples, say, whose scores are to have mean 0
    and standard deviation 1 once training ends; the first 128 are measured. Empty: scores stay as
    they are."""


@dataclass(frozen=True)
class RewardModelConfig(ScalarConfig, OfflineConfig):
    """A scalar reward model trained on preference pairs (Bradley-Terry; arXiv:2203.02155)."""

    name: Literal["reward_model"] = "reward_model"
    centre_coef: float = 0.0
    """Weight of (r_chosen + r_rejected)², which keeps scores around 0 (arXiv:2312.09244)."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong."""


@dataclass(frozen=True)
class ListwiseRewardModelConfig(ScalarConfig, OfflineConfig):
    """A scalar reward model trained on rankings of 2 to K responses (Plackett-Luce)."""

    rows: ClassVar[Rows] = "ranked"
    name: Literal["listwise_reward_model"] = "listwise_reward_model"
    as_pairs: bool = False
    """Bradley-Terry on all pairs of unequal rank instead, each prompt with weight 1 in total."""


@dataclass(frozen=True)
class PointwiseRewardModelConfig(ScalarConfig, OfflineConfig):
    """A scalar reward model trained on answers with a score, one by one."""

    rows: ClassVar[Rows] = "scored"
    name: Literal["pointwise_reward_model"] = "pointwise_reward_model"
    kind: Literal["mse", "huber", "binary"] = "mse"
    """Regression with (r − score)², the same beyond ``delta`` linear, or cross-entropy of σ(r)
    with a label, or a score in [0, 1]."""
    delta: float = 1.0
    """Error above which the Huber loss is linear (units of the score)."""


@dataclass(frozen=True)
class ProcessRewardModelConfig(OfflineConfig):
    """A score at the end of each step of an answer (arXiv:2211.14275, arXiv:2305.20050)."""

    rows: ClassVar[Rows] = "steps"
    is_reward_model: ClassVar[bool] = True
    name: Literal["process_reward_model"] = "process_reward_model"
    separator: str = "\n"
    """Text between two steps: joins a row's steps, and cuts what a policy has sampled."""
    aggregate: Literal["min", "product", "last"] = "min"
    """An answer's reward: least, product or last of its steps' probabilities of being right."""
    score_l2: float = 0.0
    """Weight of the mean of score² (a log-odds, squared) over a row's steps."""
