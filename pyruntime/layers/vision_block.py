"""A transformer block on packed rows of images: only its attention knows where an image ends."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyruntime.layers.adaptive import Adaptive, Meter
from pyruntime.layers.norm import LayerNorm
from pyruntime.layers.output_rows import output_rows
from pyruntime.layers.residual import Linear


class Rows(NamedTuple):
    """Rows of n images, one image after the other.

    Attributes:
        x: [T, d].
        ends: int32 [n + 1], where each image begins; ``ends[n] == T``.
        sizes: float32 [T], how many tokens a row stands for; None: 1 each, or nobody asks.
        began: int32 [n], patch rows that each image began with; None where no rows leave.
    """

    x: Tensor
    ends: Tensor
    sizes: Tensor | None = None
    began: Tensor | None = None


class Seen(NamedTuple):
    """What a reduction sees of the attention before it: q and k [T, heads * d] of all rows."""

    q: Tensor
    k: Tensor
    heads: int
    scale: float


class Reduces(Protocol):
    """What takes rows out of a block; see `pyruntime.layers.reduce`.

    The prefix rows of an image stay, and stay its first ones.
    """

    @property
    def leads(self) -> bool:
        """Before the attention; else between it and the rest of the block."""

    def before(self, ops: ModuleType, rows: Rows) -> Rows:
        """The rows that the block sees."""

    def between(self, ops: ModuleType, rows: Rows, seen: Seen) -> Rows:
        """The rows after the attention that the rest of the block sees."""


class Branch(Protocol):
    """What a residual branch ends in."""

    def add(
        self, ops: ModuleType, x: Tensor, out: Tensor, ends: Tensor, meter: Meter | None
    ) -> None:
        """Add the result of x's rows to out (mutated)."""


