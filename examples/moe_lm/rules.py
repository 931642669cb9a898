"""Rules that decide which tokens use one expert instead of two (`model.Cut`).

Each gets the layer and that layer's [N, 2] best two router probabilities, best first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model import Cut


def shares(top: Tensor) -> Tensor:
    """[N, 2] -> [N]: the first expert's weight among the two, 0.5..1."""
    return top[:, 0] / top.sum(-1)


def gaps(top: Tensor) -> Tensor:
    """[N, 2] -> [N]: first minus second probability over the whole softmax, 0..1."""
    return top[:, 0] - top[:, 1]


def share_cut(tau: float) -> Cut:
    return lambda layer, top: shares(top) >= tau


def gap_cut(theta: float) -> Cut:
    return lambda layer, top: gaps(top) > theta


def always_one(layer: int, top: Tensor) -> Tensor:
    return torch.ones_like(top[:, 0], dtype=torch.bool)


def random_cut(ratio: float, seed: int = 0) -> Cut:
    """Cuts without looking: what the other rules must beat."""
    generator = torch.Generator().manual_seed(seed)
    return lambda layer, top: torch.rand(len(top), generator=generator) < ratio
