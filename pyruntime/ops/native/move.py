"""gather, compact and combine."""

from __future__ import annotations

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.ops.native.binding import F32, check, check_float, check_out, cpu, refuse
from pyruntime.plan import Plan


def gather(x: Tensor, plan: Plan, out: Tensor | None = None) -> Tensor:
    """Source rows to packed rows; see `pyruntime.ops.reference.gather`."""
    if x.dim() != 2 or not x.is_contiguous() or not x.is_cpu or x.shape[0] != plan.num_rows:
        raise refuse("gather", "x", f"a contiguous CPU tensor [{plan.num_rows}, H]", x)
    width = x.shape[1]
    kept = plan.rows.shape[0]
    if out is None:
        out = torch.empty(kept, width, dtype=x.dtype)
    else:
        check_out("gather", out, x.dtype, kept, width)
    cpu.gather(x.data_ptr(), plan.rows.data_ptr(), kept, width * x.itemsize, out.data_ptr())
    return out


def compact(x: Tensor, plan: Plan) -> Tensor:
    """Kept rows moved to the front of x; see `pyruntime.ops.reference.compact`."""
    if not x.is_contiguous() or not x.is_cpu or x.dim() < 1 or x.shape[0] != plan.num_rows:
        raise refuse("compact", "x", f"a contiguous CPU tensor [{plan.num_rows}, ...]", x)
    if plan.num_segments != 1:
        raise InvalidInput(f"compact: the plan must have one segment, has {plan.num_segments}")
    kept = plan.rows.shape[0]
    if x.numel():
        row_bytes = x.numel() // x.shape[0] * x.itemsize
        cpu.compact(x.data_ptr(), plan.rows.data_ptr(), kept, row_bytes)
    return x[:kept]


def combine(
    packed: Tensor, plan: Plan, out: Tensor, channel_weights: Tensor | None = None
) -> Tensor:
    """Packed rows added back to source rows; see `pyruntime.ops.reference.combine`."""
    code = check_float("combine", "packed", packed, 2)
    kept, width = packed.shape
    check("combine", "out", out, packed.dtype, 2)
    if kept != plan.rows.shape[0] or out.shape[0] != plan.num_rows or out.shape[1] != width:
        raise InvalidInput(
            f"combine: a plan of {plan.kept} of {plan.num_rows} rows needs packed "
            f"[{plan.kept}, H] and out [{plan.num_rows}, H], got {list(packed.shape)} and "
            f"{list(out.shape)}"
        )
    channel = 0
    if channel_weights is not None:
        check("combine", "channel_weights", channel_weights, F32, 2)
        if channel_weights.shape != out.shape:
            raise refuse("combine", "channel_weights", f"{list(out.shape)}", channel_weights)
        channel = channel_weights.data_ptr()
    cpu.combine(
        packed.data_ptr(),
        plan.rows.data_ptr(),
        0 if plan.weights is None else plan.weights.data_ptr(),
        plan.inverse.data_ptr(),
        plan.num_rows,
        plan.inverse.shape[1],
        kept,
        channel,
        out.data_ptr(),
        width,
        code,
    )
    return out
