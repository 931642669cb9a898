"""Movement of rows, and their weighted return."""

from __future__ import annotations

import torch
from torch import Tensor

from pyruntime.plan import Plan


def gather(x: Tensor, plan: Plan) -> Tensor:
    """x [N, H] of any dtype to packed rows [R, H]."""
    return x[plan.rows.long()]


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
