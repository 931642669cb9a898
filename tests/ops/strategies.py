"""Inputs of the ops: what hypothesis may choose, and what two backends must agree on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from pyruntime.ops import Weight, reference
from pyruntime.ops.weight import PAIRED
from pyruntime.plan import Plan

F32, BF16 = torch.float32, torch.bfloat16

seeds = st.integers(0, 2**31 - 1)
# Few values, so that ties are common, and every value that breaks a comparison.
_scores = st.one_of(
    st.sampled_from([0.0, -0.0, 0.25, 0.5, 0.5, 1.0, torch.nan, torch.inf, -torch.inf]),
    st.floats(width=32, allow_subnormal=False),
)
finite = st.floats(-1e3, 1e3, width=32, allow_subnormal=False)


def vectors(
    values: st.SearchStrategy[float] = _scores, min_size: int = 0, max_size: int = 70
) -> st.SearchStrategy[Tensor]:
    """float32 [N]."""
    lists = st.lists(values, min_size=min_size, max_size=max_size)
    return lists.map(lambda data: torch.tensor(data, dtype=torch.float32))


@st.composite
def threshold_cases(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Scores [N] and tau [] or [N], often equal to some score."""
    scores = draw(vectors())
    pool = [*scores.tolist(), torch.inf, -torch.inf, torch.nan, 0.5]
    values = st.sampled_from(pool)
    if draw(st.booleans()):
        return scores, torch.tensor(draw(values), dtype=torch.float32)
    size = scores.numel()
    return scores, draw(vectors(values, min_size=size, max_size=size))


@st.composite
def topk_cases(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Scores [N, S] and k."""
    segments = draw(st.integers(1, 9))
    rows = draw(st.integers(0, 20))
    flat = draw(vectors(min_size=rows * segments, max_size=rows * segments))
    return flat.view(rows, segments), draw(st.integers(1, segments))


@st.composite
def partition_cases(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Labels int32 [N] with drops and empty segments, and S."""
    segments = draw(st.integers(1, 40))
    used = draw(st.lists(st.integers(-1, segments - 1), min_size=1, max_size=4))
    labels = draw(st.lists(st.sampled_from(used), max_size=80))
    return torch.tensor(labels, dtype=torch.int32), segments


def bits(tensor: Tensor) -> Tensor:
    """The tensor as integers, NaNs made one NaN (its payload carries no meaning)."""
    if tensor.dtype == torch.float32:
        return torch.where(tensor.isnan(), torch.nan, tensor).view(torch.int32)
    if tensor.dtype == torch.bfloat16:
        return torch.where(tensor.isnan(), torch.nan, tensor).view(torch.int16)
    return tensor


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal dtype, shape and bits."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(bits(actual), bits(expected))


def assert_same_plan(actual: Plan, expected: Plan) -> None:
    """Bit-identical plans."""
    assert actual.num_rows == expected.num_rows
    assert actual.capacity == expected.capacity
    for name in ("rows", "offsets", "inverse"):
        assert_same_bits(getattr(actual, name), getattr(expected, name))
    assert (actual.weights is None) == (expected.weights is None)
    if actual.weights is not None and expected.weights is not None:
        assert_same_bits(actual.weights, expected.weights)


def generator(seed: int) -> torch.Generator:
    """A generator of its own: no test depends on another."""
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


# ---- compute ----

dtypes = st.sampled_from([F32, BF16])
widths = st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 65, 100, 257])
both_dtypes = pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
few = settings(max_examples=30)
keeps = st.sampled_from([-1.0, 0.1, 0.5, 0.9, 2.0])  # none, few, half, most, all
# The fixture `threads` is in conftest.py.
several_threads = pytest.mark.parametrize("threads", [1, 3], indirect=True, ids=["1t", "3t"])
EPILOGUES = ["none", "gelu", "silu", "silu_mul", "relu", "swiglu_oai"]

ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-7}  # one step of the result's own format
SUM = 2e-6  # of the sum of magnitudes: float32 additions in another order


def assert_close(actual: Tensor, expected: Tensor, magnitude: Tensor | float) -> None:
    """Equal up to the rounding of float32 sums of that magnitude, and of the result's dtype."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    wide, want = actual.double(), expected.double()
    allowed = SUM * (magnitude + torch.ones_like(want)) + ROUNDING[actual.dtype] * want.abs()
    worst = ((wide - want).abs() - allowed).max() if actual.numel() else torch.tensor(-1.0)
    assert bool(worst <= 0), f"off by {float((wide - want).abs().max())}"


def segments_plan(sizes: list[int], seed: int, dropped: int = 0) -> Plan:
    """A plan whose segments have these sizes, over shuffled source rows."""
    labels = torch.cat([torch.full((size,), s) for s, size in enumerate(sizes)])
    labels = torch.cat([labels, torch.full((dropped,), -1)])
    order = torch.randperm(labels.numel(), generator=generator(seed))
    return reference.plan_partition(labels[order].int(), len(sizes))


def some_plan(seed: int, count: int, keep: float, weighted: bool = False) -> Plan:
    scores = torch.rand(count, generator=generator(seed))
    return reference.plan_threshold(scores, torch.tensor(1.0 - keep), weighted)


def weight_of(
    seed: int, segments: int, n: int, k: int, dtype: torch.dtype, epilogue: str
) -> Weight:
    dense = normal(seed, segments, n, k, dtype=dtype)
    if epilogue in PAIRED:
        return Weight.pack_gate_up(dense, normal(seed + 1, segments, n, k, dtype=dtype))
    return Weight.pack(dense)
