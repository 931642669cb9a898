"""The native ops against the reference, on every instruction set this processor has."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.layers.kv import BLOCK, PagedKV
from pyruntime.ops import Weight, native, reference
from pyruntime.plan import Plan
from tests.ops.strategies import (
    assert_close,
    assert_same_bits,
    generator,
    normal,
    seeds,
    segments_plan,
)

F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread, or as many as a test asks for: on a busy machine they mostly wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(getattr(request, "param", 1))
    yield
    torch.set_num_threads(before)


several_threads = pytest.mark.parametrize("threads", [1, 3], indirect=True, ids=["1t", "3t"])
dtypes = st.sampled_from([F32, BF16])
widths = st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 65, 100, 257])
both_dtypes = pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
few = settings(max_examples=30)


def some_plan(seed: int, count: int, keep: float, weighted: bool = False) -> Plan:
    scores = torch.rand(count, generator=generator(seed))
    return reference.plan_threshold(scores, torch.tensor(1.0 - keep), weighted)


keeps = st.sampled_from([-1.0, 0.1, 0.5, 0.9, 2.0])  # none, few, half, most, all


# ---- movement ----


@few
@given(seeds, st.integers(0, 90), widths, keeps, st.sampled_from([F32, BF16, torch.int64]))
def test_gather(seed: int, count: int, width: int, keep: float, dtype: torch.dtype) -> None:
    x, plan = (normal(seed, count, width) * 9).to(dtype), some_plan(seed, count, keep)
    packed = native.gather(x, plan)
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
    plan = reference.plan_topk(scores, k, renormalize=True)
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


# ---- segment_matmul ----

SHAPES = [(1, 1), (1, 7), (5, 16), (33, 31), (64, 65), (96, 100), (130, 17), (31, 200)]  # N, K
SIZES = [[0], [1], [12], [13], [50], [3, 0, 1, 25], [0, 0, 5], [1, 2, 3, 4, 5, 6]]
EPILOGUES = ["none", "gelu", "silu", "silu_mul"]


def weight_of(
    seed: int, segments: int, n: int, k: int, dtype: torch.dtype, epilogue: str
) -> Weight:
    dense = normal(seed, segments, n, k, dtype=dtype)
    if epilogue == "silu_mul":
        return Weight.pack_gate_up(dense, normal(seed + 1, segments, n, k, dtype=dtype))
    return Weight.pack(dense)


def magnitude(
    x: Tensor, weight: Weight, plan: Plan | None, bias: Tensor | None, epi: str
) -> Tensor:
    positive = Weight(weight.dense().abs(), weight.out_features, weight.in_features, "dense")
    size = reference.segment_matmul(
        x.abs(), positive, plan, bias=None if bias is None else bias.abs(), out_dtype=F32
    ).double()
    if epi == "silu_mul":  # an error of one factor is multiplied by the other
        left, right = size.chunk(2, dim=1)
        return 2 * left * right + left + right
    return size


@both_dtypes
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_segment_matmul(n: int, k: int, epilogue: str, dtype: torch.dtype) -> None:
    for i, sizes in enumerate(SIZES):
        plan = segments_plan(sizes, i, dropped=i)
        weight = weight_of(i, len(sizes), n, k, dtype, epilogue)
        bias = normal(7, len(sizes), weight.out_features) if i % 2 else None
        source = normal(i + 9, plan.num_rows, k, dtype=dtype)
        packed = reference.gather(source, plan)
        for out_dtype in (F32, BF16):
            options: dict[str, Any] = {
                "epilogue": epilogue, "bias": bias, "out_dtype": out_dtype,
            }  # fmt: skip
            expected = reference.segment_matmul(packed, weight, plan, **options)
            actual = native.segment_matmul(packed, weight, plan, **options)
            assert actual.shape == (plan.kept, n)
            assert_close(actual, expected, magnitude(packed, weight, plan, bias, epilogue))
            gathered = native.segment_matmul(source, weight, plan, gather=True, **options)
            assert_same_bits(gathered, actual)
            if len(sizes) == 1:
                assert_same_bits(native.segment_matmul(packed, weight, **options), actual)
        assert native.segment_matmul(packed, weight, plan, epilogue=epilogue).dtype == dtype


@several_threads
@both_dtypes
@pytest.mark.parametrize("epilogue", ["none", "silu_mul"])
def test_segment_matmul_in_many_blocks(dtype: torch.dtype, epilogue: str) -> None:
    """More rows than share one pass over a panel, K beyond the cache's share, skewed segments."""
    plan = segments_plan([500, 0, 3, 130], 0)
    weight = weight_of(0, 4, 70, 1101, dtype, epilogue)
    x = normal(1, plan.kept, 1101, dtype=dtype)
    options = {"epilogue": epilogue, "out_dtype": F32}
    expected = reference.segment_matmul(x, weight, plan, **options)  # type: ignore[arg-type]
    actual = native.segment_matmul(x, weight, plan, **options)  # type: ignore[arg-type]
    assert_close(actual, expected, magnitude(x, weight, plan, None, epilogue))


