"""Tensors computed from those of a checkpoint, row by row, when they are read.

Families store one matrix in many ways: experts apart or in one tensor, transposed, interleaved,
quantised. A derivation gives each such matrix the name and the form that every other part of the
conversion expects; what it needs is checked under the name the user knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyruntime.format.convert.checkpoint import Checkpoint, Entry, Need

Rows = Callable[[int, int], Tensor]


@dataclass(frozen=True, slots=True)
class Computed:
    """A "file" whose rows are what `read(start, stop)` returns."""

    read: Rows

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop)."""
        return self.read(start, stop)


def transposed(weights: Checkpoint, name: str, height: int, depth: int, rank: int) -> Rows:
    """The first `depth` of every `height` rows of `rank` columns, transposed head by head."""

    def read(start: int, stop: int) -> Tensor:
        parts = []
        for head in range(start // rank, -(-stop // rank)):
            matrix = weights.rows(name, head * height, head * height + depth).t()
            parts.append(matrix[max(start - head * rank, 0) : stop - head * rank])
        return torch.cat(parts)

    return read


class Derivation:
    """`weights`, and what is added to them step by step; `result` has both."""

    def __init__(self, weights: Checkpoint) -> None:
        self.weights = weights
        self._entries = dict(weights.entries)
        self._problems = list(weights.problems)

    def add(
        self,
        name: str,
        shape: tuple[int, ...],
        needs: Mapping[str, Need],
        read: Rows,
        dtype: str | None = None,
    ) -> None:
        """A tensor of `shape`; its dtype is that of the first it needs unless `dtype` is given."""
        if dtype is None:
            first = self.weights.entries.get(next(iter(needs)))
            dtype = first.dtype if first else "bfloat16"
        self._entries[name] = Entry(shape, dtype, Computed(read), name, needs, derived=True)

    def pick(self, spellings: Iterable[str], otherwise: str) -> str:
        """The one of `spellings` that the checkpoint has; `otherwise` if it has none.

        Further ones that it also has are noted as problems.
        """
        first, *others = [name for name in spellings if name in self._entries] or [otherwise]
        for other in others:
            self._problems.append(f"duplicated {other}, also given as {first}")
            del self._entries[other]
        return first

    def alias(self, name: str, theirs: str, shape: tuple[int, ...]) -> None:
        """Call the tensor `theirs` by `name`."""
        if theirs != name:
            self.part(name, shape, theirs, shape, 0)

    def part(
        self, name: str, shape: tuple[int, ...], theirs: str, whole: tuple[int, ...], first: int
    ) -> None:
        """Call the rows of `theirs`, a tensor of shape `whole`, from `first` on by `name`."""
        rows = self.weights.rows
        self.add(
            name, shape, {theirs: Need(whole)}, lambda a, b: rows(theirs, first + a, first + b)
        )

    def drop(self, prefix: str) -> None:
        """Leave out the tensors whose names start so."""
        self._entries = {n: e for n, e in self._entries.items() if not n.startswith(prefix)}

    def result(self) -> Checkpoint:
        """The checkpoint with everything that was added."""
        return Checkpoint(self._entries, self.weights.paths, self._problems)
