"""Rows that leave inside a network: scores of the rows of images to the plan of who stays.

A plan's segments are (image, part of the image) pairs, so that its packed order is image by image,
the parts of each one after the other, the rows of a part ascending.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from pyruntime.plan import Plan


class Reduced(NamedTuple):
    """What becomes of the T rows of n images.

    Attributes:
        keep: (image, part) segments: the rows that stay, in their new order.
        ends: int32 [n + 1], where each image then begins.
        merge: segment g holds the rows whose weighted sum becomes one row, or None: nothing merges.
        at: int64 [G], the packed row of `keep` that each of these sums replaces.
    """

    keep: Plan
    ends: Tensor
    merge: Plan | None = None
    at: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Alike:
    """Images of a batch that have equally many rows, so that one tensor holds them without padding.

    Attributes:
        images: int32 [g, 1], their numbers.
        rows: int64 [g, N], the numbers of their rows.
        whole: they are all images of the batch, and `rows` are 0 .. g * N - 1.
    """

    images: Tensor
    rows: Tensor
    whole: bool

    def of(self, x: Tensor) -> Tensor:
        """Their rows of x [T, ...], [g, N, ...]: a view where they are all rows."""
        return x.unflatten(0, self.rows.shape) if self.whole else x[self.rows]


def alike(ends: Tensor, choices: Sequence[int]) -> tuple[tuple[Alike, int], ...]:
    """Images that share their number of rows and their number of `choices`, with the latter.

    Every image is computed as it would be alone, whatever its group: the batches of different
    lengths that mixed image sizes make run group by group.

    Args:
        ends: int32 [n + 1], cuts the rows into images.
        choices: a number of every image, as the rule says: how many rows it keeps, or merges.
    """
    return _alike(tuple(ends.diff().tolist()), tuple(choices))


@lru_cache(maxsize=64)  # batches of one length repeat
def _alike(lengths: tuple[int, ...], choices: tuple[int, ...]) -> tuple[tuple[Alike, int], ...]:
    starts = [0, *itertools.accumulate(lengths)]
    groups: dict[tuple[int, int], list[int]] = {}
    for image, key in enumerate(zip(lengths, choices, strict=True)):
        groups.setdefault(key, []).append(image)
    found = []
    for (length, choice), images in groups.items():
        first = torch.tensor([starts[image] for image in images])
        rows = first[:, None] + torch.arange(length)
        numbers = torch.tensor(images, dtype=torch.int32)[:, None]
        found.append((Alike(numbers, rows, len(groups) == 1), choice))
    return tuple(found)


def kept_of_first(keep: float, began: Sequence[int], patches: Sequence[int]) -> list[int]:
    """DynamicViT: patches that images keep of those they have, int(keep * what they began with)."""
    return [min(int(keep * first), left) for first, left in zip(began, patches, strict=True)]


def kept_of_left(keep: float, patches: Sequence[int]) -> list[int]:
    """EViT: patches that images keep of those they have."""
    return [math.ceil(keep * left) for left in patches]


def best(scores: Tensor, count: int) -> Tensor:
    """Which `count` of scores [g, N] of every image are its largest, bool [g, N].

    The lower of equal ones wins; NaN is larger than any number, so that the count is exact.
    """
    order = torch.argsort(scores, dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def plan_best(
    ops: ModuleType, scores: Tensor, ends: Tensor, prefix: int, counts: Sequence[int]
) -> Reduced:
    """Every image keeps its prefix rows and as many of its best patches as `counts` says.

    Rows stay in their order; the code of DynamicViT sorts them by score, which attention ignores.

    Args:
        scores: float32 [T], of patches; a prefix row's is not read.
        ends: int32 [n + 1], cuts the rows into images.
    """
    labels = torch.empty(len(scores), dtype=torch.int32)
    for group, count in alike(ends, counts):
        stays = best(group.of(scores)[:, prefix:], count)
        labels[group.rows[:, :prefix]] = group.images
        labels[group.rows[:, prefix:]] = torch.where(stays, group.images, -1)
    keep: Plan = ops.plan_partition(labels, len(ends) - 1)
    return Reduced(keep, keep.offsets)


def class_attention(q: Tensor, k: Tensor, heads: int, scale: float) -> Tensor:
    """What the first row of every image attends to, a mean over the heads, float32 [g, N].

    Args:
        q: [g, D], of these rows; k: [g, N, D].
    """
    query, key = (t.float().unflatten(-1, (heads, -1)) for t in (q, k))
    # Products summed along the channels: every score has the same bits whatever g is.
    shares = ((key * query[:, None]).sum(-1) * scale).transpose(1, 2).softmax(-1)
    total: Tensor = shares[:, 0]
    for head in range(1, heads):
        total = total + shares[:, head]
    return total / heads


def plan_attended(
    ops: ModuleType, q: Tensor, k: Tensor, ends: Tensor, prefix: int, counts: Sequence[int],
    heads: int, scale: float, fuse: bool,
) -> Reduced:  # fmt: skip
    """Every image keeps its prefix rows and the patches that its class row attends to most.

    Rows stay in their order; the code of EViT sorts them by attention, which attention ignores.
    With `fuse` one more row follows, the sum of the others weighted by that attention: it takes the
    place of one of them and counts as a patch from then on. An image that loses nothing has none.

    Args:
        q, k: [T, D], queries and keys of the rows.
        ends: int32 [n + 1], cuts the rows into images.
        counts: patches that each image keeps, at most those it has.
    """
    images = len(ends) - 1
    labels = torch.empty(len(k), dtype=torch.int32)
    into = torch.full((len(k),), -1, dtype=torch.int32)
    weights = torch.zeros(len(k))
    for group, count in alike(ends, counts):
        part = 2 * group.images
        if count == group.rows.shape[1] - prefix:
            labels[group.rows] = part
            continue
        patches = group.rows[:, prefix:]
        shares = class_attention(q[group.rows[:, 0]], group.of(k), heads, scale)[:, prefix:]
        stays = best(shares, count)
        labels[group.rows[:, :prefix]] = part
        labels[patches] = torch.where(stays, part, -1)
        if fuse:
            into[patches] = torch.where(stays, -1, group.images)
            weights[patches] = shares
            carrier = stays.int().argmin(1, keepdim=True)  # the first of those that leave
            labels[patches.gather(1, carrier)] = part + 1
    keep: Plan = ops.plan_partition(labels, 2 * images)
    reduced = Reduced(keep, keep.offsets[::2].contiguous())
    if not fuse:
        return reduced
    merge: Plan = ops.plan_partition(into, images, weights)
    loses = merge.offsets.diff() > 0
    if not bool(loses.all()):
        merge = _without_empty(merge)
    return reduced._replace(merge=merge, at=(keep.offsets[2::2] - 1)[loses].long())


def _without_empty(plan: Plan) -> Plan:
    """The plan without its empty segments."""
    offsets = torch.unique(plan.offsets)
    return Plan(plan.rows, offsets, plan.weights, plan.inverse, plan.num_rows, plan.capacity)


def back(plan: Plan) -> Plan:
    """The plan by which packed rows are summed into one row for every segment of `plan`.

    Where `plan` says which rows each segment takes, this one says which packed rows each segment's
    sum has: it is `plan` seen from its segments, with the same weights.
    """
    sizes = plan.offsets.diff()
    steps = torch.arange(int(sizes.max()) if len(sizes) else 0, dtype=torch.int32)
    inverse = torch.where(steps < sizes[:, None], plan.offsets[:-1, None] + steps, -1)
    segments = torch.arange(len(sizes), dtype=torch.int32)
    rows = segments.repeat_interleave(sizes, output_size=plan.kept)
    ends = torch.tensor([0, plan.kept], dtype=torch.int32)
    return Plan(rows, ends, plan.weights, inverse, len(sizes), plan.kept)
