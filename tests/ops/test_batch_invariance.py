"""A row's result is its own: the same bits in every batch, segment, order and thread count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyruntime.layers.kv import BLOCK
from pyruntime.ops import Weight, native, reference
from pyruntime.plan import Plan
from tests.ops.paged import HEADS, VARIANTS, attend, filled
from tests.ops.strategies import (
    EPILOGUES,
    F32,
    assert_same_bits,
    both_dtypes,
    generator,
    normal,
    segments_plan,
    several_threads,
    some_plan,
    weight_of,
)

pytestmark = pytest.mark.usefixtures("threads")


@both_dtypes
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_matmul_rows_do_not_depend_on_their_batch(dtype: torch.dtype, epilogue: str) -> None:
    for n, k in [(33, 31), (96, 100), (40, 1101)]:
        weight = weight_of(0, 1, n, k, dtype, epilogue)
        bias = normal(2, weight.out_features)
        x = normal(1, 300, k, dtype=dtype)

        def run(
            rows: Tensor, weight: Weight = weight, bias: Tensor = bias, epilogue: str = epilogue
        ) -> Tensor:
            return native.segment_matmul(rows, weight, epilogue=epilogue, bias=bias, out_dtype=F32)

        together = run(x)
        for start in range(0, 27):  # every height and every place of a tile
            for count in (1, 5, 12, 26):
                assert_same_bits(run(x[start : start + count].contiguous()),
                                 together[start : start + count])  # fmt: skip
        order = torch.randperm(300, generator=generator(0))
        assert_same_bits(run(x[order]), together[order])
        plan = some_plan(0, 300, 0.3)
        gathered = native.segment_matmul(
            x, weight, plan, gather=True, epilogue=epilogue, bias=bias, out_dtype=F32
        )
        assert_same_bits(gathered, together[plan.rows.long()])


@several_threads
@both_dtypes
@pytest.mark.parametrize("segments", [1, 3])
def test_matmul_rows_do_not_depend_on_their_segment(dtype: torch.dtype, segments: int) -> None:
    dense = normal(0, 1, 40, 65, dtype=dtype).expand(segments, -1, -1).contiguous()
    x = normal(1, 60, 65, dtype=dtype)
    plan = segments_plan([60 - 7 * (segments - 1)] + [7] * (segments - 1), 0)
    grouped = native.segment_matmul(x, Weight.pack(dense), plan, gather=True)
    alone = native.segment_matmul(x, Weight.pack(dense[0]))
    assert_same_bits(grouped, alone[plan.rows.long()])


@several_threads
@both_dtypes
def test_norm_and_gate_rows_do_not_depend_on_their_batch(dtype: torch.dtype) -> None:
    for width in (1, 33, 200):
        x, weight, probe = normal(0, 300, width, dtype=dtype), normal(1, width), normal(2, width)
        out, logits = native.rms_norm(x, weight, 1e-5, probe, 0.1)
        gates = normal(3, 300, width)
        means = native.gate(one := gates.clone())
        assert logits is not None
        for i in range(0, 300, 23):
            row, logit = native.rms_norm(x[i : i + 1], weight, 1e-5, probe, 0.1)
            assert logit is not None
            assert_same_bits(row[0], out[i])
            assert_same_bits(logit[0], logits[i])
            mean = native.gate(alone := gates[i : i + 1].clone())
            assert_same_bits(mean[0], means[i])
            assert_same_bits(alone[0], one[i])


@several_threads
@both_dtypes
@pytest.mark.parametrize(("heads", "kv_heads"), [*HEADS, (70, 1)])
@pytest.mark.parametrize(("sunk", "window"), VARIANTS)
def test_attention_rows_do_not_depend_on_their_batch(
    heads: int, kv_heads: int, sunk: bool, window: int, dtype: torch.dtype
) -> None:
    lengths, head_dim = [100, 31, 7, 200], 34
    cache = filled(lengths, kv_heads, head_dim, dtype)
    # What other owners left in the unused end of a block must not matter either.
    total = sum(lengths)
    q = normal(0, total, heads * head_dim, dtype=dtype)
    more = (3 * normal(5, heads) if sunk else None, window)
    together = attend(native, cache, lengths, q, None, *more)
    for i in [0, 1, 31, 32, 33, 99, 100, 130, 131, 137, 138, 300, total - 1]:
        one = torch.tensor([i], dtype=torch.int32)
        alone = attend(native, cache, lengths, q[i : i + 1], one, *more)
        assert_same_bits(alone[0], together[i])
    for keep in (0.1, 0.5, 0.9):
        rows = (torch.rand(total, generator=generator(1)) < keep).nonzero()[:, 0].int()
        assert_same_bits(
            attend(native, cache, lengths, q[rows.long()], rows, *more), together[rows.long()]
        )


@both_dtypes
def test_attention_ignores_entries_that_are_not_its_own(dtype: torch.dtype) -> None:
    """Stale numbers behind a row's position and in foreign blocks change no bit."""
    lengths = [40, 50]
    cache = filled(lengths, 2, 10, dtype)
    q = normal(0, 90, 4 * 10, dtype=dtype)
    rows = torch.arange(20).int()
    before = attend(native, cache, lengths, q[:20], rows)
    own = int(cache.tables[0, 0])
    stale = filled(lengths, 2, 10, dtype)
    stale.keys.fill_(1e30)
    stale.values.fill_(-1e30)
    keys, values = reference.read_cache(cache.keys, cache.values, torch.tensor([own]), 10)
    new = torch.cat([keys.flatten(1), values.flatten(1)], 1)[:20].contiguous()
    identity = torch.cat([torch.ones(20, 5), torch.zeros(20, 5)], 1)
    slots = (own * BLOCK + torch.arange(20)).int()
    native.append(new, identity, torch.arange(20).int(), slots, stale.keys, stale.values, 10)
    assert_same_bits(attend(native, stale, lengths, q[:20], rows), before)


@several_threads
@both_dtypes
@pytest.mark.parametrize("window", [1, 31, 32, 33, 64])
def test_attention_ignores_entries_before_its_window(window: int, dtype: torch.dtype) -> None:
    """Blocks that no row's window reaches are never read, others weigh exactly nothing."""
    lengths = [200]
    cache, stale = (filled(lengths, 2, 34, dtype) for _ in range(2))
    rows = torch.arange(150, 200).int()
    q = normal(0, 50, 4 * 34, dtype=dtype)
    before = attend(native, cache, lengths, q, rows, None, window)
    oldest = 150 + 1 - window
    gone = cache.tables[0, : oldest // BLOCK].long()
    stale.keys[gone], stale.values[gone] = torch.nan, torch.nan
    assert_same_bits(attend(native, stale, lengths, q, rows, None, window), before)
    for i in (0, 20, 49):
        alone = attend(native, cache, lengths, q[i : i + 1], rows[i : i + 1], None, window)
        assert_same_bits(alone[0], before[i])


@both_dtypes
def test_combine_rows_do_not_depend_on_their_batch(dtype: torch.dtype) -> None:
    packed, out, channels = (normal(i, 300, 33, dtype=t) for i, t in enumerate((dtype, dtype, F32)))
    together = native.combine(packed, Plan.all(300), out.clone(), channels)
    for i in range(0, 300, 29):
        alone = native.combine(
            packed[i : i + 1], Plan.all(1), out[i : i + 1].clone(), channels[i : i + 1]
        )
        assert_same_bits(alone[0], together[i])
