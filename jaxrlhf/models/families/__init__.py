"""The families of models that are read and written, by the ``model_type`` of transformers."""

from jaxrlhf.models.families import (
    cohere2,
    gemma,
    gemma4,
    glm4,
    gpt,
    gpt_oss,
    llama,
    mixtures,
    olmo,
    phi3,
    qwen,
)
from jaxrlhf.models.families.family import FIELDS, Family, Said, rope

__all__ = ["FAMILIES", "FIELDS", "Family", "Said", "rope"]

_MODULES = (llama, qwen, gemma, gemma4, olmo, phi3, glm4, cohere2, gpt, mixtures, gpt_oss)

FAMILIES: dict[str, Family] = {
    family.name: family for module in _MODULES for family in module.FAMILIES
}
