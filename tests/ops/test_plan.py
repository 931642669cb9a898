"""Every planner, on the reference and on the native backend: the invariants of a Plan, the meaning
of its decisions spelled out once more in plain Python, and the same bits from both backends."""

from __future__ import annotations

import dataclasses
import math
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from pyruntime import ops as public
from pyruntime.errors import InvalidInput
from pyruntime.ops import native, reference
from pyruntime.plan import Plan
from tests.ops.strategies import (
    assert_same_bits,
    assert_same_plan,
    bits,
    finite,
    normal,
    partition_cases,
    threshold_cases,
    topk_cases,
    vectors,
)

BACKENDS = [pytest.param(reference, id="reference"), pytest.param(native, id="native")]


def check(plan: Plan, choices: int) -> None:
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


# ---- plan_threshold ----


@given(threshold_cases(), st.booleans())
@example((torch.empty(0), torch.tensor(0.5)), True)
@example((torch.tensor([0.5]), torch.tensor(0.5)), True)  # inclusive: a tie is skipped
@example((torch.tensor([0.5, 0.7]), torch.tensor(0.1)), True)  # all rows
@example((torch.tensor([0.5, 0.7]), torch.tensor(torch.inf)), False)  # no row
def test_plan_threshold(case: tuple[Tensor, Tensor], weighted: bool) -> None:
    scores, tau = case
    plan = native.plan_threshold(scores, tau, weighted)
    check(plan, 1)
    assert_same_plan(plan, reference.plan_threshold(scores, tau, weighted))
    limits = tau.expand_as(scores).tolist()
    pairs = enumerate(zip(scores.tolist(), limits, strict=True))
    kept = [n for n, (s, t) in pairs if math.isnan(s) or math.isnan(t) or s > t]
    assert plan.rows.tolist() == kept
    assert (plan.weights is not None) == weighted
    if plan.weights is not None:
        assert_same_bits(plan.weights, scores[kept])


# ---- plan_topk ----


@given(topk_cases(), st.booleans())
@example((torch.empty(0, 3), 2), False)
@example((torch.tensor([[0.5, 0.5, 0.5]]), 2), True)
@example((torch.full((2, 3), torch.nan), 3), False)
@example((torch.tensor([[-torch.inf, torch.nan, -torch.inf]]), 2), False)
@example((torch.tensor([[0.0, -0.0]]), 1), False)
def test_plan_topk(case: tuple[Tensor, int], renormalize: bool) -> None:
    scores, k = case
    plan = native.plan_topk(scores, k, renormalize)
    check(plan, k)
    assert_same_plan(plan, reference.plan_topk(scores, k, renormalize))
    assert plan.dropped == 0
    assert plan.weights is not None
    segment = torch.repeat_interleave(torch.arange(scores.shape[1]), plan.offsets.diff())
    for n, row in enumerate(scores.tolist()):
        order = sorted(range(len(row)), key=lambda e: (math.isnan(row[e]), -row[e], e)
                       if not math.isnan(row[e]) else (True, 0.0, e))  # fmt: skip
        positions = plan.inverse[n].long()
        assert segment[positions].tolist() == order[:k]
        weights = scores[n, order[:k]]
        if renormalize:
            total = torch.zeros(())
            for weight in weights:
                total = total + weight
            weights = weights / total
        assert_same_bits(plan.weights[positions], weights)


# ---- plan_partition ----


@given(partition_cases())
@example((torch.empty(0, dtype=torch.int32), 3))
@example((torch.full((4,), -1, dtype=torch.int32), 2))
@example((torch.zeros(5, dtype=torch.int32), 1))
@example((torch.tensor([39], dtype=torch.int32), 40))
def test_plan_partition(case: tuple[Tensor, int]) -> None:
    labels, segments = case
    plan = native.plan_partition(labels, segments)
    check(plan, 1)
    assert_same_plan(plan, reference.plan_partition(labels, segments))
    grouped = [[n for n, x in enumerate(labels.tolist()) if x == s] for s in range(segments)]
    assert plan.rows.tolist() == [n for rows in grouped for n in rows]
    assert plan.offsets.diff().tolist() == [len(rows) for rows in grouped]


@pytest.mark.parametrize("ops", BACKENDS)
@pytest.mark.parametrize("label", [-2, 3, 2**31 - 1, -(2**31)])
def test_a_label_out_of_range_is_refused(ops: ModuleType, label: int) -> None:
    with pytest.raises(InvalidInput, match=r"plan_partition: label.*\[-1, 3\)"):
        ops.plan_partition(torch.tensor([0, label, 1], dtype=torch.int32), 3)


# ---- quantile ----


