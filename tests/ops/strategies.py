"""Inputs of the ops: what hypothesis may choose, and what two backends must agree on."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from pyruntime.ops import TopK, Weight, reference
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


@dataclass(frozen=True)
class TopKCase:
    """Arguments of plan_topk."""

    logits: Tensor
    rule: TopK
    bias: Tensor | None = None
    limits: Tensor | None = None


@st.composite
def topk_cases(draw: st.DrawFn, min_rows: int = 0, on_device: bool = False) -> TopKCase:
    """Every kind of rule; half of the logits have ties and all that breaks comparisons.

    ``on_device``: k is within a GPU's limit, and no weight is NaN: its bits are not specified.
    """
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 4]))
    segments = groups * draw(st.sampled_from([2, 3, 5, 16, 19] if groups > 1 else [1, 2, 7, 70]))
    top_groups = draw(st.integers(1, groups))
    score = draw(st.sampled_from(["none", "softmax", "sigmoid", "sqrt_softplus"]))
    rule = TopK(
        draw(st.integers(1, min(segments // groups * top_groups, 64 if on_device else segments))),
        score,
        over_chosen=score == "softmax" and draw(st.booleans()),
        normalize=draw(st.booleans()),
        epsilon=draw(st.sampled_from([0.0, 1e-20, 0.125])),
        scale=draw(st.sampled_from([1.0, 2.5])),
        groups=groups,
        top_groups=top_groups,
        group_score=draw(st.sampled_from(["max", "sum2"])),
        round_weights=draw(st.booleans()),
        renormalize_used=draw(st.booleans()),
    )
    count, seed = draw(st.integers(min_rows, 6)), draw(seeds)
    logits = normal(seed, count, segments) * draw(st.sampled_from([1.0, 6.0, 50.0]))
    if on_device and score in ("none", "sqrt_softplus"):
        logits = logits.abs() + 0.1  # a sum of 0, or an infinity over itself, makes NaN
    elif draw(st.booleans()):
        special = torch.tensor([0.0, -0.0, 0.25, 0.5, 1.0, torch.nan, torch.inf, -torch.inf, 1e-40])
        pick = torch.randint(special.numel(), logits.shape, generator=generator(seed))
        logits = special[pick]
    bias = normal(seed + 1, segments) if draw(st.booleans()) else None
    limits = None
    if draw(st.booleans()):
        columns = torch.rand(count, 3, generator=generator(seed + 2))
        columns[:, 0] = (columns[:, 0] * (rule.k + 2)).floor()
        limits = torch.where(normal(seed + 3, count, 3) > 0.5, torch.inf, columns)
    return TopKCase(logits, rule, bias, limits)


@st.composite
def partition_cases(draw: st.DrawFn) -> tuple[Tensor, int, Tensor | None]:
    """Labels int32 [N] or [N, K] with drops and empty segments, S, and weights or None."""
    segments = draw(st.integers(1, 40))
    used = draw(st.lists(st.integers(-1, segments - 1), min_size=1, max_size=4))
    choices = draw(st.integers(0, 4))
    drawn = draw(st.lists(st.sampled_from(used), max_size=80))
    labels = torch.tensor(drawn[: len(drawn) // max(choices, 1) * max(choices, 1)]).int()
    if choices:
        labels = labels.view(-1, choices)
    weights = normal(draw(seeds), *labels.shape) if draw(st.booleans()) else None
    return labels, segments, weights


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


def check_plan(plan: Plan, choices: int) -> None:
    """The invariants of DESIGN §2 that `Plan.validate` states, and those it takes for granted."""
    plan.validate()
    assert plan.inverse.shape == (plan.num_rows, choices)
    assert plan.kept == plan.rows.numel() == int(plan.offsets[-1])
    assert plan.kept + plan.dropped == plan.num_rows * choices
    assert plan.capacity >= plan.kept
    assert plan.weights is None or plan.weights.shape == plan.rows.shape
    for n, positions in enumerate(plan.inverse.tolist()):
        assert all(int(plan.rows[p]) == n for p in positions if p >= 0)
    assert plan.is_all == (
        plan.num_segments == 1 and choices == 1 and plan.rows.tolist() == list(range(plan.num_rows))
    )


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
