"""rotate, append and attention: native against the reference."""

from __future__ import annotations

import pytest
import torch

from pyruntime.layers.kv import PagedKV
from pyruntime.ops import native, reference
from tests.ops.paged import HEADS, VARIANTS, Spec, attend, filled, rows_of, table
from tests.ops.strategies import (
    F32,
    assert_close,
    assert_same_bits,
    both_dtypes,
    generator,
    normal,
    several_threads,
)

pytestmark = pytest.mark.usefixtures("threads")
HEAD_DIMS = [2, 8, 10, 32, 34, 64, 80]
# bfloat16 weights of the values are rounded once more than the reference's.
SLACK = {F32: 20.0, torch.bfloat16: 2.0**-8 / 2e-6 * 4}
LENGTHS = [[1], [33], [5, 1, 64], [100, 31, 32, 200]]


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
            assert_close(actual, expected, SLACK[dtype])


@both_dtypes
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize(("sunk", "window"), VARIANTS)
def test_attention_with_sinks_and_a_window(
    heads: int, kv_heads: int, sunk: bool, window: int, dtype: torch.dtype
) -> None:
    sinks = 3 * normal(7, heads) if sunk else None
    for i, lengths in enumerate(LENGTHS):
        cache = filled(lengths, kv_heads, 10, dtype)
        rows = (torch.rand(sum(lengths), generator=generator(i)) < 0.7).nonzero()[:, 0].int()
        q = normal(i, len(rows), heads * 10, dtype=dtype)
        expected = attend(reference, cache, lengths, q, rows, sinks, window)
        actual = attend(native, cache, lengths, q, rows, sinks, window)
        assert_close(actual, expected, SLACK[dtype])


@pytest.mark.parametrize("sink", [-torch.inf, 1e30])
def test_a_sink_takes_its_share_and_no_value(sink: float) -> None:
    cache = filled([40], 1, 8, F32)
    q, sinks = normal(0, 40, 8), torch.tensor([sink])
    actual = attend(native, cache, [40], q, None, sinks)
    expected = attend(native, cache, [40], q, None) if sink < 0 else torch.zeros_like(q)
    assert_same_bits(actual, expected)


def test_a_window_of_one_returns_the_newest_value() -> None:
    cache = filled([70], 2, 8, F32)
    _, values = reference.read_cache(cache.keys, cache.values, cache.tables[0].long(), 8)
    actual = attend(native, cache, [70], normal(0, 70, 16), None, None, 1)
    assert_same_bits(actual, values[:70].flatten(1))


@several_threads
@both_dtypes
@pytest.mark.parametrize(("heads", "head_dim"), [(16, 576), (128, 576), (50, 192)])
def test_latent_attention(heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """One KV head under all query heads, and a head as wide as DeepSeek's latent."""
    lengths = [70, 5]
    cache = filled(lengths, 1, head_dim, dtype)
    for rows in (torch.tensor([69]).int(), torch.tensor([3, 40, 41, 71, 74]).int()):
        q = normal(0, len(rows), heads * head_dim, dtype=dtype)
        expected = attend(reference, cache, lengths, q, rows)
        assert_close(attend(native, cache, lengths, q, rows), expected, SLACK[dtype])
