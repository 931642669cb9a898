"""Multi-head latent attention of DeepSeek-V2 and V3 checkpoints, in the form the runtime computes.

Queries are split into what is rotated and what is not, `kv_b_proj` into what brings queries into
the latent space and results out of it, head by head. Rotary channels stored as pairs side by side
are put into halves: first all first members, then all second ones.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from pyruntime.format.convert import qwen2_moe
from pyruntime.format.convert.checkpoint import Checkpoint, Need
from pyruntime.format.convert.config import Config
from pyruntime.format.convert.derive import Derivation, Rows, transposed
from pyruntime.format.convert.family import Modules
from pyruntime.format.convert.rope import rope_parameters, yarn_mscale
from pyruntime.format.spec import DecoderSpec, LatentSpec

_ATTENTION = "model.layers.{i}.self_attn"
_SHARED = "model.layers.{i}.mlp.shared_experts"
MODULES: Modules = MappingProxyType({
    **qwen2_moe.MODULES,
    "layers.{i}.attn.q_a": (f"{_ATTENTION}.q_a_proj",),
    "layers.{i}.attn.q_a_norm": (f"{_ATTENTION}.q_a_layernorm",),
    "layers.{i}.attn.q_nope": (f"{_ATTENTION}.q_nope",),
    "layers.{i}.attn.q_rope": (f"{_ATTENTION}.q_rope",),
    "layers.{i}.attn.kv_a": (f"{_ATTENTION}.kv_a",),
    "layers.{i}.attn.kv_a_norm": (f"{_ATTENTION}.kv_a_layernorm",),
    "layers.{i}.attn.k_b": (f"{_ATTENTION}.k_b",),
    "layers.{i}.attn.v_b": (f"{_ATTENTION}.v_b",),
    "layers.{i}.mlp.shared.gate_up": (f"{_SHARED}.gate_proj", f"{_SHARED}.up_proj"),
    "layers.{i}.mlp.shared.down": (f"{_SHARED}.down_proj",),
})  # fmt: skip


def read_latent(config: Config) -> dict[str, Any]:
    """The fields of DecoderSpec that latent attention decides."""
    # The norms of the low-rank vectors use this value in the original code, whatever is configured.
    config.require("rms_norm_eps", 1e-6)
    heads = config.integer("num_attention_heads")
    config.require("num_key_value_heads", heads)
    has_rank = "q_lora_rank" not in config.data or config.data["q_lora_rank"] is not None
    latent = LatentSpec(
        q_rank=config.integer("q_lora_rank", 1536) if has_rank else None,
        kv_rank=config.integer("kv_lora_rank", 512),
        nope_dim=config.integer("qk_nope_head_dim", 128),
        rope_dim=config.integer("qk_rope_head_dim", 64),
        value_dim=config.integer("v_head_dim", 128),
    )
    scale = float(latent.nope_dim + latent.rope_dim) ** -0.5
    rope = rope_parameters(config.data) or {}
    factor, mscale = rope.get("factor"), rope.get("mscale_all_dim")
    scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    if scaled and isinstance(factor, (int, float)) and isinstance(mscale, (int, float)) and mscale:
        # YaRN's temperature: what is not in sine and cosine is in the scale of the scores.
        scale *= yarn_mscale(factor, mscale) ** 2
    return {
        "latent": latent, "num_kv_heads": 1, "head_dim": latent.kv_rank + latent.rope_dim,
        "attention_scale": scale,
    }  # fmt: skip


def view(weights: Checkpoint, spec: DecoderSpec, interleaved: bool) -> Checkpoint:
    """`weights` with the matrices that MODULES names; `interleaved`: rotary pairs side by side."""
    if spec.latent is None:
        return weights
    made = Derivation(weights)
    for i in range(spec.num_layers):
        _add(made, spec, spec.latent, f"model.layers.{i}.self_attn", interleaved)
    return made.result()


def _add(
    made: Derivation, spec: DecoderSpec, latent: LatentSpec, attention: str, interleaved: bool
) -> None:
    weights, heads, d = made.weights, spec.num_heads, spec.hidden_size
    nope, rope, rank = latent.nope_dim, latent.rope_dim, latent.kv_rank
    halves = torch.arange(rope)
    if interleaved:
        halves = torch.cat([halves[0::2], halves[1::2]])

    low = latent.q_rank is not None
    columns = d if latent.q_rank is None else latent.q_rank
    query = f"{attention}.{'q_b_proj' if low else 'q_proj'}.weight"
    needs = {query: Need((heads * (nope + rope), columns))}
    for part, order in (("q_nope", torch.arange(nope)), ("q_rope", nope + halves)):
        shape = (heads * len(order), columns)
        read = _per_head(weights, query, nope + rope, order)
        made.add(f"{attention}.{part}.weight", shape, needs, read)

    order = torch.cat([torch.arange(rank), rank + halves])
    for suffix, row in (("weight", (d,)), ("bias", ())):
        key, whole = f"{attention}.kv_a_proj_with_mqa.{suffix}", (rank + rope, *row)
        read = _per_head(weights, key, rank + rope, order)
        made.add(f"{attention}.kv_a.{suffix}", whole, {key: Need(whole)}, read)

    both = f"{attention}.kv_b_proj.weight"
    height, value = nope + latent.value_dim, latent.value_dim
    needs = {both: Need((heads * height, rank))}
    read = transposed(weights, both, height, nope, rank)
    made.add(f"{attention}.k_b.weight", (heads * rank, nope), needs, read)
    read = _per_head(weights, both, height, nope + torch.arange(value))
    made.add(f"{attention}.v_b.weight", (heads * value, rank), needs, read)


def _per_head(weights: Checkpoint, name: str, height: int, order: Tensor) -> Rows:
    """Of every `height` rows those in `order`."""

    def read(start: int, stop: int) -> Tensor:
        wanted = torch.arange(start, stop)
        wanted = wanted // len(order) * height + order[wanted % len(order)]
        first = int(wanted.min())
        return weights.rows(name, first, int(wanted.max()) + 1)[wanted - first]

    return read
