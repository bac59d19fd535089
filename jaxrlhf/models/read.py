"""From a path to weights, whatever format lies there; without JAX, whose import takes as long."""

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from jaxrlhf.config import Config, DecoderConfig, ModelConfig, load
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.remote import here
from jaxrlhf.core.shown import shown
from jaxrlhf.models.gguf import read_gguf_decoder, smollm2_path, source_of_gguf
from jaxrlhf.models.hf import has_weights, open_hf
from jaxrlhf.models.hf_config import is_reward_model, read_config, read_kept
from jaxrlhf.models.hub import adapts_scorer, base_of, is_adapter, local
from jaxrlhf.models.names import Weight
from jaxrlhf.models.source import Source

MOST_AHEAD = 2**30
"""Bytes of weights that are read ahead into memory. Larger ones are read by parts where they are
wanted, lest each process of a run have all of them."""

MOST_RUNS = 100
"""Runs of which each starts from the next."""

_begun: dict[str, Future[Source]] = {}
"""What is being read ahead, by path."""


def is_run(path: str) -> bool:
    """Whether ``path`` is the output folder of a run."""
    if path.startswith("words:"):
        return False
    return os.path.isfile(os.path.join(here(path), "config.yaml"))


def run_config(folder: str) -> Config:
    """The resolved config of a run.

    Raises:
      InputError: ``folder`` is not the output folder of a run; its model, or tokenizer, is that of
        a run that leads back to one before it.
    """
    if not is_run(folder):
        raise InputError(f"{folder}: not the output folder of a run (it holds no config.yaml)")
    config = load(Path(here(folder)) / "config.yaml")
    _check_origin(folder, config, [], set())
    return config


def _check_origin(folder: str, config: Config, before: list[str], ended: set[str]) -> None:
    """Raise InputError if a run's model is one of the runs ``before`` it, or its own.

    Args:
      ended: runs that are known to lead to an end; each is read once.
    """
    this = os.path.realpath(here(folder))
    if this in before or len(before) == MOST_RUNS:
        what = "its model is its own" if this in before else f"more than {MOST_RUNS} runs long"
        raise InputError(
            f"{folder}: {what}, by model.path and model.tokenizer of the config.yaml of each run: "
            "mend one"
        )
    for path in (config.model.path, config.model.tokenizer):
        if is_run(path) and os.path.realpath(here(path)) not in ended:
            _check_origin(path, load(Path(here(path)) / "config.yaml"), [*before, this], ended)
    ended.add(this)


def is_reward_folder(path: str) -> bool:
    """Whether ``path`` is a reward model's Hugging Face folder: a …ForSequenceClassification, or an
    adapter with a score."""
    if is_adapter(path):
        return adapts_scorer(path)
    return is_reward_model(Path(local(path)) / "config.json")


def read_decoder(path: str, head: bool = False) -> DecoderConfig:
    """The shape of the model at ``path``, from its header alone; ``head`` as in ``read_hf``."""
    if is_run(path):
        model = run_config(path).model
        return model.decoder or read_decoder(model.path)
    if is_adapter(path):
        base = base_of(path)
        return read_decoder(base, is_reward_folder(base))
    if gguf := gguf_file(path):
        return read_gguf_decoder(gguf)
    return read_config(folder(path) / "config.json", head)


def read_weights(path: str, head: bool = False) -> Source:
    """The weights at ``path``, in memory where ``read_ahead`` has begun it, whose end is waited
    for; else where they lie.

    ``head``: as in ``read_hf``.
    """
    if head:
        return open_hf(folder(path), head)
    return _begun.pop(path).result() if path in _begun else _open(path)


def read_ahead(config: ModelConfig) -> None:
    """Begins to read the weights that a run starts from, in a thread, for ``read_weights``.

    What cannot be read is said there, not here. A process that ends does not wait for the thread.
    """
    if config.decoder is not None or is_run(config.path) or is_adapter(config.path):
        return  # made, or to be merged
    begun: Future[Source] = Future()

    def work() -> None:
        try:
            source = _open(config.path)
            begun.set_result(source.hold() if source.bytes() <= MOST_AHEAD else source)
        except BaseException as error:
            begun.set_exception(error)

    _begun[config.path] = begun
    threading.Thread(target=work, name="read ahead", daemon=True).start()


def _open(path: str) -> Source:
    if gguf := gguf_file(path):
        return source_of_gguf(gguf)
    return open_hf(folder(path))


def kept_dtypes(path: str, head: bool = False) -> Callable[[Weight], str]:
    """What each weight at ``path`` can be kept in without loss, float32 or bfloat16, from headers
    alone; of a folder without weights, as its config.json says."""
    if gguf_file(path) or has_weights(folder(path)):
        return (open_hf(folder(path), head) if head else _open(path)).kept
    kept = read_kept(folder(path) / "config.json")
    return lambda _: kept


@functools.lru_cache(maxsize=8)
def gguf_file(path: str) -> Path | None:
    """The .gguf file that ``path`` means, if it means one."""
    if path == "smollm2":
        return smollm2_path()
    return Path(here(path)) if path.endswith(".gguf") else None


def folder(path: str) -> Path:
    """``path`` as an existing folder, of the hub's cache if it is the name of a repository.

    Raises:
      InputError: if it is none.
    """
    found = local(path)
    if not found or not os.path.isdir(found):
        raise InputError(
            f"model.path={shown(path, 200)}: no such folder; give smollm2, a Hugging Face folder, "
            "org/name of its hub, a .gguf file or the output folder of a run"
        )
    return Path(found)
