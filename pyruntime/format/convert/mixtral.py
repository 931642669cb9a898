"""Mixtral 8x7B and 8x22B."""

from __future__ import annotations

from pyruntime.format.convert import moe
from pyruntime.format.convert.config import Config
from pyruntime.format.convert.family import Reading
from pyruntime.format.spec import RouterSpec

ARCHITECTURE = "MixtralForCausalLM"


def read(config: Config) -> Reading:
    """config.json -> Reading."""
    router = RouterSpec(normalize=True)
    spec = config.decoder(
        "mixtral", qkv_bias=False, o_bias=False, theta=1e6, eps=1e-5, **config.windows(),
        experts=moe.read_experts(config, router, top_k=2, experts=8),
    )  # fmt: skip
    return Reading(
        spec, moe.MODULES,
        lambda weights: moe.view(
            weights, spec, moe.MIXTRAL, routers=("block_sparse_moe.gate.weight",)
        ),
        tuple(config.notes),
    )  # fmt: skip