@given(vectors(finite, min_size=1), st.floats(0, 1))
@example(torch.tensor([0.25]), 0.7)
@example(torch.tensor([0.5, 0.25]), 1.0)
@example(torch.tensor([0.5, 0.25]), 0.0)
def test_quantile(scores: Tensor, q: float) -> None:
    before = scores.clone()
    value = native.quantile(scores, q)
    assert_same_bits(value, reference.quantile(scores, q))
    assert torch.equal(before, scores)
    expected = torch.quantile(scores.double(), q)
    assert abs(float(value) - float(expected)) <= 4e-7 * float(scores.abs().max())


@given(vectors(min_size=1, max_size=20), st.floats(0, 1))
@example(torch.tensor([torch.nan, 1.0, 0.0]), 0.5)
@example(torch.tensor([torch.inf, -torch.inf]), 0.5)
def test_quantile_of_scores_that_are_not_finite(scores: Tensor, q: float) -> None:
    """NaN ranks above everything, as torch sorts it; both backends agree."""
    assert_same_bits(native.quantile(scores, q), reference.quantile(scores, q))


@pytest.mark.parametrize("ops", BACKENDS)
@pytest.mark.parametrize(("scores", "q"), [([], 0.5), ([1.0], -0.1), ([1.0], 1.1)])
def test_quantile_refuses(ops: ModuleType, scores: list[float], q: float) -> None:
    with pytest.raises(InvalidInput, match=f"quantile: .*q={q} of {len(scores)}"):
        ops.quantile(torch.tensor(scores), q)


# ---- the public functions ----


def test_public_planners_are_the_native_ones_on_the_cpu() -> None:
    scores, tau = normal(0, 50), torch.tensor(0.1)
    assert_same_plan(
        public.plan_threshold(scores, tau, True), native.plan_threshold(scores, tau, True)
    )
    labels = (scores * 2).int().clamp(-1, 3)
    assert_same_plan(public.plan_partition(labels, 4), native.plan_partition(labels, 4))
    square = normal(1, 10, 4)
    assert_same_plan(public.plan_topk(square, 2, True), native.plan_topk(square, 2, True))
    assert_same_bits(public.quantile(scores, 0.3), native.quantile(scores, 0.3))
    assert public.backend("cpu") is native


# ---- the class ----


@pytest.mark.parametrize("count", [0, 1, 5])
def test_plan_all(count: int) -> None:
    plan = Plan.all(count)
    check(plan, 1)
    assert plan.is_all and plan.dropped == 0
    assert_same_plan(plan, native.plan_threshold(torch.zeros(count), torch.tensor(-torch.inf)))


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# A plan of two segments, (1, 2) and (0), where row 3 is dropped; and ways to break it.
GOOD = Plan(int32(1, 2, 0), int32(0, 2, 3), None, int32(2, 0, 1, -1)[:, None], 4, 3)
BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"rows": torch.tensor([1, 2, 0])}, "rows must be contiguous int32, got torch.int64"),
    ({"offsets": int32(0, 2, 2)}, "offsets must rise from 0 to 3"),
    ({"offsets": int32(1, 2, 3)}, "offsets must rise from 0 to 3"),
    ({"offsets": int32(0, 4, 3)}, "offsets must rise from 0 to 3"),
    ({"rows": int32(1, 4, 0)}, r"rows must lie in \[0, 4\)"),
    ({"rows": int32(-1, 2, 0)}, r"rows must lie in \[0, 4\)"),
    ({"rows": int32(2, 1, 0)}, "rows must ascend"),
    ({"weights": torch.ones(3, dtype=torch.float64)}, "weights must be float32"),
    ({"num_rows": 5}, "inverse has 4 rows, not 5"),
    ({"inverse": int32(2, 0, -1, 1)[:, None]}, "inverse must send every kept choice"),
    ({"inverse": int32(2, 0, -1, -1)[:, None]}, "inverse must send every kept choice"),
    ({"inverse": int32(-1, 0, 1, -1)[:, None].repeat(1, 2)[:, :1]}, "contiguous|kept choice"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_validate_names_what_is_broken(change: dict[str, Any], message: str) -> None:
    GOOD.validate()
    with pytest.raises(InvalidInput, match=message):
        dataclasses.replace(GOOD, **change).validate()


def test_validate_sees_a_packed_row_that_is_reached_twice() -> None:
    inverse = int32(0, 0, -1, -1).view(2, 2)
    with pytest.raises(InvalidInput, match="reach every packed row once"):
        Plan(int32(0, 0), int32(0, 1, 2), None, inverse, 2, 2).validate()


def test_is_all_needs_one_segment_and_one_choice() -> None:
    twice = Plan(int32(0, 0), int32(0, 2), None, int32(0, 1, -1, -1).view(2, 2), 2, 2)
    twice.validate()
    assert not twice.is_all  # as many packed rows as source rows, but not the same ones
    assert not native.plan_partition(int32(1, 0), 2).is_all
    assert not native.plan_topk(normal(0, 1, 2), 2).is_all
    assert not native.plan_threshold(normal(0, 4), torch.tensor(0.0)).is_all


def test_nan_payloads_are_one_nan() -> None:
    two = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert bits(two).unique().numel() == 1
