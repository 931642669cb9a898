"""gather, compact and combine: native against the reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyruntime.ops import TopK, native, reference
from tests.ops.strategies import (
    BF16,
    F32,
    assert_close,
    assert_same_bits,
    dtypes,
    few,
    generator,
    keeps,
    normal,
    seeds,
    several_threads,
    some_plan,
    widths,
)

pytestmark = pytest.mark.usefixtures("threads")


@few
@given(seeds, st.integers(0, 90), widths, keeps, st.sampled_from([F32, BF16, torch.int64]))
def test_gather(seed: int, count: int, width: int, keep: float, dtype: torch.dtype) -> None:
    x, plan = (normal(seed, count, width) * 9).to(dtype), some_plan(seed, count, keep)
    packed = native.gather(x, plan)
    for ops in (native, reference):
        out = torch.full_like(packed, 7)
        assert ops.gather(x, plan, out=out) is out
        assert_same_bits(out, packed)
    assert_same_bits(packed, reference.gather(x, plan))
    assert_same_bits(packed, torch.stack([x[r] for r in plan.rows.tolist()] or [x[:0, :]]).view(
        plan.kept, width))  # fmt: skip


@several_threads
def test_gather_larger_than_the_cache() -> None:
    x, plan = normal(0, 9000, 1024), some_plan(0, 9000, 0.6)
    assert_same_bits(native.gather(x, plan), x[plan.rows.long()])


@few
@given(seeds, st.integers(0, 90), st.sampled_from([(), (1,), (3, 5), (33,)]), keeps,
       st.sampled_from([F32, BF16, torch.int64]))  # fmt: skip
def test_compact(
    seed: int, count: int, shape: tuple[int, ...], keep: float, dtype: torch.dtype
) -> None:
    x, plan = (normal(seed, count, *shape) * 9).to(dtype), some_plan(seed, count, keep)
    expected, tail = x[plan.rows.long()], x[plan.kept :].clone()
    front = native.compact(x, plan)
    assert front.numel() == 0 or front.data_ptr() == x.data_ptr()
    assert_same_bits(front, expected)
    assert_same_bits(x[plan.kept :], tail)


@settings(max_examples=60)
@given(seeds, st.integers(0, 40), widths, keeps, dtypes, st.booleans(), st.booleans())
def test_combine_one_choice(
    seed: int, count: int, width: int, keep: float, dtype: torch.dtype, weighted: bool, scaled: bool
) -> None:
    plan = some_plan(seed, count, keep, weighted)
    packed, out = (
        normal(seed, plan.kept, width, dtype=dtype),
        normal(seed, count, width, dtype=dtype),
    )
    channels = torch.rand(count, width, generator=generator(seed)) if scaled else None
    before = out.clone()
    expected = reference.combine(packed, plan, out.clone(), channels)
    assert native.combine(packed, plan, out, channels) is out
    assert_close(out, expected, 9.0)
    dropped = plan.inverse[:, 0] < 0
    assert_same_bits(out[dropped], before[dropped])
    if not weighted and not scaled:  # w = 1: one exact addition, rounded once
        exact = before[~dropped].double() + packed[plan.inverse[~dropped, 0].long()].double()
        assert_same_bits(out[~dropped], exact.float().to(dtype))


@few
@given(seeds, st.integers(0, 30), widths, st.integers(2, 5), dtypes, st.booleans())
def test_combine_several_choices(
    seed: int, count: int, width: int, k: int, dtype: torch.dtype, scaled: bool
) -> None:
    scores = torch.rand(count, 6, generator=generator(seed))
    plan = reference.plan_topk(scores, TopK(k, normalize=True))
    # Drop a third of the rows' choices, as a full expert would.
    gone = torch.rand(count, k, generator=generator(seed + 1)) < 0.3
    plan = dataclasses.replace(plan, inverse=torch.where(gone, -1, plan.inverse))
    packed, out = normal(seed, count * k, width, dtype=dtype), normal(1, count, width, dtype=dtype)
    channels = torch.rand(count, width, generator=generator(seed)) if scaled else None
    before = out.clone()
    expected = reference.combine(packed, plan, out.clone(), channels)
    assert_close(native.combine(packed, plan, out, channels), expected, 20.0)
    assert_same_bits(out[gone.all(1)], before[gone.all(1)])


def test_combine_keeps_the_bits_of_strange_rows() -> None:
    """A row that does not run is not even read: NaN, infinity and -0 stay."""
    out = torch.tensor([[torch.nan, torch.inf, -0.0, 1e-42]] * 2)
    plan = reference.plan_threshold(torch.tensor([0.0, 1.0]), torch.tensor(0.5))
    native.combine(torch.ones(1, 4), plan, out)
    assert (
        out[0].view(torch.int32).tolist()
        == torch.tensor([torch.nan, torch.inf, -0.0, 1e-42]).view(torch.int32).tolist()
    )
