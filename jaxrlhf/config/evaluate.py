"""What ``jaxrlhf eval`` is to measure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from jaxrlhf.config.checks import check_seed
from jaxrlhf.config.ranges import below_least
from jaxrlhf.errors import InputError


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a policy on held-out prompts: sampled at T = 1, untruncated."""

    model: str
    """The output folder of a run, or smollm2, a Hugging Face folder, a .gguf file."""
    data: str = ""
    """Prompts, a .jsonl or .parquet file; "" = the run's data.eval."""
    reference: str = ""
    """What the KL is measured to and the best of n is drawn from; as model. "" = the run's
    reference."""
    against: str = ""
    """Whose completions are to be beaten; as model. "" = the reference."""
    reward: str = ""
    """Gold measure: sentiment, or package.module:function. "" = the run's eval.gold."""
    reward_model: str = ""
    """Gold measure, instead: a reward model, as ``rewards.model``."""
    n: int = 8
    """Completions a prompt, of the model and of ``against``."""
    best_of: int = 64
    """Completions a prompt of the reference, for the best-of-n curve; 0 leaves it out."""
    correct_at: float | None = None
    """A completion with at least this gold measure (without one: reward) is correct, for pass@k and
    maj@k. None: the full score of a verifier, where one alone measures; else 1, if all are 0 or 1;
    else neither is measured."""
    max_new_tokens: int | None = None
    """Most tokens of a completion. None: as the run samples; what its data.max_tokens leaves, at
    least 16, if it learnt from rows; 64 for a model that is no run."""
    rows: int = 64
    """Completions that are drawn at once on each device."""
    fsdp: int | None = None
    """Pieces that parameters are split into by their embed axis; None: as the run."""
    tensor: int | None = None
    """Pieces that heads, mlp and vocabulary are split into; None: as the run."""
    context: int | None = None
    """Pieces that the tokens of whole rows are split into; None: as the run."""
    seed: int = 0
    """Every draw follows from it."""
    output: str = ""
    """Folder that evaluation.json is written to; "" = the run's."""


def check_evaluate(wish: EvaluateConfig) -> None:
    """Refuse numbers out of their range, and two gold measures.

    Raises:
      InputError: the first that cannot be.
    """
    least = {
        "n": 1,
        "best_of": 0,
        "max_new_tokens": 1,
        "rows": 1,
        "fsdp": 1,
        "tensor": 1,
        "context": 1,
    }
    for problem in below_least(vars(wish), least):
        raise InputError(problem)
    check_seed(wish.seed)
    if wish.correct_at is not None and not math.isfinite(wish.correct_at):
        raise InputError(f"correct_at={wish.correct_at}: must be a finite number")
    if wish.reward and wish.reward_model:
        raise InputError("reward and reward_model are both given: keep one of them")


def parse_evaluate(words: Sequence[str]) -> EvaluateConfig:
    """The words after ``jaxrlhf eval``, checked.

    Raises:
      InputError: a value that cannot be.
      SystemExit: on ``--help``, and on words that tyro refuses.
    """
    positional = (tyro.conf.PositionalRequiredArgs,)
    wish = tyro.cli(EvaluateConfig, prog="jaxrlhf eval", args=words, config=positional)
    check_evaluate(wish)
    return wish
