"""Token reduction in a block: a gate's plan, carried out on packed rows of images.

Counts follow from the length of an image alone, so that nothing of a batch enters a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.format.spec import VisionSpec
from pyruntime.gates.merge import pairs_of, plan_merge
from pyruntime.gates.reduction import (
    Reduced,
    back,
    kept_of_first,
    kept_of_left,
    plan_attended,
    plan_best,
)
from pyruntime.layers.norm import LayerNorm
from pyruntime.layers.residual import Linear
from pyruntime.layers.vision_block import Rows, Seen


@dataclass(frozen=True, slots=True, eq=False)
class DynamicViT:
    """A predictor keeps the best patches before a block (arXiv 2106.02034).

    Its first half of channels is each patch's own, of the other half all patches see the mean.

    Attributes:
        prefix: rows of an image before its patches.
        keep: share of the patches that an image began with.
        norm, enter: D to D.
        leave: D to D / 2 to D / 4 to 2, keep and drop.
    """

    prefix: int
    keep: float
    norm: LayerNorm
    enter: Linear
    leave: tuple[Linear, Linear, Linear]
    leads: bool = True

    def before(self, ops: ModuleType, rows: Rows) -> Rows:
        """The rows that the block sees."""
        if rows.began is None:
            raise InvalidInput("reduction: the number of patches that images began with is missing")
        patches = [length - self.prefix for length in rows.ends.diff().tolist()]
        counts = kept_of_first(self.keep, rows.began.tolist(), patches)
        scores = self._scores(ops, rows, patches)
        return _carry_out(ops, rows, plan_best(ops, scores, rows.ends, self.prefix, counts))

    def between(self, ops: ModuleType, rows: Rows, seen: Seen) -> Rows:
        """The same rows."""
        return rows

    def macs(self, lengths: Tensor) -> Tensor:
        """Of the predictor, for images of these lengths before it, int64 [n]."""
        matrices = [linear.weight for linear in (self.enter, *self.leave)]
        each = sum(weight.in_features * weight.out_features for weight in matrices)
        return (lengths - self.prefix) * each

    def _scores(self, ops: ModuleType, rows: Rows, patches: list[int]) -> Tensor:
        """log p(keep) of every patch, float32 [T], 0 of prefix rows."""
        place = torch.arange(len(rows.x), dtype=torch.int32)
        place -= rows.ends[:-1].repeat_interleave(rows.ends.diff(), output_size=len(place))
        numbers = torch.nonzero(place >= self.prefix)[:, 0]
        weight, bias = self.enter
        x = self.norm(ops, rows.x, numbers.int(), weight.dtype)
        x = ops.segment_matmul(x, weight, bias=bias, epilogue="gelu", out_dtype=torch.float32)
        half = x.shape[1] // 2
        for image in x.split(patches):  # one by one: the bits of a mean depend on its shape
            image[:, half:] = image[:, half:].mean(0)
        for (weight, bias), epilogue in zip(self.leave, ("gelu", "gelu", "none"), strict=True):
            x = ops.segment_matmul(x, weight, bias=bias, epilogue=epilogue)
        scores = torch.zeros(len(rows.x))
        scores[numbers] = F.log_softmax(x, 1)[:, 0]
        return scores


@dataclass(frozen=True, slots=True, eq=False)
class EViT:
    """A block keeps the patches that the class row attends to most (arXiv 2202.07800).

    Attributes:
        prefix: rows of an image before its patches, which stay. (The released code knows the class
            row alone: it would drop a distillation row like a patch.)
        keep: share of the patches that are left.
        fuse: those that leave become one more row.
        width: D.
    """

    prefix: int
    keep: float
    fuse: bool
    width: int
    leads: bool = False

    def before(self, ops: ModuleType, rows: Rows) -> Rows:
        """The same rows."""
        return rows

    def between(self, ops: ModuleType, rows: Rows, seen: Seen) -> Rows:
        """The rows after the attention that the rest of the block sees."""
        patches = [length - self.prefix for length in rows.ends.diff().tolist()]
        counts = kept_of_left(self.keep, patches)
        if counts == patches:
            return rows
        reduced = plan_attended(
            ops, seen.q, seen.k, rows.ends, self.prefix, counts, seen.heads, seen.scale, self.fuse
        )
        return _carry_out(ops, rows, reduced)

    def macs(self, lengths: Tensor) -> Tensor:
        """Of the class row's scores and of the sum, for images of these lengths, int64 [n]."""
        found = []
        for length in lengths.tolist():
            dropped = length - self.prefix - kept_of_left(self.keep, [length - self.prefix])[0]
            summed = dropped if self.fuse else 0
            found.append(self.width * (length + summed) if dropped else 0)
        return torch.tensor(found, dtype=torch.int64)


