"""Rotary position tables (half-split form), plain, linear and llama3 scaling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyruntime.errors import UnsupportedModel
from pyruntime.format.spec import DecoderSpec


def cos_sin_table(spec: DecoderSpec, positions: int) -> Tensor:
    """float32 [positions, head_dim]: head_dim/2 cosines, then head_dim/2 sines, of every position.

    Raises:
        UnsupportedModel: a scaling rule that is not implemented.
    """
    index = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float()
    frequency = 1.0 / (spec.rope_theta ** (index / spec.head_dim))
    scaling = spec.rope_scaling
    if scaling is not None:
        kind = scaling["rope_type"]
        if kind == "linear":
            frequency = frequency / scaling["factor"]
        elif kind == "llama3":
            frequency = _llama3(frequency, scaling)
        else:
            raise UnsupportedModel(f"rope scaling {kind!r} is not implemented")
    angle = torch.arange(positions, dtype=torch.int64).float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def _llama3(frequency: Tensor, scaling: dict[str, float]) -> Tensor:
    """Llama 3.1's rule: long wavelengths slowed by `factor`, short ones kept, a ramp between."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    ramp = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - ramp) * frequency / scaling["factor"] + ramp * frequency
