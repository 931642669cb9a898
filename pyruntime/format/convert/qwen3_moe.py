"""Qwen3-MoE: Qwen3's attention, experts as Qwen2-MoE's, and none that is shared."""

from __future__ import annotations

from types import MappingProxyType

from pyruntime.format.convert import moe, qwen3
from pyruntime.format.convert.config import Config
from pyruntime.format.convert.family import Modules, Reading
from pyruntime.format.convert.qwen2_moe import sparse_layers
from pyruntime.format.spec import RouterSpec

ARCHITECTURE = "Qwen3MoeForCausalLM"
MODULES: Modules = MappingProxyType({**qwen3.MODULES, **moe.MODULES})


def read(config: Config) -> Reading:
    """config.json -> Reading."""
    router = RouterSpec(normalize=config.flag("norm_topk_prob"), round_weights=True)
    experts = moe.read_experts(
        config, router, top_k=8, experts=128, layers=sparse_layers(config),
        width=("moe_intermediate_size",),
    )  # fmt: skip
    bias = config.flag("attention_bias")
    spec = config.decoder("qwen3_moe", qkv_bias=bias, o_bias=bias, qk_norm=True, experts=experts)
    return Reading(
        spec, MODULES, lambda weights: moe.view(weights, spec, moe.SINGLE), tuple(config.notes)
    )
