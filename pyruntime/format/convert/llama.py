"""Llama 2, 3, 3.1, 3.2 and models that share their code."""

from __future__ import annotations

from types import MappingProxyType

from pyruntime.format.convert.config import Config
from pyruntime.format.convert.family import Modules, Reading

ARCHITECTURE = "LlamaForCausalLM"
MODULES: Modules = MappingProxyType({
    "embed": ("model.embed_tokens",),
    "lm_head": ("lm_head",),
    "norm": ("model.norm",),
    "layers.{i}.attn.norm": ("model.layers.{i}.input_layernorm",),
    "layers.{i}.attn.q": ("model.layers.{i}.self_attn.q_proj",),
    "layers.{i}.attn.kv": (
        "model.layers.{i}.self_attn.k_proj", "model.layers.{i}.self_attn.v_proj",
    ),
    "layers.{i}.attn.o": ("model.layers.{i}.self_attn.o_proj",),
    "layers.{i}.mlp.norm": ("model.layers.{i}.post_attention_layernorm",),
    "layers.{i}.mlp.gate_up": (
        "model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj",
    ),
    "layers.{i}.mlp.down": ("model.layers.{i}.mlp.down_proj",),
})  # fmt: skip


def read(config: Config) -> Reading:
    """config.json -> Reading."""
    bias = config.flag("attention_bias")
    mlp_bias = config.flag("mlp_bias")
    spec = config.decoder("llama", qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias)
    return Reading(spec, MODULES, notes=tuple(config.notes))
