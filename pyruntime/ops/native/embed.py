"""Squares of images as rows of patches, and as tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.ops.native.binding import CODES, check, cpu, refuse
from pyruntime.ops.pixels import Pixels
from pyruntime.ops.reference.embed import check_embed, check_places, check_rows
from pyruntime.ops.weight import Weight


def gather_patches(
    pixels: Pixels,
    places: Tensor,
    size: int,
    resize: str = "area",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Squares of the images as patches; see `pyruntime.ops.reference.gather_patches`."""
    check_places("gather_patches", pixels, places, size, resize)
    to = out_dtype or torch.float32
    if to not in CODES:
        raise InvalidInput(f"gather_patches: out_dtype must be float32 or bfloat16, got {to}")
    out = torch.empty(places.shape[0], pixels.channels * size * size, dtype=to)
    problem = cpu.gather_patches(
        *_squares("gather_patches", pixels, places, size, resize), out.data_ptr(), CODES[to]
    )
    if problem:
        raise InvalidInput(f"gather_patches: {problem}")
    return out


def embed_patches(
    pixels: Pixels,
    places: Tensor,
    weight: Weight,
    bias: Tensor | None,
    *,
    size: int,
    resize: str = "area",
    positions: Tensor | None = None,
    position_rows: Tensor | None = None,
    epilogue: str = "none",
    out: Tensor,
    out_rows: Tensor | None = None,
) -> Tensor:
    """Tokens straight from pixels; see `pyruntime.ops.reference.embed_patches`."""
    check_places("embed_patches", pixels, places, size, resize)
    check_embed(pixels, weight, bias, size, epilogue)
    check_rows(places, weight, positions, position_rows, out, out_rows)
    data = weight.data
    if weight.layout != "panel" or not data.is_contiguous() or not data.is_cpu:
        raise refuse("embed_patches", "weight", "contiguous panels on the CPU", data)
    for name, tensor in (
        ("bias", bias),
        ("positions", positions),
        ("position_rows", position_rows),
        ("out", out),
        ("out_rows", out_rows),
    ):
        if tensor is not None and not tensor.is_cpu:
            raise refuse("embed_patches", name, "on the CPU", tensor)
    problem = cpu.embed_patches(
        *_squares("embed_patches", pixels, places, size, resize),
        data.data_ptr(),
        CODES[data.dtype],
        _address(bias),
        _address(positions),
        0 if positions is None else positions.shape[0],
        _address(position_rows),
        epilogue == "gelu",
        out.data_ptr(),
        CODES[out.dtype],
        out.shape[0],
        out.shape[1],
        _address(out_rows),
    )
    if problem:
        raise InvalidInput(f"embed_patches: {problem}")
    return out


def _squares(
    op: str, pixels: Pixels, places: Tensor, size: int, resize: str
) -> tuple[int | bool, ...]:
    """The first arguments of both kernels."""
    check(op, "pixels.data", pixels.data, torch.float32, 1)
    return (
        pixels.data.data_ptr(),
        pixels.data.shape[0],
        pixels.table.data_ptr(),
        pixels.table.shape[0],
        pixels.channels,
        places.data_ptr(),
        places.shape[0],
        size,
        resize == "bilinear",
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
