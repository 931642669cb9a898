"""Early exit on the device: launches of ``csrc/cuda/exit.cu``, and the sort of plan.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.ops.cuda.check import FLOATS, THREADS, WARP, ceil_div, check, check_device
from pyruntime.ops.cuda.kernels import kernels_of
from pyruntime.ops.cuda.plan import plan_partition
from pyruntime.ops.exit import ExitHead, ExitRule, exit_shape
from pyruntime.plan import Plan

HEAD_ROWS, HEAD_OUTPUTS = 4, 64  # of a block of plan_exit_head
MAX_WIDTH = 12_288  # a float32 row in 48 KB of shared memory
ALONE = 1 << 16  # weights that one block reads for one row; above, many blocks share them
_NO_GATE = (0.0, 0.0, 0.0, 0.0, 0.0)


def plan_exit(
    x: Tensor,
    rule: ExitRule,
    state: Tensor,
    limits: Tensor,
    head: ExitHead | None = None,
    rows: Tensor | None = None,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor, Plan]:
    """Who leaves here, with what answer; see `pyruntime.ops.reference.plan_exit`.

    The head's weight has layout "dense" and at most 12,288 columns. Rows are not checked: reporting
    one would mean waiting for the device.
    """
    check("plan_exit", "x", x, tuple(FLOATS), (-1, -1))
    if rows is not None:
        check("plan_exit", "rows", rows, (torch.int32,), (-1,))
    count, classes = exit_shape(x, rule, head, rows)
    check("plan_exit", "state", state, (torch.float32,), (count, 3))
    check("plan_exit", "limits", limits, (torch.float32,), (count, 2))
    if total is not None:
        check("plan_exit", "total", total, (torch.float32,), (count, classes))
    weight = None if head is None else head.weight.data
    check_device("plan_exit", x, state=state, limits=limits, rows=rows, total=total, head=weight)
    own = head is not None or total is not None
    logits = x.new_empty(count, classes, dtype=torch.float32) if own else x
    confidence = x.new_empty(count, dtype=torch.float32)
    labels = x.new_empty(count, dtype=torch.int32)
    outputs = x if head is None else logits
    if rule.learned:
        outputs = x.new_empty(count, classes + 1, dtype=torch.float32)
    if count:
        fields = (
            x.data_ptr(),
            0 if rows is None else rows.data_ptr(),
            *_vectors(head),
            outputs.data_ptr(),
            state.data_ptr(),
            limits.data_ptr(),
            0 if total is None else total.data_ptr(),
            logits.data_ptr() if own else 0,
            confidence.data_ptr(),
            labels.data_ptr(),
            *(rule.gate or _NO_GATE),
            0.0 if head is None else head.eps,
            *(rule.flags, x.dtype is torch.bfloat16),
            *(count, classes, outputs.shape[1], x.shape[1]),
        )
        _launch(fields, head, count, x)
    return logits, confidence, plan_partition(labels, 1)


def _vectors(head: ExitHead | None) -> tuple[int, ...]:
    """Addresses of weight, bias and norm."""
    if head is None:
        return 0, 0, 0, 0
    weight = head.weight
    if weight.layout != "dense" or weight.in_features > MAX_WIDTH:
        raise InvalidInput(
            f"plan_exit: head.weight must be dense of at most {MAX_WIDTH} columns on a GPU, got "
            f"{weight.layout} of {weight.in_features}"
        )
    vectors = (weight.data, head.bias, head.norm_weight, head.norm_bias)
    return tuple(0 if vector is None else vector.data_ptr() for vector in vectors)


def _launch(fields: tuple[float, ...], head: ExitHead | None, count: int, x: Tensor) -> None:
    """Chosen by the head alone: a row is the same bits in every batch."""
    kernels = kernels_of(x.device.index)
    block = (THREADS, 1)
    if head is not None:
        outputs, row_bytes = head.weight.out_features, 4 * head.weight.in_features
        if outputs * head.weight.in_features <= ALONE or HEAD_ROWS * row_bytes > 4 * MAX_WIDTH:
            kernels.launch("plan_exit_rows", (count, 1), block, *fields, shared=row_bytes)
            return
        grid = (ceil_div(count, HEAD_ROWS), ceil_div(outputs, HEAD_OUTPUTS))
        kernels.launch("plan_exit_head", grid, block, *fields, shared=HEAD_ROWS * row_bytes)
    grid = (ceil_div(count, THREADS // WARP), 1)
    kernels.launch("plan_exit_gate", grid, block, *fields)
