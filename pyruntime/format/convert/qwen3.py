"""Qwen3 (dense): a norm on every query and key head, and a head width of its own."""

from __future__ import annotations

from types import MappingProxyType

from pyruntime.format.convert import llama
from pyruntime.format.convert.config import Config
from pyruntime.format.convert.family import Modules, Reading

ARCHITECTURE = "Qwen3ForCausalLM"
MODULES: Modules = MappingProxyType({
    **llama.MODULES,
    "layers.{i}.attn.q_norm": ("model.layers.{i}.self_attn.q_norm",),
    "layers.{i}.attn.k_norm": ("model.layers.{i}.self_attn.k_norm",),
})  # fmt: skip


def read(config: Config) -> Reading:
    """config.json -> Reading."""
    bias = config.flag("attention_bias")
    width = config.integer("head_dim", 128)
    spec = config.decoder("qwen3", qkv_bias=bias, o_bias=bias, qk_norm=True, head_dim=width)
    return Reading(spec, MODULES, notes=tuple(config.notes))
