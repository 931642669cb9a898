"""DeepSeek-V2 and V2-Lite: latent attention, routed experts next to shared ones."""

from __future__ import annotations

from pyruntime.format.convert import latent, moe
from pyruntime.format.convert.config import Config
from pyruntime.format.convert.family import Reading
from pyruntime.format.spec import ExpertSpec, RouterSpec

ARCHITECTURE = "DeepseekV2ForCausalLM"


def read(config: Config) -> Reading:
    """config.json -> Reading."""
    # Its own code and transformers' disagree about what these would mean.
    config.require("norm_topk_prob", False)
    config.require("mlp_bias", False)
    config.require("scoring_func", "softmax")
    config.require("topk_method", "greedy", "group_limited_greedy")
    grouped = config.data.get("topk_method") == "group_limited_greedy"
    router = RouterSpec(
        scale=config.number("routed_scaling_factor", 1.0),
        groups=config.integer("n_group") if grouped else 1,
        top_groups=config.integer("topk_group") if grouped else 1,
    )
    bias = config.flag("attention_bias")
    spec = config.decoder(
        "deepseek_v2", qkv_bias=bias, o_bias=bias,
        experts=read_experts(config, router, dense=0, experts=64, shared=2),
        **latent.read_latent(config),
    )  # fmt: skip
    return Reading(
        spec, latent.MODULES,
        lambda weights: latent.view(moe.view(weights, spec, moe.SINGLE), spec, True),
        tuple(config.notes),
    )  # fmt: skip


def read_experts(
    config: Config, router: RouterSpec, *, dense: int, experts: int, shared: int
) -> ExpertSpec | None:
    """The experts of both generations: `dense` layers first, `shared` experts as one network."""
    config.require("moe_layer_freq", 1)
    count = config.integer("num_hidden_layers")
    first = config.data.get("first_k_dense_replace", dense)
    if type(first) is not int or first < 0:
        config.problems.append(f"first_k_dense_replace must be a number of layers, is {first!r}")
        first = 0
    if config.data.get("n_shared_experts", shared) in (None, 0):
        shared = 0
    else:
        shared = config.integer("n_shared_experts", shared)
    width = config.integer("moe_intermediate_size")
    layers = range(min(first, count), count)
    if not layers:
        return None
    return moe.read_experts(
        config, router, top_k=8, experts=experts, layers=layers,
        width=("moe_intermediate_size",), shared_size=shared * width,
    )  # fmt: skip
