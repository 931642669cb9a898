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
from pyruntime.ops import TopK, native, reference
from pyruntime.plan import Plan
from tests.ops.strategies import (
    assert_same_bits,
    assert_same_plan,
    bits,
    check_plan,
    finite,
    generator,
    normal,
    partition_cases,
    seeds,
    several_threads,
    threshold_cases,
    vectors,
)

BACKENDS = [pytest.param(reference, id="reference"), pytest.param(native, id="native")]


# ---- plan_threshold ----


@given(threshold_cases(), st.booleans())
@example((torch.empty(0), torch.tensor(0.5)), True)
@example((torch.tensor([0.5]), torch.tensor(0.5)), True)  # inclusive: a tie is skipped
@example((torch.tensor([0.5, 0.7]), torch.tensor(0.1)), True)  # all rows
@example((torch.tensor([0.5, 0.7]), torch.tensor(torch.inf)), False)  # no row
def test_plan_threshold(case: tuple[Tensor, Tensor], weighted: bool) -> None:
    scores, tau = case
    plan = native.plan_threshold(scores, tau, weighted)
    check_plan(plan, 1)
    assert_same_plan(plan, reference.plan_threshold(scores, tau, weighted))
    limits = tau.expand_as(scores).tolist()
    pairs = enumerate(zip(scores.tolist(), limits, strict=True))
    kept = [n for n, (s, t) in pairs if math.isnan(s) or math.isnan(t) or s > t]
    assert plan.rows.tolist() == kept
    assert (plan.weights is not None) == weighted
    if plan.weights is not None:
        assert_same_bits(plan.weights, scores[kept])


# ---- plan_partition ----


@given(partition_cases())
@example((torch.empty(0, dtype=torch.int32), 3, None))
@example((torch.full((4,), -1, dtype=torch.int32), 2, None))
@example((torch.zeros(5, dtype=torch.int32), 1, torch.ones(5)))
@example((torch.tensor([39], dtype=torch.int32), 40, None))
@example((torch.zeros(3, 2, dtype=torch.int32), 2, torch.arange(6.0).view(3, 2)))  # a row twice
@example((torch.empty(3, 0, dtype=torch.int32), 2, torch.empty(3, 0)))
def test_plan_partition(case: tuple[Tensor, int, Tensor | None]) -> None:
    labels, segments, weights = case
    plan = native.plan_partition(labels, segments, weights)
    choices = labels.shape[1] if labels.dim() == 2 else 1
    check_plan(plan, choices)
    assert_same_plan(plan, reference.plan_partition(labels, segments, weights))
    flat = labels.flatten().tolist()
    grouped = [[f for f, x in enumerate(flat) if x == s] for s in range(segments)]
    order = [f for group in grouped for f in group]
    assert plan.rows.tolist() == [f // choices for f in order]
    assert plan.offsets.diff().tolist() == [len(group) for group in grouped]
    assert_same_bits(plan.choices(), labels.view(plan.inverse.shape))
    assert (plan.weights is None) == (weights is None)
    given_weights = torch.ones(plan.inverse.shape) if weights is None else weights
    expected = torch.where(plan.inverse >= 0, given_weights.view(plan.inverse.shape), 0.0)
    assert_same_bits(plan.slot_weights(), expected)
    if plan.weights is not None and weights is not None:
        assert_same_bits(plan.weights, weights.flatten()[order])


@several_threads
@pytest.mark.parametrize("segments", [1, 2, 300])
def test_a_large_partition_is_the_same_on_any_threads(threads: None, segments: int) -> None:
    labels = torch.randint(-1, segments, (20_000, 3), generator=generator(segments)).int()
    plan = native.plan_partition(labels, segments, normal(0, 20_000, 3))
    assert_same_plan(plan, reference.plan_partition(labels, segments, normal(0, 20_000, 3)))
    labels[11_111, 2] = labels[15_000, 0] = segments
    with pytest.raises(InvalidInput, match=rf"label of row 11111 must .*, got {segments}"):
        native.plan_partition(labels, segments)


@pytest.mark.parametrize("ops", BACKENDS)
@pytest.mark.parametrize("label", [-2, 3, 2**31 - 1, -(2**31)])
def test_a_label_out_of_range_is_refused(ops: ModuleType, label: int) -> None:
    with pytest.raises(InvalidInput, match=r"plan_partition: label.*\[-1, 3\)"):
        ops.plan_partition(torch.tensor([0, label, 1], dtype=torch.int32), 3)


@pytest.mark.parametrize("ops", BACKENDS)
def test_partition_weights_are_refused(ops: ModuleType) -> None:
    with pytest.raises(
        InvalidInput, match=r"plan_partition: weights must be \[4, 2\], got .*\[2, 4\]"
    ):
        ops.plan_partition(torch.zeros(4, 2, dtype=torch.int32), 3, torch.zeros(2, 4))


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
    pairs, weights = labels.view(25, 2), scores.view(25, 2)
    assert_same_plan(
        public.plan_partition(pairs, 4, weights), native.plan_partition(pairs, 4, weights)
    )
    assert_same_bits(public.quantile(scores, 0.3), native.quantile(scores, 0.3))
    assert public.backend("cpu") is native


# ---- the class ----


@pytest.mark.parametrize("count", [0, 1, 5])
def test_plan_all(count: int) -> None:
    plan = Plan.all(count)
    check_plan(plan, 1)
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
    assert not native.plan_topk(normal(0, 1, 2), TopK(2)).is_all
    assert not native.plan_threshold(normal(0, 4), torch.tensor(0.0)).is_all


def test_nan_payloads_are_one_nan() -> None:
    two = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert bits(two).unique().numel() == 1


def test_v7_block_aligned_form() -> None:
    ids = torch.tensor([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]], dtype=torch.int32)
    slots, experts = reference.plan_partition(ids, 5).aligned(4)
    assert slots.tolist() == [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12]
    assert experts.tolist() == [1, 2, 3, 4]


@given(seeds, st.integers(0, 40), st.integers(1, 4), st.integers(1, 7))
def test_block_aligned_form_holds_every_choice_once(seed: int, n: int, k: int, block: int) -> None:
    ids = torch.randint(-1, 6, (n, k), generator=generator(seed), dtype=torch.int32)
    slots, experts = reference.plan_partition(ids, 6).aligned(block)
    assert slots.shape[0] == experts.shape[0] * block
    real = slots < n * k
    assert slots[real].sort().values.tolist() == torch.nonzero(ids.flatten() >= 0)[:, 0].tolist()
    owner = experts.repeat_interleave(block)
    assert torch.equal(ids.flatten()[slots[real].long()], owner[real])
    assert int((~real).sum()) <= (block - 1) * experts.unique().numel()
