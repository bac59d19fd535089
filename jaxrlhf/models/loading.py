"""From a path to a description, whatever format lies there."""

from jaxrlhf.config import ModelConfig
from jaxrlhf.models.reading import read_decoder
from jaxrlhf.models.transformer import Model


def build(config: ModelConfig, head: bool = False) -> Model:
    """The model that ``config`` describes: static, no weights are read; ``head`` as in ``read_hf``.

    Raises:
      InputError: if ``path`` and ``decoder`` are both missing, or the path holds no model.
    """
    decoder = config.decoder or read_decoder(config.path, head)
    return Model(decoder=decoder, dtype=config.dtype, lora=config.lora, remat=config.remat)
