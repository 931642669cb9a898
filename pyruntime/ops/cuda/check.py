"""What every CUDA op checks before it trusts an address."""

from __future__ import annotations

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.plan import Plan

FLOATS = {torch.float32: "f32", torch.bfloat16: "bf16"}  # dtype -> its name in a kernel's name
INT_MAX = 2**31 - 1
WARP = 32
THREADS = 256  # of every block that moves rows or multiplies


def on_device(tensor: Tensor) -> bool:
    """Whether a kernel can read the tensor (tests that emulate the device replace this)."""
    return tensor.is_cuda


def refuse(op: str, name: str, expected: str, actual: Tensor) -> InvalidInput:
    """The error that names op, argument, expected and actual."""
    kind = "contiguous" if actual.is_contiguous() else "strided"
    return InvalidInput(
        f"{op}: {name} must be {expected}, got {kind} {actual.dtype} {list(actual.shape)} "
        f"on {actual.device}"
    )


def check(
    op: str, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]
) -> None:
    """Refuse all but a contiguous CUDA tensor of ``shape``, where -1 is any size."""
    if (
        not on_device(tensor)
        or tensor.dtype not in dtypes
        or tensor.dim() != len(shape)
        or not tensor.is_contiguous()
        or any(want not in (-1, have) for want, have in zip(shape, tensor.shape, strict=True))
    ):
        wanted = ", ".join("?" if size < 0 else str(size) for size in shape)
        kinds = " or ".join(str(dtype) for dtype in dtypes)
        raise refuse(op, name, f"a contiguous CUDA {kinds} tensor [{wanted}]", tensor)


def check_rows(
    op: str, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], width: int
) -> None:
    """Refuse all but a CUDA matrix of rows that each lie together, at any distance."""
    if (
        not on_device(tensor)
        or tensor.dtype not in dtypes
        or tensor.dim() != 2
        or (width not in (-1, tensor.shape[1]))
        or (tensor.stride(1) != 1 and tensor.shape[1] > 1)
    ):
        kinds = " or ".join(str(dtype) for dtype in dtypes)
        columns = "?" if width < 0 else str(width)
        raise refuse(op, name, f"a CUDA {kinds} matrix [?, {columns}] of contiguous rows", tensor)


def check_device(op: str, x: Tensor, **others: Tensor | None) -> None:
    """Refuse tensors on another device than x: a kernel sees addresses only."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise InvalidInput(f"{op}: {name} is on {tensor.device}, the rows on {x.device}")


def kept_address(plan: Plan) -> int:
    """Device address of R, the last offset."""
    return plan.offsets.data_ptr() + 4 * plan.num_segments


def alignment(size: int, *tensors: Tensor) -> int:
    """The widest power of two, at most 16, that divides ``size`` and every address."""
    bits = 16 | size
    for tensor in tensors:
        bits |= tensor.data_ptr()
    return bits & -bits


def block_shape(columns: int, threads: int) -> tuple[int, int]:
    """Threads (x, y) of a block for rows of ``columns`` units: whole rows where they fit."""
    across = min(threads, 1 << (columns - 1).bit_length())
    return across, threads // across


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def result(
    op: str, x: Tensor, out: Tensor | None, dtype: torch.dtype, rows: int, width: int
) -> Tensor:
    """Memory [rows, width] for a result: the caller's, checked, or new."""
    if out is None:
        return torch.empty(rows, width, dtype=dtype, device=x.device)
    check(op, "out", out, (dtype,), (rows, width))
    check_device(op, x, out=out)
    return out
