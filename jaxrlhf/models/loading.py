"""From a path to a description and its weights, whatever format lies there."""

import functools
from pathlib import Path
from typing import Any

from jaxrlhf.config import DecoderConfig, ModelConfig, load
from jaxrlhf.errors import InputError
from jaxrlhf.models.gguf import read_gguf, read_gguf_decoder, smollm2_path
from jaxrlhf.models.hf import read_hf
from jaxrlhf.models.hf_config import read_config
from jaxrlhf.models.transformer import Model


def build(config: ModelConfig) -> Model:
    """The model that ``config`` describes: static, no weights are read.

    Raises:
      InputError: if ``path`` and ``decoder`` are both missing, or the path holds no model.
    """
    decoder = config.decoder or read_decoder(config.path)
    return Model(decoder=decoder, dtype=config.dtype, lora=config.lora, remat=config.remat)


def read_decoder(path: str) -> DecoderConfig:
    """The shape of the model at ``path``, from its header alone."""
    source = Path(path)
    if (source / "config.yaml").is_file():
        return build(load(source / "config.yaml").model).decoder
    if gguf := gguf_file(path):
        return read_gguf_decoder(gguf)
    return read_config(folder(path) / "config.json")


def read_weights(path: str) -> tuple[DecoderConfig, Any]:
    """The model at ``path``: its shape, and its weights as float32 numpy arrays."""
    if gguf := gguf_file(path):
        return read_gguf(gguf)
    return read_hf(folder(path))


@functools.lru_cache(maxsize=8)
def gguf_file(path: str) -> Path | None:
    """The .gguf file that ``path`` means, if it means one."""
    if path == "smollm2":
        return smollm2_path()
    return Path(path) if path.endswith(".gguf") else None


def folder(path: str) -> Path:
    """``path`` as an existing folder.

    Raises:
      InputError: if it is none.
    """
    if not path or not Path(path).is_dir():
        raise InputError(
            f"model.path={path!r}: no such folder; give smollm2, a Hugging Face folder, a .gguf "
            "file or the output folder of a run"
        )
    return Path(path)
