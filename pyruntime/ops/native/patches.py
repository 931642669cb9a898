"""Images as rows of patches."""

from __future__ import annotations

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.ops.native.binding import CODES, check_float, cpu
from pyruntime.ops.reference.patches import grid


def patches(
    images: Tensor,
    size: int,
    stride: int,
    padding: int = 0,
    *,
    channels_last: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Images or maps of tokens as patches; see `pyruntime.ops.reference.patches`."""
    code = check_float("patches", "images", images, 4)
    count, channels, down, across = grid(images, size, stride, padding, channels_last)
    to = out_dtype or images.dtype
    if to not in CODES:
        raise InvalidInput(f"patches: out_dtype must be float32 or bfloat16, got {to}")
    out = torch.empty(count * down * across, channels * size * size, dtype=to)
    height, width = images.shape[1:3] if channels_last else images.shape[2:]
    cpu.patches(
        images.data_ptr(),
        out.data_ptr(),
        count,
        channels,
        height,
        width,
        size,
        stride,
        padding,
        channels_last,
        code,
        CODES[to],
    )
    return out
