"""Ops that move rows: launches of ``csrc/cuda/{gather,compact,combine}.cu``."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.ops.cuda.check import (
    FLOATS,
    THREADS,
    alignment,
    block_shape,
    ceil_div,
    check,
    check_device,
    kept_address,
    result,
)
from pyruntime.ops.cuda.kernels import kernels_of
from pyruntime.plan import Plan

STRIP = 4  # units (of at most 16 bytes) of a row that one block of compact owns: two sectors


def gather(x: Tensor, plan: Plan, out: Tensor | None = None) -> Tensor:
    """Source rows to packed rows [capacity, H]; see `pyruntime.ops.reference.gather`."""
    check("gather", "x", x, (x.dtype,), (plan.num_rows, -1))
    check_device("gather", x, plan=plan.rows)
    capacity, width = plan.rows.shape[0], x.shape[1]
    out = result("gather", x, out, x.dtype, capacity, width)
    row_bytes = width * x.itemsize
    if capacity and row_bytes:
        unit = alignment(row_bytes, x, out)
        columns, rows = block_shape(row_bytes // unit, THREADS)
        kernels_of(x.device.index).launch(
            f"gather_{unit}",
            (ceil_div(capacity, rows), 1),
            (columns, rows),
            *(x.data_ptr(), plan.rows.data_ptr(), kept_address(plan), out.data_ptr()),
            *(row_bytes // unit, capacity),
        )
    return out


def compact(x: Tensor, plan: Plan) -> Tensor:
    """Kept rows moved to the front of x [N, ...]; see `pyruntime.ops.reference.compact`.

    Returns ``x[:capacity]``, of which the first R rows are meaningful.
    """
    check("compact", "x", x, (x.dtype,), (plan.num_rows, *x.shape[1:]))
    check_device("compact", x, plan=plan.rows)
    if plan.num_segments != 1 or plan.inverse.shape[1] != 1:
        raise InvalidInput(
            f"compact: the plan must have one segment and one choice a row, has "
            f"{plan.num_segments} and {plan.inverse.shape[1]}"
        )
    capacity, row_bytes = plan.rows.shape[0], prod(x.shape[1:]) * x.itemsize
    if capacity and row_bytes:
        unit = alignment(row_bytes, x)
        columns, rows = block_shape(min(row_bytes // unit, STRIP), 2 * THREADS)
        kernels_of(x.device.index).launch(
            f"compact_{unit}",
            (ceil_div(row_bytes // unit, columns), 1),
            (columns, rows),
            *(x.data_ptr(), plan.rows.data_ptr(), kept_address(plan), row_bytes // unit),
        )
    return x[:capacity]


def combine(
    packed: Tensor, plan: Plan, out: Tensor, channel_weights: Tensor | None = None
) -> Tensor:
    """Packed rows added back to source rows; see `pyruntime.ops.reference.combine`."""
    check("combine", "packed", packed, tuple(FLOATS), (plan.rows.shape[0], -1))
    width = packed.shape[1]
    check("combine", "out", out, (packed.dtype,), (plan.num_rows, width))
    aligned = [packed, out]
    if channel_weights is not None:
        check("combine", "channel_weights", channel_weights, (torch.float32,), tuple(out.shape))
        aligned.append(channel_weights)
    check_device("combine", packed, plan=plan.rows, out=out, channel_weights=channel_weights)
    if plan.rows.shape[0] and width:
        vector = 8 if width % 8 == 0 and alignment(16, *aligned) == 16 else 1
        columns, rows = block_shape(width // vector, THREADS)
        kernels_of(packed.device.index).launch(
            f"combine_{FLOATS[packed.dtype]}_v{vector}",
            (ceil_div(plan.num_rows, rows), 1),
            (columns, rows),
            packed.data_ptr(),
            plan.inverse.data_ptr(),
            0 if plan.weights is None else plan.weights.data_ptr(),
            0 if channel_weights is None else channel_weights.data_ptr(),
            out.data_ptr(),
            *(width, plan.num_rows, plan.inverse.shape[1]),
        )
    return out