@both_dtypes
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("segments", [1, 3])
def test_weight_layout_round_trip(dtype: torch.dtype, interleaved: bool, segments: int) -> None:
    for n, k in SHAPES:
        gate, up = normal(0, segments, n, k, dtype=dtype), normal(1, segments, n, k, dtype=dtype)
        weight = Weight.pack_gate_up(gate, up) if interleaved else Weight.pack(gate)
        assert_same_bits(weight.dense(), torch.cat([gate, up], 1) if interleaved else gate)
        if not interleaved:
            ids = torch.tensor([n - 1, 0, n // 2])
            assert_same_bits(weight.take_rows(ids), gate[0][ids])


# ---- rms_norm, gate ----


@few
@given(seeds, st.integers(0, 40), widths, dtypes, st.booleans())
def test_rms_norm(seed: int, rows: int, width: int, dtype: torch.dtype, probed: bool) -> None:
    x, weight = normal(seed, rows, width, dtype=dtype), normal(seed + 1, width)
    probe = normal(seed + 2, width) if probed else None
    out, logits = native.rms_norm(x, weight, 1e-5, probe, 0.75)
    expected, _ = reference.rms_norm(x, weight, 1e-5)
    assert_close(out, expected, expected.double().abs())
    assert (logits is None) == (probe is None)
    if logits is not None and probe is not None:  # it reads the row as rounded
        exact = (out.double() @ probe.double() + 0.75).sigmoid()
        assert_close(logits, exact.float(), (out.double().abs() @ probe.double().abs()))


def test_rms_norm_of_zeros_is_zero() -> None:
    out, _ = native.rms_norm(torch.zeros(2, 33), torch.ones(33), 1e-6)
    assert torch.equal(out, torch.zeros(2, 33))


@few
@given(seeds, st.integers(0, 40), widths, st.sampled_from([0.1, 3.0, 40.0]))
def test_gate(seed: int, rows: int, width: int, scale: float) -> None:
    logits = normal(seed, rows, width) * scale
    expected = logits.double().sigmoid()
    means = native.gate(logits)
    assert_close(logits, expected.float(), 1.0)
    assert_close(means, expected.mean(1).float(), 1.0)


def test_gate_at_its_limits() -> None:
    """G1 rests on sigmoid(40) being exactly 1."""
    logits = torch.tensor([[40.0, -100.0, 0.0, torch.inf, -torch.inf] * 7])
    native.gate(logits)
    assert logits[0, [0, 2, 3]].tolist() == [1.0, 0.5, 1.0]
    assert 0 <= float(logits[0, [1, 4]].max()) < 1e-37
    broken = torch.tensor([[torch.nan, 1.0]])
    assert bool(native.gate(broken).isnan())


# ---- rotary, cache, attention ----


@dataclasses.dataclass
class Cache:
    """Sequences of given lengths in shuffled blocks of a paged cache, filled by the reference."""

    keys: Tensor
    values: Tensor
    tables: Tensor
    head_dim: int

    @staticmethod
    def slots(tables: Tensor, sequences: Tensor, positions: Tensor) -> Tensor:
        block = tables[sequences.long(), positions.long() // BLOCK]
        return (block * BLOCK + positions % BLOCK).int()


def table(head_dim: int, positions: int = 400) -> Tensor:
    angle = torch.arange(positions)[:, None] / 10000 ** (torch.arange(0, head_dim, 2) / head_dim)
    return torch.cat([angle.cos(), angle.sin()], 1)


def rows_of(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Positions and sequence of every row."""
    positions = torch.cat([torch.arange(n) for n in lengths]).int()
    each = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()
    return positions, each


class Spec:
    """The part of a DecoderSpec that the cache reads."""

    def __init__(self, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self.num_layers, self.num_kv_heads, self.head_dim = 1, kv_heads, head_dim
        self.dtype = "bfloat16" if dtype == BF16 else "float32"


def filled(
    lengths: list[int], kv_heads: int, head_dim: int, dtype: torch.dtype, ops: Any = reference
) -> Cache:
    blocks = [-(-n // BLOCK) for n in lengths]
    order = torch.randperm(sum(blocks), generator=generator(3)).int()
    tables = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    for i, mine in enumerate(order.split(blocks)):
        tables[i, : len(mine)] = mine
    kv = PagedKV(Spec(kv_heads, head_dim, dtype), sum(blocks))  # type: ignore[arg-type]
    positions, sequences = rows_of(lengths)
    new = normal(4, len(positions), 2 * kv_heads * head_dim, dtype=dtype)
    slots = Cache.slots(tables, sequences, positions)
    keys, values = kv.keys[0], kv.values[0]
    ops.append(new, table(head_dim), positions, slots, keys, values, head_dim)
    return Cache(keys, values, tables, head_dim)


HEAD_DIMS = [2, 8, 10, 32, 34, 64, 80]


@both_dtypes
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("normed", [False, True])
def test_rotate(head_dim: int, normed: bool, dtype: torch.dtype) -> None:
    positions = torch.tensor([0, 7, 3, 399], dtype=torch.int32)
    norm = normal(1, head_dim) if normed else None
    for rows in (None, torch.tensor([1, 3], dtype=torch.int32), torch.empty(0, dtype=torch.int32)):
        q = normal(0, 4 if rows is None else len(rows), 3 * head_dim, dtype=dtype)
        expected = reference.rotate(
            q.clone(), table(head_dim), positions, rows, head_dim, norm, 1e-5
        )
        actual = native.rotate(q.clone(), table(head_dim), positions, rows, head_dim, norm, 1e-5)
        assert_close(actual, expected, 20.0)


@both_dtypes
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_append(head_dim: int, dtype: torch.dtype) -> None:
    lengths = [1, 70, 32, 5]
    expected, actual = (filled(lengths, 2, head_dim, dtype, ops) for ops in (reference, native))
    assert_same_bits(actual.values, expected.values)
    assert_close(actual.keys, expected.keys, 20.0)
    # And read back in order of the tokens, the values are what was put in.
    positions, _ = rows_of(lengths)
    new = normal(4, len(positions), 2, 2, head_dim, dtype=dtype)[1:71, 1]
    blocks = actual.tables[1, :3].long()
    _, values = reference.read_cache(actual.keys, actual.values, blocks, head_dim)
    assert_same_bits(values[:70], new)


def test_append_with_a_key_norm() -> None:
    new, norm = normal(0, 5, 2 * 2 * 10), normal(1, 10)
    positions, slots = torch.arange(5).int(), torch.tensor([3, 4, 40, 41, 42]).int()
    found = []
    for ops in (reference, native):
        kv = PagedKV(Spec(2, 10, F32), 2)  # type: ignore[arg-type]
        ops.append(new, table(10), positions, slots, kv.keys[0], kv.values[0], 10, norm, 1e-5)
        found.append(kv)
    assert_close(found[1].keys[0], found[0].keys[0], 20.0)
    assert int((found[1].keys[0] != 0).sum()) == 5 * 2 * 10


# (query heads, kv heads): GQA 1, 4 and all, and a group wider than any register tile
HEADS = [(4, 4), (8, 2), (6, 1), (26, 2), (13, 1)]
LENGTHS = [[1], [33], [5, 1, 64], [100, 31, 32, 200]]


def attend(ops: Any, cache: Cache, lengths: list[int], q: Tensor, rows: Tensor | None) -> Tensor:
    positions, sequences = rows_of(lengths)
    result: Tensor = ops.attention(
        q, rows, positions, sequences, cache.tables, cache.keys, cache.values,
        cache.head_dim, cache.head_dim**-0.5,
    )  # fmt: skip
    return result


@both_dtypes
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("head_dim", [8, 10, 34, 80])
def test_attention(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    for i, lengths in enumerate(LENGTHS):
        cache = filled(lengths, kv_heads, head_dim, dtype)
        total = sum(lengths)
        kept = torch.rand(total, generator=generator(i)) < 0.5
        kept[-1] = True
        for rows in (None, kept.nonzero()[:, 0].int(), torch.empty(0, dtype=torch.int32)):
            count = total if rows is None else len(rows)
            q = normal(i, count, heads * head_dim, dtype=dtype)
            expected = attend(reference, cache, lengths, q, rows)
            actual = attend(native, cache, lengths, q, rows)
            # bfloat16 weights of the values are rounded once more than the reference's.
            slack = 20.0 if dtype == F32 else 2.0**-8 / 2e-6 * 4
            assert_close(actual, expected, slack)


# ---- a row's result is its own ----


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
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_attention_rows_do_not_depend_on_their_batch(
    heads: int, kv_heads: int, dtype: torch.dtype
) -> None:
    lengths, head_dim = [100, 31, 7, 200], 34
    cache = filled(lengths, kv_heads, head_dim, dtype)
    # What other owners left in the unused end of a block must not matter either.
    total = sum(lengths)
    q = normal(0, total, heads * head_dim, dtype=dtype)
    together = attend(native, cache, lengths, q, None)
    for i in [0, 1, 31, 32, 33, 99, 100, 130, 131, 137, 138, 300, total - 1]:
        alone = attend(native, cache, lengths, q[i : i + 1], torch.tensor([i], dtype=torch.int32))
        assert_same_bits(alone[0], together[i])
    for keep in (0.1, 0.5, 0.9):
        rows = (torch.rand(total, generator=generator(1)) < keep).nonzero()[:, 0].int()
        assert_same_bits(
            attend(native, cache, lengths, q[rows.long()], rows), together[rows.long()]
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


@both_dtypes
def test_combine_rows_do_not_depend_on_their_batch(dtype: torch.dtype) -> None:
    packed, out, channels = (normal(i, 300, 33, dtype=t) for i, t in enumerate((dtype, dtype, F32)))
    together = native.combine(packed, Plan.all(300), out.clone(), channels)
    for i in range(0, 300, 29):
        alone = native.combine(
            packed[i : i + 1], Plan.all(1), out[i : i + 1].clone(), channels[i : i + 1]
        )
        assert_same_bits(alone[0], together[i])


# ---- refusals ----

X, PLAN = torch.zeros(4, 8), Plan.all(4)
W = Weight.pack(torch.zeros(5, 8))
PAIR = Weight.pack_gate_up(torch.zeros(5, 8), torch.zeros(5, 8))
two = segments_plan([2, 2], 0)
REFUSALS: dict[str, tuple[Callable[[], object], str]] = {
    "scores dtype": (
        lambda: native.plan_threshold(X[0].double(), torch.tensor(0.0)),
        "plan_threshold: scores must be a contiguous CPU torch.float32 tensor of rank 1, got "
        r"contiguous torch.float64 \[8\] on cpu",
    ),
    "tau rows": (
        lambda: native.plan_threshold(X[0], torch.zeros(3)),
        "plan_threshold: tau has 3 rows, scores 8",
    ),
    "topk rank": (lambda: native.plan_topk(X[0], 1), "plan_topk: scores must be .* rank 2, got .*"),
    "topk k": (lambda: native.plan_topk(X, 9), r"plan_topk: k must lie in \[1, 8\], got 9"),
    "labels": (
        lambda: native.plan_partition(X[0], 2),
        "plan_partition: labels must be .*int32.*got contiguous torch.float32",
    ),
    "gather rows": (
        lambda: native.gather(X[:3], PLAN),
        r"gather: x must be a contiguous CPU tensor \[4, H\], got .*\[3, 8\]",
    ),
    "gather strided": (lambda: native.gather(X.T.contiguous().T, PLAN), "gather: x .*got strided"),
    "compact rows": (lambda: native.compact(X[:3], PLAN), r"compact: x must .*\[4, ...\], got .*"),
    "compact segments": (
        lambda: native.compact(X, two), "compact: the plan must have one segment, has 2"
    ),
    "combine dtype": (
        lambda: native.combine(X, PLAN, X.bfloat16()),
        "combine: out must be .*float32.* got contiguous torch.bfloat16",
    ),
    "combine rows": (
        lambda: native.combine(X[:3], PLAN, X),
        r"combine: a plan of 4 of 4 rows needs packed \[4, H\].*got \[3, 8\] and \[4, 8\]",
    ),
    "combine channels": (
        lambda: native.combine(X, PLAN, X.clone(), X[:, :7].contiguous()),
        r"combine: channel_weights must be \[4, 8\], got .*\[4, 7\]",
    ),
    "matmul dtype": (
        lambda: native.segment_matmul(X.double(), W), "segment_matmul: x must be .*got .*float64"
    ),
    "matmul k": (
        lambda: native.segment_matmul(X[:, :7].contiguous(), W),
        "segment_matmul: x .*needs .*K=7, got panel torch.float32 K=8",
    ),
    "matmul weight dtype": (
        lambda: native.segment_matmul(X.bfloat16(), W), "segment_matmul: .*got panel torch.float32"
    ),
    "matmul dense": (
        lambda: native.segment_matmul(X, Weight(torch.zeros(1, 5, 8), 5, 8, "dense")),
        "segment_matmul: .*got dense",
    ),
    "matmul epilogue": (
        lambda: native.segment_matmul(X, W, epilogue="relu"),
        "segment_matmul: epilogue must be one of .*got 'relu'",
    ),
    "matmul pair": (
        lambda: native.segment_matmul(X, PAIR), "silu_mul exactly for interleaved.*got 'none'"
    ),
    "matmul no pair": (
        lambda: native.segment_matmul(X, W, epilogue="silu_mul"), "interleaved=False"
    ),
    "matmul segments": (
        lambda: native.segment_matmul(X, W, two),
        "segment_matmul: the plan has 2 segments, the weight 1",
    ),
    "matmul no plan": (
        lambda: native.segment_matmul(X, Weight.pack(torch.zeros(2, 5, 8))),
        "segment_matmul: 2 matrices need a plan",
    ),
    "matmul packed rows": (
        lambda: native.segment_matmul(X[:3], W, PLAN), r"x must be \[4, K\] packed rows, got"
    ),
    "matmul source rows": (
        lambda: native.segment_matmul(X[:3], W, PLAN, gather=True), r"\[4, K\] to gather from, got"
    ),
    "matmul bias": (
        lambda: native.segment_matmul(X, W, bias=torch.zeros(4)),
        r"bias must be \[1, 5\], got .*\[4\]",
    ),
    "matmul out dtype": (
        lambda: native.segment_matmul(X, W, out_dtype=torch.float16),
        "segment_matmul: out_dtype must be .*got torch.float16",
    ),
    "norm weight": (
        lambda: native.rms_norm(X, torch.ones(7), 0.0),
        r"rms_norm: weight must be \[8\], got .*\[7\]",
    ),
    "norm probe": (
        lambda: native.rms_norm(X, torch.ones(8), 0.0, torch.ones(9)),
        r"rms_norm: probe must be \[8\]",
    ),
    "gate dtype": (lambda: native.gate(X.bfloat16()), "gate: logits must be .*got .*bfloat16"),
    "weight rank": (
        lambda: Weight.pack(torch.zeros(3)),
        r"Weight: expected .*got torch.float32 \[3\]",
    ),
    "weight dtype": (lambda: Weight.pack(torch.zeros(3, 3).half()), "Weight: expected .*float16"),
    "weight pair": (
        lambda: Weight.pack_gate_up(torch.zeros(3, 3), torch.zeros(3, 4)),
        r"gate \[3, 3\] .* and up \[3, 4\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_name_op_argument_expected_and_actual(name: str) -> None:
    call, message = REFUSALS[name]
    with pytest.raises(InvalidInput, match=f"(?s){message}"):
        call()


# ---- instruction sets ----

FLAGS = {
    "portable": set(),
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_bf16": {"avx512f", "avx512_bf16"},
}


def cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return set()
    return set(
        next((x for x in info.read_text().splitlines() if x.startswith("flags")), "").split()
    )


def run_python(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYRUNTIME_CPU_ISA": isa, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=root, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", FLAGS)
def test_instruction_set(name: str) -> None:
    """This whole file again, with the kernels built for another instruction set."""
    if not FLAGS[name] <= cpu_flags():
        pytest.skip(f"this processor has no {name}")
    if os.environ.get("PYRUNTIME_CPU_ISA") is None and native.isa() == name:
        pytest.skip(f"{name} is what the rest of this file has just run on")
    used = run_python(name, "-c", "from pyruntime.ops import native; print(native.isa())")
    assert used.stdout.strip() == name, used.stderr
    # Gather, compact and the refusals are not compiled per set.
    select = "not instruction_set and not refusals and not gather and not compact and not 3t"
    done = run_python(name, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", select,
                      str(Path(__file__).resolve()))  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_an_unknown_instruction_set_is_refused() -> None:
    code = (
        "from pyruntime.errors import InvalidInput; from pyruntime.ops import backend, native\n"
        "for call in (native.isa, lambda: backend('cpu')):\n"
        "    try: call()\n"
        "    except InvalidInput as error: print(error)\n"
    )
    done = run_python("sse9", "-c", code)
    expected = "PYRUNTIME_CPU_ISA=sse9: unknown, expected one of "
    assert done.returncode == 0 and done.stdout.count(expected) == 2, done.stdout + done.stderr
    assert "avx2" in done.stdout or "portable" in done.stdout
