"""Movement of rows, and their weighted return."""

from __future__ import annotations

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.plan import Plan


def gather(x: Tensor, plan: Plan, out: Tensor | None = None) -> Tensor:
    """x [N, H] of any dtype to packed rows [R, H].

    Args:
        out: memory for the result (mutated and returned), contiguous and apart from x.

    Raises:
        InvalidInput: out of another shape or dtype.
    """
    packed = x[plan.rows.long()]
    return packed if out is None else fill("gather", out, packed, x.dtype)


def fill(op: str, out: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """out = value, where out is what the caller of ``op`` gave to write into.

    Raises:
        InvalidInput: out is strided, or not of value's shape and ``dtype``.
    """
    if out.shape != value.shape or out.dtype != dtype or not out.is_contiguous():
        raise InvalidInput(
            f"{op}: out must be contiguous {dtype} {list(value.shape)}, got "
            f"{'contiguous' if out.is_contiguous() else 'strided'} {out.dtype} {list(out.shape)}"
        )
    return out.copy_(value)


def compact(x: Tensor, plan: Plan) -> Tensor:
    """Move the kept rows of x [N, ...] to its front (x is mutated); return that view [R, ...]."""
    x[: plan.kept] = x[plan.rows.long()]
    return x[: plan.kept]


def combine(
    packed: Tensor, plan: Plan, out: Tensor, channel_weights: Tensor | None = None
) -> Tensor:
    """out[n] += sum over choices of weight * packed[position], accumulated in float32, in order.

    Args:
        packed: [R, H], float32 or bfloat16.
        plan: rows without a choice keep their value in out, bit for bit.
        out: [N, H] of the same dtype, mutated and returned.
        channel_weights: float32 [N, H], multiplies the contribution channel by channel.
    """
    total = out.float()
    for k in range(plan.inverse.shape[1]):
        position = plan.inverse[:, k].long()
        rows = torch.nonzero(position >= 0)[:, 0]
        value = packed[position[rows]].float()
        if plan.weights is not None:
            value = value * plan.weights[position[rows], None]
        if channel_weights is not None:
            value = value * channel_weights[rows]
        total[rows] = total[rows] + value
    return out.copy_(total)
