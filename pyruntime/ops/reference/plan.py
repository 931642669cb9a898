"""Planners: scores to a Plan."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from pyruntime.errors import InvalidInput
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


def plan_partition(labels: Tensor, segments: int) -> Plan:
    """Group rows by label, in order; label -1 drops the row.

    Args:
        labels: int32 [N] in [-1, S).
        segments: S.
    """
    if labels.numel() and not -1 <= int(labels.min()) <= int(labels.max()) < segments:
        raise InvalidInput(f"plan_partition: labels must lie in [-1, {segments})")
    kept = int((labels >= 0).sum())
    order = torch.argsort(labels, stable=True)[labels.numel() - kept :]
    inverse = torch.full_like(labels, -1)
    inverse[order] = torch.arange(kept, dtype=torch.int32, device=labels.device)
    sizes = torch.bincount(labels[order], minlength=segments)
    return Plan(order.int(), _offsets(sizes), None, inverse[:, None], labels.numel(), kept)


def plan_topk(scores: Tensor, k: int, renormalize: bool = False) -> Plan:
    """The k largest scores of every row; ties go to the lowest segment, NaN counts as lowest.

    Args:
        scores: float32 [N, S].
        k: choices of a row; ``inverse[n, j]`` is its j-th best.
        renormalize: divide the k weights of a row by their sum (added best first).
    """
    count, segments = scores.shape
    if not 1 <= k <= segments:
        raise InvalidInput(f"plan_topk: k must lie in [1, {segments}], got {k}")
    ranked = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    # A stable sort settles ties by segment; NaN and -inf are told apart by a second, minor key.
    order = torch.argsort(scores.isnan().int(), dim=1, stable=True)
    best = torch.argsort(ranked.gather(1, order), dim=1, descending=True, stable=True)
    order = order.gather(1, best)
    chosen = order[:, :k]
    weights = scores.gather(1, chosen)
    if renormalize:
        total = torch.zeros(count, dtype=scores.dtype, device=scores.device)
        for j in range(k):
            total = total + weights[:, j]
        weights = weights / total[:, None]
    packed = torch.argsort(chosen.flatten(), stable=True)
    inverse = torch.empty(count * k, dtype=torch.int32, device=scores.device)
    inverse[packed] = torch.arange(count * k, dtype=torch.int32, device=scores.device)
    offsets = _offsets(torch.bincount(chosen.flatten(), minlength=segments))
    rows = (packed // k).int()
    return Plan(rows, offsets, weights.flatten()[packed], inverse.view(count, k), count, count * k)


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


def _offsets(sizes: Tensor) -> Tensor:
    return F.pad(sizes.cumsum(0), (1, 0)).int()
