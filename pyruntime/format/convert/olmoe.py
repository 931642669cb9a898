"""OLMoE: one norm over all heads of the queries, and of the keys."""

from __future__ import annotations

from types import MappingProxyType

from pyruntime.format.convert import moe, qwen3
from pyruntime.format.convert.config import Config
from pyruntime.format.convert.family import Modules, Reading
from pyruntime.format.spec import RouterSpec

ARCHITECTURE = "OlmoeForCausalLM"
MODULES: Modules = MappingProxyType({**qwen3.MODULES, **moe.MODULES})


def read(config: Config) -> Reading:
    """config.json -> Reading."""
    config.require("clip_qkv")
    router = RouterSpec(normalize=config.flag("norm_topk_prob"), round_weights=True)
    bias = config.flag("attention_bias")
    spec = config.decoder(
        "olmoe", qkv_bias=bias, o_bias=bias, eps=1e-5, qk_norm=True, qk_norm_span="all",
        experts=moe.read_experts(config, router, top_k=8, experts=64),
    )  # fmt: skip
    return Reading(
        spec, MODULES, lambda weights: moe.view(weights, spec, moe.SINGLE), tuple(config.notes)
    )