@dataclass(frozen=True, slots=True, eq=False)
class ToMe:
    """A block merges the most similar pairs of rows (arXiv 2210.09461).

    Attributes:
        prefix: rows of an image that do not merge.
        pairs: merged in every image, at most half of the rows that may be.
        head_dim: channels that are compared.
    """

    prefix: int
    pairs: int
    head_dim: int
    leads: bool = False

    def before(self, ops: ModuleType, rows: Rows) -> Rows:
        """The same rows."""
        return rows

    def between(self, ops: ModuleType, rows: Rows, seen: Seen) -> Rows:
        """The rows after the attention that the rest of the block sees."""
        counts = pairs_of(self.pairs, self.prefix, rows.ends.diff().tolist())
        sizes = torch.ones(len(rows.x)) if rows.sizes is None else rows.sizes
        if not any(counts):
            return rows._replace(sizes=sizes)
        merged = plan_merge(ops, seen.k, seen.heads, rows.ends, sizes, self.prefix, counts)
        return _carry_out(ops, rows, merged.reduced, merged.sizes)

    def macs(self, lengths: Tensor) -> Tensor:
        """Of the products of rows, for images of these lengths, int64 [n]."""
        found = [
            ((length + 1) // 2) * (length // 2) * self.head_dim * (count > 0)
            for length, count in zip(
                lengths.tolist(), pairs_of(self.pairs, self.prefix, lengths.tolist()), strict=True
            )
        ]
        return torch.tensor(found, dtype=torch.int64)


Reduction = DynamicViT | EViT | ToMe


def reductions_of(
    spec: VisionSpec, norm: Callable[[str], LayerNorm], linear: Callable[[str], Linear]
) -> dict[int, Reduction]:
    """The reduction of every block that has one and loses rows by it.

    Args:
        norm, linear: read what `vision_tensors` lists under a name.
    """
    reduction, found = spec.reduction, dict[int, Reduction]()
    if reduction is None:
        return found
    prefix = spec.prefix_tokens
    if reduction.method == "tome":
        for block, pairs in zip(reduction.blocks, reduction.merge, strict=True):
            if pairs:
                found[block] = ToMe(prefix, pairs, spec.head_dim)
        return found
    for number, (block, keep) in enumerate(zip(reduction.blocks, reduction.keep, strict=True)):
        if keep == 1:
            continue
        if reduction.method == "evit":
            found[block] = EViT(prefix, keep, reduction.fuse, spec.hidden_size)
            continue
        name = f"reduce.{number}"
        first, second, third = (linear(f"{name}.out.{layer}") for layer in range(3))
        found[block] = DynamicViT(
            prefix,
            keep,
            norm(f"{name}.in.norm"),
            linear(f"{name}.in"),
            (first, second, third),
        )
    return found


def _carry_out(ops: ModuleType, rows: Rows, reduced: Reduced, sizes: Tensor | None = None) -> Rows:
    """The rows that are left: in a matrix of their own, since they change places."""
    x = ops.gather(rows.x, reduced.keep)
    if reduced.merge is not None and reduced.at is not None:
        sums = rows.x.new_zeros(len(reduced.at), rows.x.shape[1])
        ops.combine(ops.gather(rows.x, reduced.merge), back(reduced.merge), sums)
        x[reduced.at] = sums
    return Rows(x, reduced.ends, sizes, rows.began)
