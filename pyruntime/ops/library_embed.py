"""``torch.ops.pyruntime.gather_patches`` and ``embed_patches``; `pyruntime.ops.library` imports it.

A `Pixels` comes as its fields: ``data``, ``table`` and ``channels``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyruntime import ops
from pyruntime.ops.library import _op
from pyruntime.ops.pixels import Pixels
from pyruntime.ops.weight import Weight


@_op(
    lambda data, table, channels, places, size, resize="area", out_dtype=None: data.new_empty(
        places.shape[0], channels * size * size, dtype=out_dtype or data.dtype
    )
)
def gather_patches(
    data: Tensor,
    table: Tensor,
    channels: int,
    places: Tensor,
    size: int,
    resize: str = "area",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Squares of the images at ``places`` [R, 4] as [R, channels * size * size]."""
    pixels = Pixels(data.contiguous(), table.contiguous(), channels)
    return ops.gather_patches(pixels, places.contiguous(), size, resize, out_dtype)


def _fake_tokens(
    data: Tensor,
    table: Tensor,
    channels: int,
    places: Tensor,
    size: int,
    weight: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    resize: str = "area",
    positions: Tensor | None = None,
    position_rows: Tensor | None = None,
    epilogue: str = "none",
    base: Tensor | None = None,
    out_rows: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    if base is not None:
        return base.new_empty(base.shape)
    return data.new_empty(places.shape[0], out_features, dtype=out_dtype or weight.dtype)


@_op(_fake_tokens)
def embed_patches(
    data: Tensor,
    table: Tensor,
    channels: int,
    places: Tensor,
    size: int,
    weight: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    resize: str = "area",
    positions: Tensor | None = None,
    position_rows: Tensor | None = None,
    epilogue: str = "none",
    base: Tensor | None = None,
    out_rows: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The tokens at ``places`` [R, 4] by a `Weight`'s data [D, channels * size * size].

    In rows ``out_rows`` of a copy of ``base`` [T, D]; without base they are [R, D], of the weight's
    dtype by default.
    """
    layout = "dense" if weight.dim() == 3 else "panel"
    matrix = Weight(weight, out_features, channels * size * size, layout)
    if base is None:
        out = weight.new_empty(places.shape[0], out_features, dtype=out_dtype or weight.dtype)
    else:
        out = base.clone(memory_format=torch.contiguous_format)
    return ops.embed_patches(
        Pixels(data.contiguous(), table.contiguous(), channels), places.contiguous(), matrix, bias,
        size=size, resize=resize, positions=positions, position_rows=position_rows,
        epilogue=epilogue, out=out, out_rows=out_rows,
    )  # fmt: skip
