"""Early exit: one call from class rows to logits, a confidence and the plan of those that go on."""

from __future__ import annotations

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.ops.exit import ExitHead, ExitRule, exit_shape
from pyruntime.ops.native.binding import F32, I32, check, check_float, cpu, refuse
from pyruntime.plan import Plan

_NO_HEAD = (0, 0, 0, 0, 0.0, 0, 0)
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
    """Who leaves here, with what answer; see `pyruntime.ops.reference.plan_exit`."""
    code = check_float("plan_exit", "x", x, 2)
    if rows is not None:
        check("plan_exit", "rows", rows, I32, 1)
    count, classes = exit_shape(x, rule, head, rows)
    _check_rows("state", state, count, 3)
    _check_rows("limits", limits, count, 2)
    if total is not None:
        _check_rows("total", total, count, classes)
    own = head is not None or total is not None
    logits = torch.empty(count, classes, dtype=F32) if own else x
    confidence = torch.empty(count, dtype=F32)
    kept_rows = torch.empty(count, dtype=I32)
    offsets = torch.empty(2, dtype=I32)
    inverse = torch.empty(count, 1, dtype=I32)
    kept = cpu.plan_exit(
        x.data_ptr(),
        0 if rows is None else rows.data_ptr(),
        *(_NO_HEAD if head is None else _fields(head)),
        rule.flags,
        *(rule.gate or _NO_GATE),
        state.data_ptr(),
        limits.data_ptr(),
        0 if total is None else total.data_ptr(),
        logits.data_ptr() if own else 0,
        confidence.data_ptr(),
        kept_rows.data_ptr(),
        offsets.data_ptr(),
        inverse.data_ptr(),
        count,
        classes,
        x.shape[0],
        code,
    )
    if kept < 0 and rows is not None:
        raise InvalidInput(
            f"plan_exit: rows must lie in [0, {x.shape[0]}), got {int(rows[-1 - kept])}"
        )
    if kept != count:
        kept_rows.resize_(kept)  # shrinks in place: cheaper than a view
    return logits, confidence, Plan(kept_rows, offsets, None, inverse, count, kept)


def _fields(head: ExitHead) -> tuple[float, ...]:
    """ExitHead of csrc/ops.h."""
    weight = head.weight
    if weight.layout != "panel" or not weight.data.is_cpu:
        raise InvalidInput(
            f"plan_exit: head.weight must be CPU panels, got {weight.layout} on "
            f"{weight.data.device}"
        )
    return (
        weight.data.data_ptr(),
        0 if head.bias is None else head.bias.data_ptr(),
        0 if head.norm_weight is None else head.norm_weight.data_ptr(),
        0 if head.norm_bias is None else head.norm_bias.data_ptr(),
        head.eps,
        weight.out_features,
        weight.in_features,
    )


def _check_rows(name: str, tensor: Tensor, count: int, width: int) -> None:
    check("plan_exit", name, tensor, F32, 2)
    if tensor.shape != (count, width):
        raise refuse("plan_exit", name, f"[{count}, {width}]", tensor)
