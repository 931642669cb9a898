"""Rotary position tables (half-split form): plain, linear, llama3, yarn and longrope scaling."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyruntime.errors import UnsupportedModel
from pyruntime.format.spec import DecoderSpec


def cos_sin_table(spec: DecoderSpec, positions: int) -> Tensor:
    """float32 [positions, head_dim]: head_dim/2 cosines, then head_dim/2 sines, of every position.

    Latent attention turns the first rope_dim/2 pairs of channels; its other pairs, which hold the
    latent vector, get cosine 1 and sine 0 and stay as they are.

    Raises:
        UnsupportedModel: a scaling rule that is not implemented.
    """
    width = spec.head_dim if spec.latent is None else spec.latent.rope_dim
    index = torch.arange(0, width, 2, dtype=torch.int64).float()
    frequency = 1.0 / (spec.rope_theta ** (index / width))
    scaling, factor = spec.rope_scaling, 1.0
    if scaling is not None:
        kind = scaling["rope_type"]
        factor = scaling.get("attention_factor", 1.0)
        if kind == "linear":
            frequency = frequency / scaling["factor"]
        elif kind == "llama3":
            frequency = _llama3(frequency, scaling)
        elif kind == "yarn":
            frequency = _yarn(frequency, scaling, spec.rope_theta)
        elif kind == "longrope":
            frequency = frequency / torch.tensor(scaling["factors"], dtype=torch.float32)
        else:
            raise UnsupportedModel(f"rope scaling {kind!r} is not implemented")
    angle = torch.arange(positions, dtype=torch.int64).float()[:, None] * frequency
    cos, sin = angle.cos() * factor, angle.sin() * factor
    still = spec.head_dim // 2 - width // 2
    cos = torch.nn.functional.pad(cos, (0, still), value=1.0)
    sin = torch.nn.functional.pad(sin, (0, still))
    return torch.cat([cos, sin], dim=1)


def _llama3(frequency: Tensor, scaling: dict[str, float]) -> Tensor:
    """Llama 3.1's rule: long wavelengths slowed by `factor`, short ones kept, a ramp between."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    ramp = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - ramp) * frequency / scaling["factor"] + ramp * frequency


def _yarn(frequency: Tensor, scaling: dict[str, Any], theta: float) -> Tensor:
    """YaRN (Peng et al. 2023): as llama3, but the ramp is over the index of the frequency."""
    count = frequency.shape[0]

    def index_of(turns: float) -> float:
        # The (fractional) frequency that makes so many turns in the original context.
        wavelength = scaling["original_max_position_embeddings"] / (turns * 2 * math.pi)
        return count * math.log(wavelength) / math.log(theta)

    low, high = index_of(scaling["beta_fast"]), index_of(scaling["beta_slow"])
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * count - 1)
    width = high - low or 0.001
    ramp = ((torch.arange(count, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    slowed: Tensor = frequency / scaling["factor"]
    return slowed * ramp + frequency * (1 - ramp)
