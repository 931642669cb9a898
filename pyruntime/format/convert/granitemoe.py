"""Granite 3.0 MoE: experts in one tensor, and multipliers where Llama has none."""

from __future__ import annotations

from pyruntime.format.convert import moe
from pyruntime.format.convert.config import Config
from pyruntime.format.convert.family import Reading
from pyruntime.format.spec import RouterSpec

ARCHITECTURE = "GraniteMoeForCausalLM"
_BLOCK = "block_sparse_moe"
_FUSED = f"{_BLOCK}.input_linear.weight"
_SPELLINGS = (
    moe.Spelling(_FUSED, _FUSED, f"{_BLOCK}.output_linear.weight"),
    moe.Spelling(*(name.replace("mlp", _BLOCK) for name in moe.FUSED)),
)


def read(config: Config) -> Reading:
    """config.json -> Reading."""
    router = RouterSpec(over_chosen=True, round_weights=True)
    bias = config.flag("attention_bias")
    spec = config.decoder(
        "granitemoe", qkv_bias=bias, o_bias=bias,
        embedding_multiplier=config.number("embedding_multiplier", 1.0),
        attention_scale=config.number("attention_multiplier", 1.0),
        residual_multiplier=config.number("residual_multiplier", 1.0),
        logits_scaling=config.number("logits_scaling", 1.0),
        experts=moe.read_experts(config, router, top_k=2, experts=8),
    )  # fmt: skip
    return Reading(
        spec, moe.MODULES,
        lambda weights: moe.view(
            weights, spec, *_SPELLINGS,
            routers=(f"{_BLOCK}.router.layer.weight", f"{_BLOCK}.router.weight"),
        ),
        tuple(config.notes),
    )  # fmt: skip
