"""Squares of images as rows of patches, and as tokens: the embedding of mixed-scale ViTs."""

from __future__ import annotations

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.ops.pixels import Pixels
from pyruntime.ops.reference.compute import activate
from pyruntime.ops.weight import Weight

MAX_RATIO = 256
RESIZES = ("area", "bilinear")


def gather_patches(
    pixels: Pixels,
    places: Tensor,
    size: int,
    resize: str = "area",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Squares of the images, each shrunk to size x size pixels and laid out as a Conv2d kernel.

    Args:
        pixels: B images of C channels; outside of an image is 0.
        places: int32 [R, 4]: image, top, left and ratio of each square, whose side is
            ratio * size; it may lie outside of the image, in part or whole.
        size: pixels a side of every patch.
        resize: what a pixel of the patch is, of its block of ratio x ratio: "area", the mean;
            "bilinear", the mean of the middle 2 x 2 (of an odd ratio: the middle pixel), which is
            ``F.interpolate(align_corners=False, antialias=False)``. For ratio 2 they are the same.
        out_dtype: float32 (by default) or bfloat16.

    Returns:
        [R, C * size * size] in the order (C, y, x). A mean is a float32 sum row by row and from
        left to right, times the reciprocal of the count.

    Raises:
        InvalidInput: shapes, dtypes or an unknown resize; on the CPU also a place whose image is
            not in [0, B) or whose ratio is not in [1, 256].
    """
    check_places("gather_patches", pixels, places, size, resize)
    at, device = places.long(), pixels.data.device
    if at.is_cpu:
        for i, (first, high, wide) in enumerate(pixels.table.tolist()):
            if min(first, high, wide) < 0 or first + pixels.channels * high * wide > len(
                pixels.data
            ):
                raise InvalidInput(
                    f"gather_patches: image {i} [{pixels.channels}, {high}, {wide}] from element "
                    f"{first} on exceeds the {len(pixels.data)} of pixels.data"
                )
        refuse_outside("gather_patches", "image", at[:, 0], 0, pixels.count)
        refuse_outside("gather_patches", "ratio", at[:, 3], 1, MAX_RATIO + 1)
    table = pixels.table.to(device)
    out = pixels.data.new_empty(len(at), pixels.channels, size, size)
    side = torch.arange(size, device=device)
    channel = torch.arange(pixels.channels, device=device).view(1, -1, 1, 1)
    for ratio in at[:, 3].unique().tolist():
        rows = torch.nonzero(at[:, 3] == ratio)[:, 0]
        image, top, left = at[rows, :3].T.unsqueeze(2)  # each [n, 1]
        first, height, width = table[image].unbind(2)
        total: Tensor | None = None
        offsets = taps(ratio, resize)
        for dy in offsets:
            y = top + side * ratio + dy  # [n, size]
            inside_y = (y >= 0) & (y < height)
            for dx in offsets:
                x = left + side * ratio + dx
                inside = inside_y[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
                line = y[:, None, :, None] + channel * height[:, :, None, None]
                index = line * width[:, :, None, None] + x[:, None, None, :]
                index = torch.where(inside[:, None], index + first[:, :, None, None], 0)
                pixel = torch.where(inside[:, None], pixels.data[index], 0.0)
                total = pixel if total is None else total + pixel
        if total is not None:
            out[rows] = total * (1.0 / len(offsets) ** 2)
    return out.flatten(1).to(out_dtype or torch.float32)


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
    """Exactly the tokens at ``places``: out[out_rows[r]] = epilogue(W patch(r) + bias + position).

    A patch is a row of `gather_patches`, rounded to the weight's dtype; sums are float32, rounded
    once. A row never depends on the others.

    Args:
        weight: one matrix [D, C * size * size], float32 or bfloat16.
        bias: float32 [D] or None.
        positions, position_rows: float32 [M, D] and int32 [R]: the row of it that each patch gets.
        epilogue: none or gelu (erf).
        out: float32 or bfloat16 [T, D], contiguous (mutated and returned).
        out_rows: int32 [R], distinct: where the rows go in ``out``; None: row r is row r, T = R.

    Raises:
        InvalidInput: see `gather_patches`; shapes and dtypes; on the CPU also a row that
            ``positions`` or ``out`` does not have.
    """
    check_places("embed_patches", pixels, places, size, resize)
    check_embed(pixels, weight, bias, size, epilogue)
    check_rows(places, weight, positions, position_rows, out, out_rows)
    patches = gather_patches(pixels, places, size, resize, weight.dtype)
    y = patches.float() @ weight.dense()[0].float().T
    if bias is not None:
        y = y + bias
    if positions is not None and position_rows is not None:
        if position_rows.is_cpu:
            refuse_outside("embed_patches", "position_rows", position_rows, 0, len(positions))
        y = y + positions[position_rows.long()]
    y = activate(y, epilogue, 0.0, 0.0).to(out.dtype)
    if out_rows is None:
        return out.copy_(y)
    if out_rows.is_cpu:
        refuse_outside("embed_patches", "out_rows", out_rows, 0, len(out))
    return out.index_copy_(0, out_rows.long(), y)


def taps(ratio: int, resize: str) -> range:
    """The rows, and the columns, of a block of ``ratio`` x ``ratio`` pixels that its mean reads."""
    if resize == "area":
        return range(ratio)
    return range((ratio - 1) // 2, ratio // 2 + 1)


def check_places(op: str, pixels: Pixels, places: Tensor, size: int, resize: str) -> None:
    """Refuse what does not need a look at values; the same for every backend.

    Raises:
        InvalidInput: naming the argument.
    """
    data, table = pixels.data, pixels.table
    if data.dtype != torch.float32 or data.dim() != 1 or not data.is_contiguous():
        raise _refuse(op, "pixels.data", "contiguous float32 of rank 1", data)
    if table.dtype != torch.int64 or not table.is_contiguous() or not table.is_cpu:
        raise _refuse(op, "pixels.table", "contiguous int64 in host memory", table)
    if table.dim() != 2 or table.shape[1] != 3:
        raise _refuse(op, "pixels.table", "[B, 3]", table)
    if places.dtype != torch.int32 or not places.is_contiguous() or places.device != data.device:
        raise _refuse(op, "places", f"contiguous int32 on {data.device}", places)
    if places.dim() != 2 or places.shape[1] != 4:
        raise _refuse(op, "places", "[R, 4]", places)
    if size < 1 or pixels.channels < 0 or resize not in RESIZES:
        raise InvalidInput(
            f"{op}: size must be at least 1, channels at least 0 and resize one of {RESIZES}, got "
            f"size={size}, channels={pixels.channels}, resize={resize!r}"
        )


def check_embed(
    pixels: Pixels, weight: Weight, bias: Tensor | None, size: int, epilogue: str
) -> None:
    """The same for the matrix of `embed_patches`, after `check_places`."""
    columns = pixels.channels * size * size
    if (
        weight.segments != 1
        or weight.interleaved
        or weight.in_features != columns
        or weight.dtype not in (torch.float32, torch.bfloat16)
    ):
        raise InvalidInput(
            f"embed_patches: weight must be one float32 or bfloat16 matrix [D, {columns}], got "
            f"{weight.dtype} [{weight.segments}, {weight.out_features}, {weight.in_features}]"
        )
    if bias is not None and (
        bias.dtype != torch.float32
        or bias.shape != (weight.out_features,)
        or not bias.is_contiguous()
    ):
        raise _refuse("embed_patches", "bias", f"contiguous float32 [{weight.out_features}]", bias)
    if epilogue not in ("none", "gelu"):
        raise InvalidInput(f"embed_patches: epilogue must be none or gelu, got {epilogue!r}")


def check_rows(
    places: Tensor,
    weight: Weight,
    positions: Tensor | None,
    position_rows: Tensor | None,
    out: Tensor,
    out_rows: Tensor | None,
) -> None:
    """The same for where its rows come from and go to."""
    count, width = places.shape[0], weight.out_features
    for name, rows in (("position_rows", position_rows), ("out_rows", out_rows)):
        if rows is not None and (
            rows.dtype != torch.int32 or rows.shape != (count,) or not rows.is_contiguous()
        ):
            raise _refuse("embed_patches", name, f"contiguous int32 [{count}]", rows)
    if (positions is None) != (position_rows is None):
        raise InvalidInput("embed_patches: positions and position_rows need each other, got one")
    if positions is not None and (
        positions.dtype != torch.float32
        or positions.dim() != 2
        or positions.shape[1] != width
        or not positions.is_contiguous()
    ):
        raise _refuse("embed_patches", "positions", f"contiguous float32 [M, {width}]", positions)
    if (
        out.dtype not in (torch.float32, torch.bfloat16)
        or out.dim() != 2
        or out.shape[1] != width
        or not out.is_contiguous()
        or (out_rows is None and out.shape[0] != count)
    ):
        rows_of = "T" if out_rows is not None else count
        expected = f"contiguous float32 or bfloat16 [{rows_of}, {width}]"
        raise _refuse("embed_patches", "out", expected, out)


def refuse_outside(op: str, name: str, values: Tensor, low: int, end: int) -> None:
    """Raises InvalidInput unless all values lie in [low, end)."""
    wrong = values[(values < low) | (values >= end)]
    if wrong.numel():
        raise InvalidInput(f"{op}: {name} must lie in [{low}, {end}), got {int(wrong[0])}")


def _refuse(op: str, name: str, expected: str, actual: Tensor) -> InvalidInput:
    kind = "contiguous" if actual.is_contiguous() else "strided"
    return InvalidInput(
        f"{op}: {name} must be {expected}, got {kind} {actual.dtype} {list(actual.shape)} on "
        f"{actual.device}"
    )
