"""Images to patches and tokens on the device: launches of ``csrc/cuda/embed_patches.cu``."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

from pyruntime.errors import InvalidInput
from pyruntime.ops.cuda.check import (
    FLOATS,
    INT_MAX,
    THREADS,
    WARP,
    alignment,
    block_shape,
    ceil_div,
    check,
    check_device,
)
from pyruntime.ops.cuda.kernels import kernels_of
from pyruntime.ops.cuda.matmul import choose_kernel, segment_matmul
from pyruntime.ops.pixels import Pixels
from pyruntime.ops.reference.embed import check_embed, check_places, check_rows
from pyruntime.ops.weight import Weight


def gather_patches(
    pixels: Pixels,
    places: Tensor,
    size: int,
    resize: str = "area",
    out_dtype: torch.dtype | None = None,
    *,
    kept: Tensor | None = None,
) -> Tensor:
    """Squares as rows [R, C * size * size]; see `pyruntime.ops.reference.gather_patches`.

    Places are not checked: reporting one would mean waiting for the device. A new set of image
    sizes is copied there once, which does wait.

    Args:
        kept: int32 [1] on the device (the last offset of a plan): only so many rows are made, the
            others are unspecified and their places not looked at.
    """
    check_places("gather_patches", pixels, places, size, resize)
    return _gather("gather_patches", pixels, places, size, resize, out_dtype, kept)


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
    kept: Tensor | None = None,
) -> Tensor:
    """Exactly the tokens at ``places``; see `pyruntime.ops.reference.embed_patches`.

    ``weight`` has layout "dense". Up to 16 rows are multiplied by our kernels, more by cuBLAS,
    which rounds to the weight's dtype before bias and position. No row number is checked; ``kept``
    is that of `gather_patches`.
    """
    check_places("embed_patches", pixels, places, size, resize)
    check_embed(pixels, weight, bias, size, epilogue)
    check_rows(places, weight, positions, position_rows, out, out_rows)
    if weight.layout != "dense":
        raise InvalidInput(
            f"embed_patches: CUDA weights must have layout dense, got {weight.layout}"
        )
    capacity, width = places.shape[0], weight.out_features
    check("embed_patches", "weight", weight.data, (weight.dtype,), (1, width, weight.in_features))
    check_device(
        "embed_patches", pixels.data, weight=weight.data, bias=bias, positions=positions,
        position_rows=position_rows, out=out, out_rows=out_rows,
    )  # fmt: skip
    patches = _gather("embed_patches", pixels, places, size, resize, weight.dtype, kept)
    if capacity == 0 or width == 0:
        return out
    if choose_kernel(patches, weight, capacity, planned=False) == "linear":
        product = functional.linear(patches, weight.data[0])
    else:
        product = segment_matmul(patches, weight, out_dtype=torch.float32)
    aligned = [t for t in (product, bias, positions, out) if t is not None]
    vector = 8 if width % 8 == 0 and alignment(16, *aligned) == 16 else 1
    columns, rows = block_shape(width // vector, THREADS)
    vectors = (bias, positions, position_rows, kept, out_rows)
    kernels_of(out.device.index).launch(
        f"embed_rows_{FLOATS[product.dtype]}_v{vector}",
        (ceil_div(capacity, rows), 1),
        (columns, rows),
        product.data_ptr(),
        *(0 if t is None else t.data_ptr() for t in vectors),
        out.data_ptr(),
        *(width, capacity, epilogue == "gelu", out.dtype is torch.float32),
    )
    return out


def _gather(
    op: str,
    pixels: Pixels,
    places: Tensor,
    size: int,
    resize: str,
    out_dtype: torch.dtype | None,
    kept: Tensor | None,
) -> Tensor:
    check(op, "pixels.data", pixels.data, (torch.float32,), (-1,))
    if kept is not None:
        check(op, "kept", kept, (torch.int32,), (1,))
        check_device(op, pixels.data, kept=kept)
    to = out_dtype or torch.float32
    capacity, width = places.shape[0], pixels.channels * size * size
    if to not in FLOATS or width > INT_MAX:
        raise InvalidInput(
            f"{op}: out_dtype must be one of {list(FLOATS)} and a patch at most {INT_MAX} values, "
            f"got {to} and {width}"
        )
    if capacity and pixels.count == 0:
        raise InvalidInput(f"{op}: {capacity} places of no image")
    out = torch.empty(capacity, width, dtype=to, device=places.device)
    if capacity and width:
        content, elements = pixels.table.numpy().tobytes(), pixels.data.numel()
        table = _table(content, pixels.channels, elements, places.device)
        kernels_of(places.device.index).launch(
            f"gather_patches_{FLOATS[to]}_v{8 if width % 8 == 0 else 1}",
            (ceil_div(capacity, THREADS // WARP), 1),
            (THREADS, 1),
            *(pixels.data.data_ptr(), table.data_ptr(), places.data_ptr()),
            *(0 if kept is None else kept.data_ptr(), out.data_ptr()),
            *(capacity, pixels.channels, size, resize == "bilinear"),
        )
    return out


@functools.lru_cache(maxsize=64)
def _table(content: bytes, channels: int, elements: int, device: torch.device) -> Tensor:
    """`Pixels.table`, checked, on the device: most batches are of sizes that were seen before."""
    table = torch.frombuffer(bytearray(content), dtype=torch.int64).view(-1, 3)
    for first, height, width in table.tolist():
        if min(first, height, width) < 0 or first + channels * height * width > elements:
            raise InvalidInput(
                f"pixels.table: an image of {channels} x {height} x {width} from element {first} "
                f"on exceeds {elements} elements"
            )
    return table.to(device)
