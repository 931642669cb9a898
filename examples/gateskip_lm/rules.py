"""Skip rules: which tokens a branch leaves out, given the scores of its gate."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class SkipRule(Protocol):
    """Decides which tokens a branch skips. `branch` is 2 * layer for attention, + 1 for the MLP."""

    def __call__(self, branch: int, scores: Tensor, valid: Tensor) -> Tensor: ...


def batch_quantile(q: float) -> SkipRule:
    """GateSkip's rule: the q-quantile of all valid scores of the call; skip at or below it."""

    def rule(branch: int, scores: Tensor, valid: Tensor) -> Tensor:
        known = scores[valid]
        if q <= 0 or known.numel() < 2:
            return torch.zeros_like(valid)
        return scores <= torch.quantile(known, min(q, 1.0))

    return rule


def fixed_thresholds(values: list[float]) -> SkipRule:
    """Causal and independent of the batch: skip at or below this branch's own constant."""
    return lambda branch, scores, valid: scores <= values[branch]


def random_skipping(q: float) -> SkipRule:
    """The control: as many tokens skipped, but at random."""
    generator = torch.Generator().manual_seed(0)
    return lambda branch, scores, valid: torch.rand(scores.shape, generator=generator) < q
