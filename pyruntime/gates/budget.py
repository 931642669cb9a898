"""Token budgets: scores of one branch to the thresholds that decide who runs (GateSkip §evaluate).

The quantile rules look at other tokens, later ones included: they reproduce published numbers and
are not causal. Protected rows (padding, end of sequence) always run and never enter a quantile.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

NEVER = torch.tensor(-torch.inf)


def batch_quantile(ops: ModuleType, scores: Tensor, valid: Tensor | None, skip: float) -> Tensor:
    """Threshold of the rule "skip iff score <= quantile of all valid scores", float32 [] or [N].

    Args:
        scores: float32 [N].
        valid: bool [N], or None when every row is.
        skip: skip ratio in [0, 1].
    """
    ranked = scores if valid is None else scores[valid]
    if skip <= 0 or ranked.numel() <= 1:
        return NEVER
    tau: Tensor = ops.quantile(ranked, min(skip, 1.0))
    if float(tau) == 1.0 and float(ranked.min()) == 1.0:
        return NEVER  # the official code leaves a saturated gate alone
    return tau if valid is None else torch.where(valid, tau, NEVER)


def exact_k(scores: Tensor, valid: Tensor | None, skip: float) -> Tensor:
    """Keep mask, bool [N], of the round(skip * n) lowest scores skipped; ties by lowest index."""
    keep = torch.ones_like(scores, dtype=torch.bool)
    rows = torch.arange(scores.numel()) if valid is None else torch.nonzero(valid)[:, 0]
    count = round(skip * rows.numel())
    keep[rows[torch.argsort(scores[rows], stable=True)[:count]]] = False
    return keep


def seq_quantile(
    ops: ModuleType,
    scores: Tensor,
    valid: Tensor | None,
    skip: float,
    sequences: Tensor,
    fallback: Tensor,
) -> Tensor:
    """Per-sequence thresholds, float32 [N]; a sequence with one row (decode) uses `fallback` [].

    Args:
        sequences: int32 [N], the sequence of every row.
    """
    tau = torch.empty_like(scores)
    for sequence in sequences.unique().tolist():
        rows = torch.nonzero(sequences == sequence)[:, 0]
        if rows.numel() == 1:
            tau[rows] = fallback
        else:
            inside = None if valid is None else valid[rows]
            tau[rows] = batch_quantile(ops, scores[rows], inside, skip)
    return tau if valid is None else torch.where(valid, tau, NEVER)
