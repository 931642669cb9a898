"""Phi-3.5-MoE: layer norms, biases, two experts chosen by SparseMixer, longrope."""

from __future__ import annotations

from pyruntime.format.convert import moe
from pyruntime.format.convert.config import Config
from pyruntime.format.convert.family import Reading
from pyruntime.format.spec import RouterSpec

ARCHITECTURE = "PhimoeForCausalLM"


def read(config: Config) -> Reading:
    """config.json -> Reading."""
    router = RouterSpec(kind="sparse_mixer", epsilon=config.number("router_jitter_noise", 0.01))
    bias = config.flag("attention_bias")
    spec = config.decoder(
        "phimoe", qkv_bias=bias, o_bias=bias, theta=1e6, eps=1e-5, norm="layer",
        head_bias=config.flag("lm_head_bias"), **config.windows(),
        experts=moe.read_experts(config, router, top_k=2, experts=16),
    )  # fmt: skip
    return Reading(
        spec, moe.MODULES,
        lambda weights: moe.view(
            weights, spec, moe.MIXTRAL,
            routers=("block_sparse_moe.gate.weight", "mlp.router.weight"),
        ),
        tuple(config.notes),
    )  # fmt: skip
