"""Plans of token reduction: their invariants, and their decisions spelled out in plain Python."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from pyruntime.gates.merge import pairs_of, plan_merge
from pyruntime.gates.reduction import (
    back,
    class_attention,
    kept_of_first,
    kept_of_left,
    plan_attended,
    plan_best,
)
from pyruntime.ops import native, reference
from tests.ops.strategies import assert_same_plan, check_plan, normal, seeds

BACKENDS: list[ModuleType] = [native, reference]
# Few values, so that ties are common.
levels = st.sampled_from([0.0, -1.0, 0.5, 2.0, -torch.inf, torch.nan])
prefixes = st.integers(0, 3)
lengths_of = st.lists(st.sampled_from([0, 1, 2, 5, 5, 8, 8, 8]), max_size=5)


def ends_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def best_of(scores: list[float], count: int) -> list[int]:
    """Places of the largest, the lower of equal ones first; NaN is the largest."""
    order = sorted(range(len(scores)), key=lambda i: (not math.isnan(scores[i]), -scores[i], i))
    order.sort(key=lambda i: not math.isnan(scores[i]))
    return sorted(order[:count])


@given(lengths_of, prefixes, st.data())
def test_the_best_patches_stay(lengths: list[int], prefix: int, data: st.DataObject) -> None:
    lengths = [length + prefix for length in lengths]
    ends, total = ends_of(lengths), sum(lengths)
    scores = torch.tensor(
        data.draw(st.lists(levels, min_size=total, max_size=total)), dtype=torch.float32
    )
    counts = [data.draw(st.integers(0, length - prefix)) for length in lengths]
    found = plan_best(native, scores, ends, prefix, counts)
    check_plan(found.keep, 1)
    assert_same_plan(found.keep, plan_best(reference, scores, ends, prefix, counts).keep)
    expected = []
    for first, length, count in zip(ends.tolist(), lengths, counts, strict=False):
        patches = scores[first + prefix : first + length].tolist()
        expected += [first + i for i in range(prefix)]
        expected += [first + prefix + i for i in best_of(patches, count)]
    assert found.keep.rows.tolist() == expected
    assert found.ends.tolist() == ends_of([prefix + count for count in counts]).tolist()
    assert found.merge is None


@pytest.mark.parametrize("count", [0, 1, 7, 196])
def test_of_equal_scores_the_first_stay(count: int) -> None:
    found = plan_best(native, torch.zeros(2 * 197), ends_of([197, 197]), 1, [count, count])
    assert found.keep.rows.tolist() == [
        start + i for start in (0, 197) for i in range(count + 1)
    ]  # fmt: skip


def test_counts_are_those_of_the_code() -> None:
    assert kept_of_first(0.7, [196, 196, 10], [196, 100, 10]) == [137, 100, 7]
    assert kept_of_first(0.7**3, [196], [96]) == [int(196 * 0.7**3)]
    assert kept_of_left(0.7, [196, 138, 1, 0]) == [138, 97, 1, 0]
    assert pairs_of(13, 1, [197, 27, 26, 3, 2, 1]) == [13, 13, 12, 1, 0, 0]
    assert pairs_of(13, 2, [197, 28, 27, 4, 3, 1]) == [13, 13, 12, 1, 0, 0]


@given(seeds, st.lists(st.sampled_from([1, 2, 6, 9, 9]), max_size=4), st.integers(1, 3))
def test_the_class_row_keeps_what_it_attends_to(seed: int, patches: list[int], prefix: int) -> None:
    lengths = [prefix + n for n in patches]
    ends, heads, scale = ends_of(lengths), 3, 0.3
    q, k = normal(seed, sum(lengths), 12), normal(seed + 1, sum(lengths), 12)
    counts = kept_of_left(0.6, patches)
    kept = plan_attended(native, q, k, ends, prefix, counts, heads, scale, False)
    fused = plan_attended(native, q, k, ends, prefix, counts, heads, scale, True)
    other = plan_attended(reference, q, k, ends, prefix, counts, heads, scale, True)
    check_plan(kept.keep, 1)
    check_plan(fused.keep, 1)
    assert_same_plan(fused.keep, other.keep)
    rows, sums, at = [], [], []
    for i, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        mine = slice(int(ends[i]), int(ends[i + 1]))
        query, key = q[mine.start].view(heads, 4), k[mine].view(length, heads, 4)
        shares = (torch.einsum("hd,nhd->hn", query, key) * scale).softmax(1).mean(0)[prefix:]
        stay = best_of(shares.tolist(), count)
        leave = [j for j in range(length - prefix) if j not in stay]
        rows.append([mine.start + j for j in [*range(prefix), *(prefix + j for j in stay)]])
        if leave:
            sums.append({mine.start + prefix + j: float(shares[j]) for j in leave})
            at.append(sum(map(len, rows)) + len(at))
    assert kept.keep.rows.tolist() == [row for image in rows for row in image]
    assert kept.merge is None
    assert fused.merge is not None and fused.at is not None
    check_plan(fused.merge, 1)
    assert fused.at.tolist() == at
    assert fused.merge.num_segments == len(sums)
    for i, expected in enumerate(sums):
        mine = slice(int(fused.merge.offsets[i]), int(fused.merge.offsets[i + 1]))
        assert fused.merge.rows[mine].tolist() == list(expected)
        assert fused.merge.weights is not None
        torch.testing.assert_close(fused.merge.weights[mine], torch.tensor(list(expected.values())))
    more = [len(image) + (n > count) for image, n, count in zip(rows, patches, counts, strict=True)]
    assert fused.ends.tolist() == ends_of(more).tolist()
    stays = torch.ones(len(fused.keep.rows), dtype=torch.bool)
    stays[fused.at] = False  # of these rows only the place counts
    assert fused.keep.rows[stays].tolist() == kept.keep.rows.tolist()


def test_attention_of_an_image_is_the_same_bits_in_any_group() -> None:
    q, k = normal(1, 9, 48), normal(2, 9, 33, 48)
    whole = class_attention(q, k, 6, 0.35)
    torch.testing.assert_close(whole.sum(1), torch.ones(9))
    for part in (slice(0, 1), slice(2, 5)):
        assert torch.equal(class_attention(q[part], k[part], 6, 0.35), whole[part])


def expected_pairs(axes: list[int], prefix: int, count: int) -> list[tuple[int, int]]:
    """Pairs of rows that are +- unit vectors: axis a stands for e_a, -1 - a for its opposite."""

    def cosine(a: int, b: int) -> int:
        return 1 if a == b else -1 if a == -1 - b else 0

    odd = [j for j in range(1, len(axes), 2) if j >= prefix]
    found = []
    for i in range(0, len(axes), 2):
        if i >= prefix and odd:
            best = max(cosine(axes[i], axes[j]) for j in odd)
            found.append((best, i, next(j for j in odd if cosine(axes[i], axes[j]) == best)))
    found.sort(key=lambda each: (-each[0], each[1]))
    return [(i, j) for _, i, j in found[:count]]


@given(st.lists(st.sampled_from([1, 4, 7, 7, 10]), max_size=4), prefixes, st.integers(1, 6),
       st.sampled_from([1, 3]), st.data())  # fmt: skip
@example([10, 4], 1, 6, 1, None)
def test_the_most_similar_merge(
    patches: list[int], prefix: int, pairs: int, heads: int, data: st.DataObject | None
) -> None:
    lengths = [n + prefix for n in patches]
    ends, total, depth = ends_of(lengths), sum(lengths), 3
    counts = pairs_of(pairs, prefix, lengths)
    if data is None:
        axes, size = [0] * total, [1] * total
    else:
        draw = st.lists(st.integers(-depth, depth - 1), min_size=total, max_size=total)
        axes = data.draw(draw)
        size = data.draw(st.lists(st.integers(1, 9), min_size=total, max_size=total))
    unit = torch.eye(depth)
    k = torch.stack([unit[a] if a >= 0 else -unit[-1 - a] for a in axes]) if axes else unit[:0]
    sizes = torch.tensor(size, dtype=torch.float32)
    found, merged = plan_merge(native, k.repeat(1, heads), heads, ends, sizes, prefix, counts)
    check_plan(found.keep, 1)
    new = [length - count for length, count in zip(lengths, counts, strict=True)]
    assert found.ends.tolist() == ends_of(new).tolist()
    rows, groups = [], {}
    for i, count in enumerate(counts):
        start = int(ends[i])
        mine = axes[start : start + lengths[i]]
        gone = expected_pairs(mine, prefix, count)
        leaving = {a for a, _ in gone}
        order = list(range(lengths[i]))
        if gone:
            order.sort(key=lambda j: (j >= prefix, j >= prefix and j % 2, j))
        rows += [start + j for j in order if j not in leaving]
        for a, b in gone:
            groups.setdefault(start + b, []).append(start + a)
    assert found.keep.rows.tolist() == rows
    mass = {row: size[row] + sum(size[a] for a in groups.get(row, [])) for row in rows}
    assert merged.tolist() == [mass[row] for row in rows]
    if not groups:
        assert found.merge is None
        return
    assert found.merge is not None and found.merge.weights is not None and found.at is not None
    check_plan(found.merge, 1)
    for g, place in enumerate(found.at.tolist()):
        segment = slice(int(found.merge.offsets[g]), int(found.merge.offsets[g + 1]))
        members = found.merge.rows[segment].tolist()
        assert members == sorted([rows[place], *groups.pop(rows[place])])
        expected = torch.tensor([size[row] / mass[rows[place]] for row in members])
        torch.testing.assert_close(found.merge.weights[segment], expected)
    assert not groups


@given(seeds, st.integers(0, 12), st.integers(1, 5))
def test_a_plan_seen_from_its_segments(seed: int, count: int, segments: int) -> None:
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, segments, (count,), generator=random, dtype=torch.int32)
    weights, x = torch.rand(count, generator=random), torch.randn(count, 5, generator=random)
    for ops in BACKENDS:
        plan = ops.plan_partition(labels, segments, weights)
        seen = back(plan)
        seen.validate()
        sums = ops.combine(ops.gather(x, plan), seen, torch.zeros(segments, 5))
        expected = torch.zeros(segments, 5)
        for row, label in enumerate(labels.tolist()):
            if label >= 0:
                expected[label] += weights[row] * x[row]
        torch.testing.assert_close(sums, expected)
