"""What the tests of the CUDA ops share: comparison with the reference, and hard scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyruntime.plan import Plan


def same_bits(actual: Tensor, expected: Tensor) -> None:
    actual, expected = actual.cpu(), expected.cpu()
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    kind = {2: torch.int16, 4: torch.int32}.get(actual.itemsize, actual.dtype)
    assert torch.equal(actual.contiguous().view(kind), expected.contiguous().view(kind))


def same_plan(actual: Plan, expected: Plan) -> None:
    kept = int(actual.offsets[-1])
    same_bits(actual.offsets, expected.offsets)
    same_bits(actual.inverse, expected.inverse)
    same_bits(actual.rows[:kept], expected.rows)
    assert actual.rows.numel() == actual.capacity == actual.inverse.numel()
    assert bool((actual.rows[kept:] == -1).all())
    assert (actual.weights is None) == (expected.weights is None)
    if actual.weights is not None and expected.weights is not None:
        same_bits(actual.weights[:kept], expected.weights)


def scores_with_ties(seed: int, *shape: int) -> Tensor:
    """Few distinct values, both zeros, infinities, a denormal and NaN: what breaks comparisons."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-40, math.inf, -math.inf, math.nan, 0.5])
    generator = torch.Generator().manual_seed(seed)
    return values[torch.randint(len(values), shape, generator=generator)]
