"""The binding, loaded after torch, and what every native op checks before it hands over addresses.

The checks are plain attribute comparisons, so that a checked call costs a few microseconds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyruntime import _cpu
from pyruntime.errors import InvalidInput

cpu = _cpu
CODES = {torch.float32: 0, torch.bfloat16: 1}  # DType of csrc/core/plan.h
F32 = torch.float32
I32 = torch.int32


def isa() -> str:
    """Instruction set the kernels run with; raises InvalidInput for a bad PYRUNTIME_CPU_ISA."""
    try:
        return str(cpu.isa())
    except ValueError as error:
        raise InvalidInput(str(error)) from None


def refuse(op: str, name: str, expected: str, actual: Tensor) -> InvalidInput:
    kind = "contiguous" if actual.is_contiguous() else "strided"
    return InvalidInput(
        f"{op}: {name} must be {expected}, got {kind} {actual.dtype} {list(actual.shape)} "
        f"on {actual.device}"
    )


def check(op: str, name: str, tensor: Tensor, dtype: torch.dtype, dims: int) -> None:
    if (
        tensor.dtype is not dtype
        or tensor.dim() != dims
        or not tensor.is_contiguous()
        or not tensor.is_cpu
    ):
        raise refuse(op, name, f"a contiguous CPU {dtype} tensor of rank {dims}", tensor)


def check_float(op: str, name: str, tensor: Tensor, dims: int) -> int:
    code = CODES.get(tensor.dtype)
    if code is None or tensor.dim() != dims or not tensor.is_contiguous() or not tensor.is_cpu:
        expected = f"a contiguous CPU float32 or bfloat16 tensor of rank {dims}"
        raise refuse(op, name, expected, tensor)
    return code


def check_out(op: str, out: Tensor, dtype: torch.dtype, rows: int, width: int) -> None:
    """Refuse memory for a result that the kernel could not fill exactly."""
    if (
        out.dtype is not dtype
        or out.dim() != 2
        or out.shape[0] != rows
        or out.shape[1] != width
        or not out.is_contiguous()
        or not out.is_cpu
    ):
        raise refuse(op, "out", f"a contiguous CPU {dtype} tensor [{rows}, {width}]", out)
