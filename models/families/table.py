"""The table of families, by name."""

from collections.abc import Mapping

from graphgen.models.families import (
    bloom,
    deepseek,
    falcon,
    gemma,
    glm,
    gpt2,
    gpt_oss,
    granite_moe,
    kin,
    layer_norm,
    llama,
    llama4,
    mixtral,
    neox,
    norms_of_heads,
    olmo,
    opt,
    phi3,
    qwen,
    qwen_moe,
    towers,
)
from graphgen.models.families.family import Family

_MODULES = (
    *(llama, qwen, phi3, gemma, kin, norms_of_heads, olmo, glm, layer_norm, neox, falcon, gpt2, opt, bloom),
    *(mixtral, qwen_moe, granite_moe, gpt_oss, llama4, deepseek, towers),
)
FAMILIES: Mapping[str, Family] = {family.name: family for module in _MODULES for family in module.FAMILIES}
"""In the order of docs/models.md."""


def families_of_type(model_type: str) -> list[Family]:
    """The rows of one model type, of which the conditions choose."""
    return [family for family in FAMILIES.values() if family.model_type == model_type]
