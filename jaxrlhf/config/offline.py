"""Algorithms that learn from the rows of a file: one dataclass each, told apart by ``name``."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxrlhf.config.on_policy import PreferenceKind

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