class Projections(Protocol):
    """What makes queries, keys and values."""

    def __call__(
        self, ops: ModuleType, asking: Rows | None, seen: Rows, meter: Meter | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q of the rows that ask (None: all), k and v of all; views with contiguous rows."""


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A linear layer at the end of a branch."""

    linear: Linear

    def add(
        self, ops: ModuleType, x: Tensor, out: Tensor, ends: Tensor, meter: Meter | None
    ) -> None:
        """out [T, d] += linear(x) (out is mutated)."""
        weight, bias = self.linear
        ops.segment_matmul(x, weight, bias=bias, out=out, accumulate=True)


@dataclass(frozen=True, slots=True, eq=False)
class DenseMLP:
    """down(gelu(up x)), with the error-function form of GELU."""

    up: Linear
    down: Linear

    def add(
        self, ops: ModuleType, x: Tensor, out: Tensor, ends: Tensor, meter: Meter | None
    ) -> None:
        """out [T, d] += mlp(x) (out is mutated)."""
        inner = ops.segment_matmul(x, self.up.weight, bias=self.up.bias, epilogue="gelu")
        ops.segment_matmul(inner, self.down.weight, bias=self.down.bias, out=out, accumulate=True)


@dataclass(frozen=True, slots=True, eq=False)
class DenseProjections:
    """Queries, keys and values of one matrix.

    Attributes:
        qkv: [3 * d, d]; `q` and `kv` are its parts.
    """

    qkv: Linear
    q: Linear
    kv: Linear

    @staticmethod
    def of(qkv: Linear) -> DenseProjections:
        """From [3 * d, d]: queries, keys, values, each head-major."""
        width = qkv.weight.out_features // 3
        return DenseProjections(qkv, output_rows(qkv, 0, width), output_rows(qkv, width, 3 * width))

    def __call__(
        self, ops: ModuleType, asking: Rows | None, seen: Rows, meter: Meter | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Projections`."""
        if asking is None:
            q, k, v = ops.segment_matmul(seen.x, self.qkv.weight, bias=self.qkv.bias).chunk(3, 1)
            return q, k, v
        k, v = ops.segment_matmul(seen.x, self.kv.weight, bias=self.kv.bias).chunk(2, 1)
        return ops.segment_matmul(asking.x, self.q.weight, bias=self.q.bias), k, v


@dataclass(frozen=True, slots=True, eq=False)
class AdaptiveProjections:
    """Queries, keys and values of a module of adaptive width each."""

    q: Adaptive
    k: Adaptive
    v: Adaptive

    def __call__(
        self, ops: ModuleType, asking: Rows | None, seen: Rows, meter: Meter | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Projections`."""

        def apply(module: Adaptive, rows: Rows) -> Tensor:
            out = torch.zeros_like(rows.x)
            module.add(ops, rows.x, out, rows.ends, meter)
            return out

        return apply(self.q, asking or seen), apply(self.k, seen), apply(self.v, seen)


@dataclass(frozen=True, slots=True, eq=False)
class VisionBlock:
    """x += o(attention(norm1 x)); x += mlp(norm2 x).

    Attributes:
        heads: of equal width.
        query_norm, key_norm: over the channels of every head, or None.
        proportional: a key counts as often as the tokens that its row stands for.
    """

    norm1: LayerNorm
    projections: Projections
    query_norm: LayerNorm | None
    key_norm: LayerNorm | None
    heads: int
    scale: float
    output: Branch
    norm2: LayerNorm
    mlp: Branch
    proportional: bool = False

    def __call__(
        self,
        ops: ModuleType,
        rows: Rows,
        meter: Meter | None = None,
        wanted: Rows | None = None,
        reduction: Reduces | None = None,
    ) -> Rows:
        """Run the block on the rows of n images (``rows.x`` is mutated).

        Args:
            meter: of the n images, None without adaptive width.
            wanted: the only rows whose result matters, of the first ones of every image: their
                numbers, int32 [R], cut into images. All rows serve as keys and values, but the
                others keep their input: the bits of the wanted rows are those of the whole block.
            reduction: takes rows out. One that acts after the attention does not run with `wanted`:
                the wanted rows do not depend on it.

        Returns:
            `rows` where all stay; else those that are left, in another matrix.
        """
        if reduction is not None and reduction.leads:
            left = reduction.before(ops, rows)
            wanted = None if wanted is None else _moved(wanted, rows.ends, left.ends)
            rows = left
        normed = Rows(self.norm1(ops, rows.x), rows.ends, rows.sizes)
        if wanted is None:
            return self._update(ops, rows, None, normed, meter, reduction)
        asking = Rows(self.norm1(ops, rows.x, rows=wanted.x), wanted.ends)
        at = wanted.x.long()
        out = Rows(rows.x[at], wanted.ends)
        self._update(ops, out, asking, normed, meter, None)
        rows.x[at] = out.x
        return rows

    def _update(
        self,
        ops: ModuleType,
        out: Rows,
        asking: Rows | None,
        normed: Rows,
        meter: Meter | None,
        reduction: Reduces | None,
    ) -> Rows:
        """Both branches of ``out.x`` (mutated), whose normed rows are `asking`, or all."""
        q, k, v = self.projections(ops, asking, normed, meter)
        if self.query_norm is not None:
            q = _norm_heads(ops, self.query_norm, q)
        if self.key_norm is not None:
            k = _norm_heads(ops, self.key_norm, k)
        bias = normed.sizes.log() if self.proportional and normed.sizes is not None else None
        y = ops.attention_varlen(q, k, v, out.ends, normed.ends, self.heads, self.scale, bias)
        self.output.add(ops, y, out.x, out.ends, meter)
        if reduction is not None:
            out = reduction.between(ops, out, Seen(q, k, self.heads, self.scale))
        self.mlp.add(ops, self.norm2(ops, out.x), out.x, out.ends, meter)
        return out


def _moved(wanted: Rows, before: Tensor, after: Tensor) -> Rows:
    """The first rows of images, whose ends were `before` and now are `after`."""
    shift = (after - before)[:-1].repeat_interleave(wanted.ends.diff())
    return wanted._replace(x=wanted.x + shift)


def _norm_heads(ops: ModuleType, norm: LayerNorm, x: Tensor) -> Tensor:
    """Every head of x [T, heads * d] normed by itself."""
    return norm(ops, x.reshape(-1, norm.weight.shape[0])).view(x.shape)
