"""MXFP4 (OCP Microscaling Formats 1.0): 32 numbers of 4 bits share a power of two."""

from __future__ import annotations

import torch
from torch import Tensor

from pyruntime.format.convert.checkpoint import Checkpoint, Need

GROUP = 32
_MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
_VALUES = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])
# The two numbers of a byte, the low four bits first; what 8 bits of exponent stand for.
_PAIRS = torch.stack([_VALUES.repeat(16), _VALUES.repeat_interleave(16)], dim=1)
_POWERS = torch.tensor([*(2.0 ** (exponent - 127) for exponent in range(255)), torch.nan])


def needs(name: str, segments: int, rows: int, columns: int) -> dict[str, Need]:
    """The tensors of matrices [segments, rows, columns]."""
    groups = columns // GROUP
    return {
        f"{name}_blocks": Need((segments, rows, groups, GROUP // 2), ("uint8",)),
        f"{name}_scales": Need((segments, rows, groups), ("uint8",)),
    }


def read(
    weights: Checkpoint, name: str, columns: int, start: int, stop: int, step: int = 1
) -> Tensor:
    """Every `step`-th of the rows [start, stop) of all matrices one below the other, float32."""
    groups = columns // GROUP
    blocks = weights.rows(f"{name}_blocks", start * groups, stop * groups)
    blocks = blocks.view(stop - start, groups, GROUP // 2)[::step]
    scales = weights.rows(f"{name}_scales", start, stop)[::step]
    values = torch.nn.functional.embedding(blocks.int(), _PAIRS).flatten(2)
    values *= _POWERS[scales.int()][..., None]
    return values.flatten(1)
