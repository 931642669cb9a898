"""Random decoders with experts, built from a spec alone: no folder, no conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyruntime.engine.runtime import Runtime
from pyruntime.format.load import Container
from pyruntime.format.manifest import Manifest
from pyruntime.format.spec import (
    DecoderSpec,
    ExpertSpec,
    LatentSpec,
    RouterSpec,
    decoder_tensors,
)
from pyruntime.ops.weight import Weight

BASE: dict[str, Any] = {
    "source_family": "qwen2_moe", "vocab_size": 300, "hidden_size": 40, "num_layers": 3,
    "num_heads": 5, "num_kv_heads": 1, "head_dim": 8, "intermediate_size": 52,
    "max_positions": 256, "norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None,
    "tie_embeddings": False, "qkv_bias": False, "o_bias": False, "mlp_bias": False,
    "qk_norm": False, "bos_token_id": 1, "eos_token_ids": (), "pad_token_id": None,
    "dtype": "float32",
}  # fmt: skip


def experts(**changes: Any) -> ExpertSpec:
    """Five experts, two per token, in the last two layers, with a gated shared network."""
    values: dict[str, Any] = {
        "num_experts": 5, "experts_per_token": 2, "intermediate_size": 24, "layers": (1, 2),
        "router": RouterSpec(normalize=True), "shared_size": 36, "shared_gate": True,
    }  # fmt: skip
    return ExpertSpec(**{**values, **changes})


LATENT: dict[str, Any] = {
    "num_kv_heads": 1, "head_dim": 24, "latent": LatentSpec(12, 16, 6, 8, 10),
    "experts": experts(), "source_family": "deepseek_v2",
}  # fmt: skip
SINKS: dict[str, Any] = {
    "sinks": True, "window": 9, "window_layers": (0, 2), "qkv_bias": True, "o_bias": True,
    "source_family": "gpt_oss",
    "experts": experts(
        layers=(0, 1, 2), bias=True, activation="swiglu_oai", shared_size=0, shared_gate=False,
        router=RouterSpec(over_chosen=True, bias=True),
    ),
}  # fmt: skip


def spec_of(**changes: Any) -> DecoderSpec:
    return DecoderSpec(**{**BASE, "experts": experts(), **changes})


def tensors_of(spec: DecoderSpec, seed: int = 0) -> dict[str, Tensor | Weight]:
    """Random tensors in kernel layout."""
    random = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor | Weight] = {}
    for tensor in decoder_tensors(spec, None):
        values = torch.randn(tensor.shape, generator=random) * 0.2
        if "norm.weight" in tensor.name:
            values = 1 + values
        values = values.to(getattr(torch, tensor.dtype))
        if tensor.layout == "gate_up":
            found[tensor.name] = Weight.pack_gate_up(*values.chunk(2, dim=-2))
        else:
            found[tensor.name] = Weight.pack(values) if tensor.layout == "panel" else values
    return found


def runtime_of(spec: DecoderSpec, seed: int = 0, calibration: Any = None) -> Runtime:
    """A runtime over random weights."""
    manifest = Manifest(spec, None, calibration, {}, {}, {})
    tensors = tensors_of(spec, seed)
    return Runtime(Container(Path(), spec, None, calibration, tensors, manifest))
