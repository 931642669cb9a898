"""DeepSeek-V3 and R1: as V2, but sigmoid scores, a selection bias, and 8-bit weights on disk."""

from __future__ import annotations

from pyruntime.format.convert import fp8, latent, moe
from pyruntime.format.convert.checkpoint import Checkpoint
from pyruntime.format.convert.config import Config
from pyruntime.format.convert.deepseek_v2 import read_experts
from pyruntime.format.convert.derive import Derivation
from pyruntime.format.convert.family import Reading
from pyruntime.format.spec import RouterSpec

ARCHITECTURE = "DeepseekV3ForCausalLM"


def read(config: Config) -> Reading:
    """config.json -> Reading."""
    config.require("scoring_func", "sigmoid")
    config.require("topk_method", "noaux_tc")
    router = RouterSpec(
        score="sigmoid",
        normalize=config.flag("norm_topk_prob", True),
        epsilon=1e-20,
        scale=config.number("routed_scaling_factor", 2.5),
        selection_bias=True,
        groups=config.integer("n_group", 8),
        top_groups=config.integer("topk_group", 4),
        group_score="sum2",
    )
    bias = config.flag("attention_bias")
    block = fp8.block_size(config)
    interleaved = config.flag("rope_interleave", True)
    key = "num_nextn_predict_layers"
    ahead = 0 if config.data.get(key) == 0 else config.integer(key, 1)
    spec = config.decoder(
        "deepseek_v3", qkv_bias=bias, o_bias=bias, quantized=True,
        experts=read_experts(config, router, dense=3, experts=256, shared=1),
        **latent.read_latent(config),
    )  # fmt: skip

    def view(weights: Checkpoint) -> Checkpoint:
        made = Derivation(weights)
        # What predicts further tokens ahead is stored as layers after the last one.
        for extra in range(ahead):
            made.drop(f"model.layers.{spec.num_layers + extra}.")
        weights = made.result()
        if block is not None:
            weights = fp8.dequantized(weights, block)
        return latent.view(moe.view(weights, spec, moe.SINGLE), spec, interleaved)

    return Reading(spec, latent.MODULES, view, tuple(config.notes))
