"""Qwen3 (dense): a norm on every query and key head, and a head width of its own."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from pyruntime.format.convert import llama
from pyruntime.format.convert.config import Config
from pyruntime.format.spec import DecoderSpec

ARCHITECTURE = "Qwen3ForCausalLM"
MODULES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        **llama.MODULES,
        "layers.{i}.attn.q_norm": ("model.layers.{i}.self_attn.q_norm",),
        "layers.{i}.attn.k_norm": ("model.layers.{i}.self_attn.k_norm",),
    }
)


def read(config: Config) -> DecoderSpec:
    """config.json -> DecoderSpec."""
    bias = config.flag("attention_bias")
    return config.decoder("qwen3", qkv_bias=bias, o_bias=bias, qk_norm=True, head_dim=128)
