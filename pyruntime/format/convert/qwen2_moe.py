"""Qwen1.5-MoE and Qwen2-MoE: some layers dense, and an expert that every token also runs."""

from __future__ import annotations

from types import MappingProxyType

from pyruntime.format.convert import moe
from pyruntime.format.convert.config import Config
from pyruntime.format.convert.family import Modules, Reading
from pyruntime.format.spec import RouterSpec

ARCHITECTURE = "Qwen2MoeForCausalLM"
_SHARED = "model.layers.{i}.mlp.shared_expert"
MODULES: Modules = MappingProxyType({
    **moe.MODULES,
    "layers.{i}.mlp.shared.gate_up": (f"{_SHARED}.gate_proj", f"{_SHARED}.up_proj"),
    "layers.{i}.mlp.shared.down": (f"{_SHARED}.down_proj",),
    "layers.{i}.mlp.shared.gate": (f"{_SHARED}_gate",),
})  # fmt: skip


def read(config: Config) -> Reading:
    """config.json -> Reading."""
    # The original code rounds the weights to the model's dtype before it multiplies.
    router = RouterSpec(normalize=config.flag("norm_topk_prob"), round_weights=True)
    experts = moe.read_experts(
        config, router, top_k=4, experts=60, layers=sparse_layers(config),
        width=("moe_intermediate_size",), shared_gate=True,
        shared_size=config.integer("shared_expert_intermediate_size", 5632),
    )  # fmt: skip
    bias = config.flag("qkv_bias", True)
    spec = config.decoder("qwen2_moe", qkv_bias=bias, o_bias=False, experts=experts)
    return Reading(
        spec, MODULES, lambda weights: moe.view(weights, spec, moe.SINGLE), tuple(config.notes)
    )


def sparse_layers(config: Config) -> tuple[int, ...]:
    """Every `decoder_sparse_step`-th layer, but for `mlp_only_layers`."""
    count = config.integer("num_hidden_layers")
    step = config.integer("decoder_sparse_step", 1)
    dense = config.layers("mlp_only_layers", count)
    return tuple(i for i in range(count) if (i + 1) % step == 0 and i not in dense)
