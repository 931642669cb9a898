"""Planners: scores to a Plan, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.ops.native.binding import F32, I32, check, cpu
from pyruntime.plan import Plan

_ONE = Plan.all(1)
_NONE_OF_ONE = Plan(
    torch.empty(0, dtype=I32),
    torch.zeros(2, dtype=I32),
    None,
    torch.full((1, 1), -1, dtype=I32),
    1,
    0,
)
_NO_WEIGHTS = torch.empty(0, dtype=F32)


def plan_threshold(scores: Tensor, tau: Tensor, weighted: bool = False) -> Plan:
    """Keep row n unless ``scores[n] <= tau``; see `pyruntime.ops.reference.plan_threshold`."""
    check("plan_threshold", "scores", scores, F32, 1)
    count = scores.shape[0]
    single = tau.dim() == 0
    check("plan_threshold", "tau", tau, F32, 0 if single else 1)
    if not single and tau.shape[0] != count:
        raise InvalidInput(f"plan_threshold: tau has {tau.shape[0]} rows, scores {count}")
    if count == 1:
        return _plan_one(scores, tau, weighted)
    rows = torch.empty(count, dtype=I32)
    offsets = torch.empty(2, dtype=I32)
    inverse = torch.empty(count, 1, dtype=I32)
    weights = torch.empty(count, dtype=F32) if weighted else None
    kept = cpu.plan_threshold(
        scores.data_ptr(),
        tau.data_ptr(),
        0 if single else 1,
        count,
        rows.data_ptr(),
        offsets.data_ptr(),
        inverse.data_ptr(),
        0 if weights is None else weights.data_ptr(),
    )
    if kept != count:
        rows.resize_(kept)  # shrinks in place: cheaper than a view, and this code runs per token
        if weights is not None:
            weights.resize_(kept)
    return Plan(rows, offsets, weights, inverse, count, kept)


def _plan_one(scores: Tensor, tau: Tensor, weighted: bool) -> Plan:
    """Decoding one sequence: the answer is yes or no, and both plans exist already."""
    plan = _NONE_OF_ONE if scores.item() <= tau.item() else _ONE
    if not weighted:
        return plan
    weights = scores if plan is _ONE else _NO_WEIGHTS
    return Plan(plan.rows, plan.offsets, weights, plan.inverse, 1, plan.capacity)


def plan_topk(scores: Tensor, k: int, renormalize: bool = False) -> Plan:
    """The k best segments of every row; see `pyruntime.ops.reference.plan_topk`."""
    check("plan_topk", "scores", scores, F32, 2)
    count, experts = scores.shape
    if not 1 <= k <= experts:
        raise InvalidInput(f"plan_topk: k must lie in [1, {experts}], got {k}")
    rows = torch.empty(count * k, dtype=I32)
    offsets = torch.empty(experts + 1, dtype=I32)
    weights = torch.empty(count * k, dtype=F32)
    inverse = torch.empty(count, k, dtype=I32)
    cpu.plan_topk(
        scores.data_ptr(),
        count,
        experts,
        k,
        renormalize,
        rows.data_ptr(),
        offsets.data_ptr(),
        weights.data_ptr(),
        inverse.data_ptr(),
    )
    return Plan(rows, offsets, weights, inverse, count, count * k)


def plan_partition(labels: Tensor, segments: int) -> Plan:
    """Rows grouped by label; see `pyruntime.ops.reference.plan_partition`."""
    check("plan_partition", "labels", labels, I32, 1)
    count = labels.shape[0]
    rows = torch.empty(count, dtype=I32)
    offsets = torch.empty(segments + 1, dtype=I32)
    inverse = torch.empty(count, 1, dtype=I32)
    kept = cpu.plan_partition(
        labels.data_ptr(),
        count,
        segments,
        rows.data_ptr(),
        offsets.data_ptr(),
        inverse.data_ptr(),
    )
    if kept < 0:
        row = -1 - kept
        raise InvalidInput(
            f"plan_partition: label of row {row} must lie in [-1, {segments}), "
            f"got {int(labels[row])}"
        )
    return Plan(rows[:kept], offsets, None, inverse, count, kept)


def quantile(scores: Tensor, q: float) -> Tensor:
    """Linearly interpolated quantile; see `pyruntime.ops.reference.quantile`."""
    check("quantile", "scores", scores, F32, 1)
    if not 0.0 <= q <= 1.0 or scores.shape[0] == 0:
        raise InvalidInput(
            f"quantile: needs q in [0, 1] and at least one score, got q={q} of {scores.shape[0]}"
        )
    scratch = torch.empty_like(scores)
    value = cpu.quantile(scores.data_ptr(), scores.shape[0], q, scratch.data_ptr())
    return torch.tensor(value, dtype=F32)
