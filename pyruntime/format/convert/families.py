"""The families that can be converted, by the `model_type` of their config.json."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from pyruntime.format.convert import (
    deepseek_v2,
    deepseek_v3,
    gpt_oss,
    granitemoe,
    llama,
    mixtral,
    olmoe,
    phimoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    switch_transformers,
)
from pyruntime.format.convert.family import Family

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": llama,
        "qwen2": qwen2,
        "qwen3": qwen3,
        "mixtral": mixtral,
        "qwen2_moe": qwen2_moe,
        "qwen3_moe": qwen3_moe,
        "olmoe": olmoe,
        "granitemoe": granitemoe,
        "deepseek_v2": deepseek_v2,
        "deepseek_v3": deepseek_v3,
        "gpt_oss": gpt_oss,
        "phimoe": phimoe,
        "switch_transformers": switch_transformers,
    }
)
# Those of vision transformers, whose tensors say more about them than their config.json.
VISION = ("vit", "deit", "dinov2", "dinov2_with_registers")
