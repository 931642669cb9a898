"""Planners: scores to a Plan."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.ops.reference.score import below_largest, exp, score
from pyruntime.ops.topk import TopK
from pyruntime.plan import Plan


def plan_threshold(scores: Tensor, tau: Tensor, weighted: bool = False) -> Plan:
    """Keep row n unless ``scores[n] <= tau`` (GateSkip's inclusive rule; a NaN score is kept).

    Args:
        scores: float32 [N].
        tau: float32 [] or [N]; -inf never skips.
        weighted: the combine weight of a kept row is its score.
    """
    keep = ~(scores <= tau)
    plan = plan_partition(torch.where(keep, 0, -1).to(torch.int32), 1)
    return dataclasses.replace(plan, weights=scores[keep]) if weighted else plan


def plan_partition(labels: Tensor, segments: int, weights: Tensor | None = None) -> Plan:
    """Group choices by label, a stable sort; label -1 drops the choice.

    Packed order is ascending (segment, n * K + j), so that rows ascend inside a segment. A row that
    names a segment twice runs in it twice.

    Args:
        labels: int32 [N] or [N, K] in [-1, S).
        segments: S.
        weights: float32 like ``labels``, combine weight of every choice; None for 1.
    """
    if labels.numel() and not -1 <= int(labels.min()) <= int(labels.max()) < segments:
        raise InvalidInput(f"plan_partition: labels must lie in [-1, {segments})")
    if weights is not None and weights.shape != labels.shape:
        raise InvalidInput(
            f"plan_partition: weights must be {list(labels.shape)}, got {list(weights.shape)}"
        )
    count, choices = labels.shape if labels.dim() == 2 else (labels.shape[0], 1)
    flat = labels.flatten()
    kept = int((flat >= 0).sum())
    order = torch.argsort(flat, stable=True)[flat.numel() - kept :]
    inverse = torch.full_like(flat, -1)
    inverse[order] = torch.arange(kept, dtype=torch.int32, device=labels.device)
    sizes = torch.bincount(flat[order], minlength=segments)
    return Plan(
        (order // max(choices, 1)).int(),
        F.pad(sizes.cumsum(0), (1, 0)).int(),
        None if weights is None else weights.flatten()[order],
        inverse.view(count, choices),
        count,
        kept,
    )


def plan_topk(
    logits: Tensor,
    rule: TopK,
    selection_bias: Tensor | None = None,
    limits: Tensor | None = None,
) -> Plan:
    """The segments that ``rule`` picks for every row, best first in ``inverse``.

    With s the scores of a row and c = s + selection_bias, the k largest c of the groups that stay
    are chosen; ties go to the lower segment (and group). A NaN logit is -inf, and neither a logit
    nor a c of -inf or NaN is ever chosen: such slots, and those that limits cut, stay -1. Weights
    come from s: ``normalize``, ``scale``, ``round_weights``, in this order. All sums over slots add
    the best first, and all arithmetic is that of `pyruntime.ops.reference.score`.

    Args:
        logits: float32 [N, S].
        rule: see `TopK`; groups and bias are those of DeepSeek-V3 (arXiv 2412.19437, 2.1.2).
        selection_bias: float32 [S], for the choice alone; may be negative.
        limits: float32 [N, 3], how many of its choices a row uses, at least one: up to ``slots``;
            up to the first whose s exceeds the next by more than ``gap`` (adaptive gating,
            arXiv 2310.07188); up to ``mass`` of the sum of s. Infinite or NaN for no limit.
    """
    segments = logits.shape[1]
    rule.check(segments)
    _check_topk(logits, selection_bias, limits)
    z = torch.where(logits.isnan(), -torch.inf, logits)
    s = z if rule.over_chosen else score(rule.score, z)
    c = s if selection_bias is None else s + selection_bias
    c = torch.where(c.isnan() | (z == -torch.inf), -torch.inf, c)
    if rule.groups > 1:
        c = _best_groups(c, rule)
    # Stable sorts settle ties by segment.
    ids = torch.argsort(c, dim=1, descending=True, stable=True)[:, : rule.k]
    chosen = c.gather(1, ids) > -torch.inf
    s = torch.where(chosen, s.gather(1, ids), 0.0)
    weights = s
    if rule.over_chosen:
        s = torch.where(chosen, exp(below_largest(torch.where(chosen, s, -torch.inf))), 0.0)
        weights, s = s, s / _slot_sum(s)
    used = chosen if limits is None else chosen & _within(limits, s)
    counted = used if rule.renormalize_used else chosen
    if rule.over_chosen:
        weights = weights / _slot_sum(torch.where(counted, weights, 0.0))
    if rule.normalize:
        weights = weights / (_slot_sum(torch.where(counted, weights, 0.0)) + rule.epsilon)
    weights = weights * rule.scale
    if rule.round_weights:
        weights = weights.bfloat16().float()
    return plan_partition(torch.where(used, ids, -1).int(), segments, weights)


def _check_topk(logits: Tensor, selection_bias: Tensor | None, limits: Tensor | None) -> None:
    count, segments = logits.shape
    if selection_bias is not None and selection_bias.shape != (segments,):
        raise InvalidInput(
            f"plan_topk: selection_bias must be [{segments}], got {list(selection_bias.shape)}"
        )
    if limits is not None and limits.shape != (count, 3):
        raise InvalidInput(f"plan_topk: limits must be [{count}, 3], got {list(limits.shape)}")


def _best_groups(c: Tensor, rule: TopK) -> Tensor:
    """c [N, S] with -inf where the group is not among the best."""
    members = c.unflatten(1, (rule.groups, -1))
    best = members.topk(2 if rule.group_score == "sum2" else 1, dim=2).values
    worth = best[..., 0] + best[..., 1] if rule.group_score == "sum2" else best[..., 0]
    worth = torch.where(worth.isnan(), -torch.inf, worth)
    kept = torch.argsort(worth, dim=1, descending=True, stable=True)[:, : rule.top_groups]
    out = torch.ones_like(worth, dtype=torch.bool).scatter(1, kept, False)
    return torch.where(out[..., None], -torch.inf, members).flatten(1)


def _slot_sum(values: Tensor) -> Tensor:
    """Sum of float32 [N, k] over the slots, in order, [N, 1]."""
    total = torch.zeros_like(values[:, :1])
    for j in range(values.shape[1]):
        total = total + values[:, j : j + 1]
    return total


def _within(limits: Tensor, s: Tensor) -> Tensor:
    """Which slots of s [N, k] come before the limits cut, bool [N, k]."""
    slots, gap, mass = limits.unbind(1)
    total = _slot_sum(s)[:, 0]
    within = torch.ones_like(s, dtype=torch.bool)
    before = torch.zeros_like(total)
    for j in range(1, s.shape[1]):
        before = before + s[:, j - 1]
        cut = (j >= slots) | (s[:, j - 1] - s[:, j] > gap) | (before / total >= mass)
        within[:, j] = within[:, j - 1] & ~cut
    return within


def quantile(scores: Tensor, q: float) -> Tensor:
    """Quantile of float32 [N >= 1] by linear interpolation, float32 []; rank q*(N-1) in float64.

    NaN ranks above every number.
    """
    if not 0.0 <= q <= 1.0 or scores.numel() == 0:
        raise InvalidInput(
            f"quantile: needs q in [0, 1] and at least one score, got q={q} of {scores.numel()}"
        )
    ordered = scores.sort().values
    rank = q * (scores.numel() - 1)
    below = int(rank)
    part = torch.tensor(rank - below, dtype=torch.float32)
    if part == 0:
        return ordered[below].clone()
    return ordered[below] + (ordered[below + 1] - ordered[below]) * part
