"""Token Merging (arXiv 2210.09461): which rows of an image are most alike, and become one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyruntime.gates.reduction import Reduced, alike
from pyruntime.ops.weight import PANEL, Weight
from pyruntime.plan import Plan

_PARTS = 3  # of an image, in their new order: prefix, those of even place, those of odd place


class Merged(NamedTuple):
    """The plan of a merge, and float32 [T'], how many tokens every new row stands for."""

    reduced: Reduced
    sizes: Tensor


def pairs_of(pairs: int, prefix: int, lengths: Sequence[int]) -> list[int]:
    """Pairs that images of so many rows merge: at most half of the rows that may be."""
    return [max(min(pairs, (length - prefix) // 2), 0) for length in lengths]


def plan_merge(
    ops: ModuleType, k: Tensor, heads: int, ends: Tensor, sizes: Tensor, prefix: int,
    counts: Sequence[int],
) -> Merged:  # fmt: skip
    """Every image merges as many pairs as `counts` says.

    Rows of even place look for the most similar one of odd place, and those that found the most
    similar ones become one with it: the mean, weighted by sizes. Prefix rows neither look nor are
    found. The new order is that of facebookresearch/ToMe, on which the next merge depends: prefix,
    even places that stay, odd places. An image that merges nothing keeps its order.

    Args:
        k: [T, heads * d], the keys of the rows: similar are rows whose means over the heads have a
            large cosine.
        ends: int32 [n + 1], cuts the rows into images.
        sizes: float32 [T], how many tokens a row stands for.
    """
    metric = k[:, : k.shape[1] // heads].float()
    for part in k.chunk(heads, 1)[1:]:
        metric = metric + part
    metric = metric / metric.norm(dim=1, keepdim=True)
    labels = torch.empty(len(k), dtype=torch.int32)
    leaving, found = [], []
    for group, count in alike(ends, counts):
        image = _PARTS * group.images
        if not count:
            labels[group.rows] = image
            continue
        source, target = match(ops, group.of(metric), prefix, count)
        sources = group.rows.gather(1, source).flatten()
        labels[group.rows] = image + _parts(group.rows.shape[1], prefix)
        labels[sources] = -1
        leaving.append(sources)
        found.append(group.rows.gather(1, target).flatten())
    keep: Plan = ops.plan_partition(labels, _PARTS * (len(ends) - 1))
    merged = sizes[keep.rows.long()]
    reduced = Reduced(keep, keep.offsets[::_PARTS].contiguous())
    if not leaving:
        return Merged(reduced, merged)
    sources, targets = torch.cat(leaving), torch.cat(found)
    at, group_of = torch.unique(keep.inverse[targets, 0].long(), return_inverse=True)
    merged.index_add_(0, at[group_of], sizes[sources])
    into = torch.full((len(k),), -1, dtype=torch.int32)
    into[sources] = into[targets] = group_of.int()
    merge: Plan = ops.plan_partition(into, len(at))
    rows = merge.rows.long()
    weights = sizes[rows] / merged[at[into[rows].long()]]
    return Merged(
        reduced._replace(merge=dataclasses.replace(merge, weights=weights), at=at), merged
    )


@lru_cache(maxsize=64)
def _parts(length: int, prefix: int) -> Tensor:
    """Part of every place of an image, int32 [N]."""
    place = torch.arange(length, dtype=torch.int32)
    return torch.where(place < prefix, 0, 1 + place % 2)


def match(ops: ModuleType, metric: Tensor, prefix: int, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best matches of every image, places int64 [g, count] of those that leave and of
    those they merge into. The lower of equal ones wins.

    Args:
        metric: float32 [g, N, d], rows of length 1; a NaN matches before any number.
    """
    even, odd = metric[:, ::2], metric[:, 1::2]
    scores = _products(ops, even, odd)
    scores[:, : (prefix + 1) // 2] = -torch.inf
    scores[:, :, : prefix // 2] = -torch.inf
    order = torch.argsort(scores.amax(2), dim=1, descending=True, stable=True)
    source = order[:, :count]
    images = torch.arange(len(scores))[:, None]
    return 2 * source, 2 * scores[images, source].argmax(2) + 1


def _products(ops: ModuleType, a: Tensor, b: Tensor) -> Tensor:
    """a @ b^T of every image, float32 [g, A, B] of [g, A, d] and [g, B, d].

    Through `segment_matmul`, an image is a segment: the bits of one do not depend on the others.
    """
    (count, rows, depth), columns = a.shape, b.shape[1]
    panels = F.pad(b, (0, 0, 0, -columns % PANEL)).unflatten(1, (-1, PANEL))
    weight = Weight(panels.transpose(2, 3).contiguous(), columns, depth)
    offsets = torch.arange(count + 1, dtype=torch.int32) * rows
    numbers = torch.arange(count * rows, dtype=torch.int32)
    plan = Plan(numbers, offsets, None, numbers[:, None], len(numbers), len(numbers))
    products: Tensor = ops.segment_matmul(a.flatten(0, 1).contiguous(), weight, plan)
    return products.view(count, rows, columns)
