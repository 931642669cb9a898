"""Planners: scores to a Plan, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.ops.native.binding import F32, I32, check, cpu, refuse
from pyruntime.ops.topk import TopK
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


def plan_topk(
    logits: Tensor,
    rule: TopK,
    selection_bias: Tensor | None = None,
    limits: Tensor | None = None,
) -> Plan:
    """The segments ``rule`` picks for every row; see `pyruntime.ops.reference.plan_topk`."""
    check("plan_topk", "logits", logits, F32, 2)
    count, experts = logits.shape
    k = rule.k
    rule.check(experts)
    if selection_bias is not None:
        check("plan_topk", "selection_bias", selection_bias, F32, 1)
        if selection_bias.shape[0] != experts:
            raise refuse("plan_topk", "selection_bias", f"[{experts}]", selection_bias)
    if limits is not None:
        check("plan_topk", "limits", limits, F32, 2)
        if limits.shape != (count, 3):
            raise refuse("plan_topk", "limits", f"[{count}, 3]", limits)
    rows = torch.empty(count * k, dtype=I32)
    offsets = torch.empty(experts + 1, dtype=I32)
    weights = torch.empty(count * k, dtype=F32)
    inverse = torch.empty(count, k, dtype=I32)
    kept = cpu.plan_topk(
        logits.data_ptr(),
        0 if selection_bias is None else selection_bias.data_ptr(),
        0 if limits is None else limits.data_ptr(),
        count,
        experts,
        k,
        rule.flags,
        rule.groups,
        rule.top_groups,
        rule.epsilon,
        rule.scale,
        rows.data_ptr(),
        offsets.data_ptr(),
        weights.data_ptr(),
        inverse.data_ptr(),
    )
    if kept != count * k:
        rows.resize_(kept)
        weights.resize_(kept)
    return Plan(rows, offsets, weights, inverse, count, kept)


def plan_partition(labels: Tensor, segments: int, weights: Tensor | None = None) -> Plan:
    """Choices grouped by label; see `pyruntime.ops.reference.plan_partition`."""
    pair = labels.dim() == 2
    check("plan_partition", "labels", labels, I32, 2 if pair else 1)
    count = labels.shape[0]
    choices = labels.shape[1] if pair else 1
    packed = None
    if weights is not None:
        check("plan_partition", "weights", weights, F32, labels.dim())
        if weights.shape != labels.shape:
            raise refuse("plan_partition", "weights", f"{list(labels.shape)}", weights)
        packed = torch.empty(count * choices, dtype=F32)
    rows = torch.empty(count * choices, dtype=I32)
    offsets = torch.empty(segments + 1, dtype=I32)
    inverse = torch.empty(count, choices, dtype=I32)
    kept = cpu.plan_partition(
        labels.data_ptr(),
        0 if weights is None else weights.data_ptr(),
        count,
        choices,
        segments,
        rows.data_ptr(),
        offsets.data_ptr(),
        0 if packed is None else packed.data_ptr(),
        inverse.data_ptr(),
    )
    if kept < 0:
        flat = -1 - kept
        raise InvalidInput(
            f"plan_partition: label of row {flat // choices} must lie in [-1, {segments}), "
            f"got {int(labels.view(-1)[flat])}"
        )
    if kept != count * choices:
        rows.resize_(kept)
        if packed is not None:
            packed.resize_(kept)
    return Plan(rows, offsets, packed, inverse, count, kept)


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
