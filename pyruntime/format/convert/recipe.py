"""How one tensor of the destination is made: whose rows it joins, and in what form."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyruntime.format.convert.checkpoint import Checkpoint
from pyruntime.format.spec import PANEL, TensorSpec
from pyruntime.ops.weight import Weight

_PIECE_BYTES = 1 << 20  # a piece and its packed copy stay in the cache


@dataclass(frozen=True, slots=True)
class Recipe:
    """One tensor to write, and the tensors whose rows it joins, each giving an equal share.

    `matrix` is the target itself; for the scale of a quantised matrix, that matrix.
    """

    target: TensorSpec
    sources: tuple[str, ...]
    matrix: TensorSpec

    @property
    def source_shape(self) -> tuple[int, ...]:
        """What each source must look like."""
        rows, *columns = self._flat
        return (rows // len(self.sources), *columns)

    def pieces(self, weights: Checkpoint, not_finite: list[str]) -> Iterator[Tensor]:
        """The bytes of the target in file order, a few megabytes at a time.

        Panels cover whole groups of rows, so they can be packed group by group. The name of a
        source that does not stay finite is appended to `not_finite`.
        """
        target, (total, *columns) = self.target, self._flat
        rows = _Rows(self, weights, not_finite)
        width = math.prod(columns) * rows.dtype.itemsize
        step = max(1, _PIECE_BYTES // width // PANEL) * PANEL
        if target.layout == "plain":
            for start in range(0, total, step):
                piece = rows(start, min(start + step, total))
                yield piece if target is self.matrix else _scales(piece)
            return
        height = target.shape[-2]
        for first in range(0, total, height):
            if target.layout == "panel":
                for start in range(first, first + height, step):
                    yield _packed(target, rows(start, min(start + step, first + height)))
                continue
            half = height // 2
            for start in range(first, first + half, step // 2):
                stop = min(start + step // 2, first + half)
                yield _packed(target, rows(start, stop), rows(half + start, half + stop))

    @property
    def _flat(self) -> tuple[int, ...]:
        """[rows, columns] of the matrix, all segments joined; a list of biases is one vector."""
        shape = self.matrix.shape
        if self.matrix.layout == "plain":
            return shape if len(self.sources) == 1 else (math.prod(shape),)
        return (math.prod(shape[:-1]), shape[-1])


class _Rows:
    """Rows of a recipe's sources, one after the other, in the dtype they are used in."""

    def __init__(self, recipe: Recipe, weights: Checkpoint, not_finite: list[str]) -> None:
        # int8 is made from the numbers as they are, not from numbers that were rounded before.
        dtype = recipe.matrix.dtype
        self.dtype: torch.dtype = torch.float32 if dtype == "int8" else getattr(torch, dtype)
        self._sources = recipe.sources
        self._share = recipe.source_shape[0]
        self._weights = weights
        self._not_finite = not_finite

    def __call__(self, start: int, stop: int) -> Tensor:
        parts = []
        share = self._share
        for number in range(start // share, -(-stop // share)):
            name = self._sources[number]
            first, last = max(start - number * share, 0), min(stop - number * share, share)
            part = self._weights.rows(name, first, last).to(self.dtype)
            if not all(map(math.isfinite, torch.aminmax(part))):
                self._complain(name)
                part = part.nan_to_num()  # what is written now is thrown away
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _complain(self, name: str) -> None:
        entry = self._weights.entries[name]
        text = f"{name} (made of {', '.join(entry.needs)})" if entry.derived else name
        if text not in self._not_finite:
            self._not_finite.append(text)


def _packed(target: TensorSpec, rows: Tensor, up: Tensor | None = None) -> Tensor:
    """The panels of some rows; of a pair of matrices, where `up` is given."""
    weight = Weight.pack(rows) if up is None else Weight.pack_gate_up(rows, up)
    return weight.quantize().data if target.dtype == "int8" else weight.data


def _scales(rows: Tensor) -> Tensor:
    """What `quantize` makes of the rows: their largest numbers alone decide it."""
    scale = Weight.pack(rows.abs().amax(1, keepdim=True)).quantize().scale
    if scale is None:
        raise RuntimeError("a quantised weight has no scale")
    return scale[0]
