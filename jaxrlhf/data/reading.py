"""The rows of a file as a run's algorithm reads them, tokenised and checked."""

from dataclasses import replace
from typing import Any

from jaxrlhf.config import (
    Config,
    ListwiseRewardModelConfig,
    OfflineConfig,
    PointwiseRewardModelConfig,
    ProcessRewardModelConfig,
    RewardModelConfig,
    SFTConfig,
    is_on_policy,
)
from jaxrlhf.data.formats import read_completions, read_labelled, read_pairs, read_prompts
from jaxrlhf.data.judged import read_ranked, read_scored, read_steps
from jaxrlhf.data.rows import Rows, read_rows
from jaxrlhf.data.tokens import Encoded, encode_rows
from jaxrlhf.errors import InputError

READERS = {
    "pairs": read_pairs,
    "completions": read_completions,
    "labelled": read_labelled,
    "judged": read_labelled,
    "ranked": read_ranked,
    "scored": read_scored,
    "steps": read_steps,
}
"""How the rows of a file are read, by what they are to hold."""


def load_data(config: Config, path: str, tokenizer: Any, vocab: int) -> Rows[Encoded]:
    """The rows of a file as the run's algorithm reads them, tokenised and checked.

    Args:
      vocab: rows of the model's embedding table.
    """
    skip, kind = config.data.skip_bad_rows, config.algorithm
    read: Any = READERS[kind.rows] if isinstance(kind, OfflineConfig) else read_prompts
    options: dict[str, Any] = {}
    if isinstance(kind, PointwiseRewardModelConfig):
        options = {"binary": kind.kind == "binary"}
    if isinstance(kind, ProcessRewardModelConfig):
        options = {"separator": kind.separator}
    if isinstance(kind, SFTConfig):
        options = {"train_on": kind.train_on}
    rows = read(read_rows(path, skip), tokenizer, skip, **options)
    limit = config.data.max_prompt_tokens if is_on_policy(config) else config.data.max_tokens
    return encode_rows(rows, tokenizer, vocab, limit, config.sample.stop, skip)


NORMALISED = 128
"""Answers that a normalisation is measured on, at most: its mean is then right to a tenth of the
standard deviation."""


def normalise_path(config: Config) -> str:
    """The file of the answers that a reward model's scores are normalised on; empty if none."""
    kind = config.algorithm
    scalar = (RewardModelConfig, ListwiseRewardModelConfig, PointwiseRewardModelConfig)
    return kind.normalise_on if isinstance(kind, scalar) else ""


def load_normalise_rows(config: Config, tokenizer: Any, vocab: int) -> Rows[Encoded] | None:
    """The answers that a reward model's scores are normalised on; None if they are not.

    Raises:
      InputError: fewer than two rows, or bad ones.
    """
    path, skip = normalise_path(config), config.data.skip_bad_rows
    if not path:
        return None
    rows = read_completions(read_rows(path, skip), tokenizer, skip)
    rows = encode_rows(rows, tokenizer, vocab, config.data.max_tokens, config.sample.stop, skip)
    if len(rows) < 2:
        raise InputError(f"algorithm.normalise_on={path}: one row has no spread; give more")
    return replace(rows, items=rows.items[:NORMALISED])
