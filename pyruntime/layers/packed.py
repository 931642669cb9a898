"""Images as one matrix of rows: no padding, whatever the length of each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from pyruntime.plan import Plan


@dataclass(frozen=True, eq=False)
class Packed:
    """The rows of n images, one image after the other.

    Attributes:
        x: [T, D], the hidden states.
        cu_seqlens: int32 [n + 1], where each image begins; ``cu_seqlens[n] == T``.
        sizes: float32 [T], how many finest patches a row stands for; None: 1, or nobody asks.
        began: int32 [n], patch rows that each image began with, where rows leave on the way; else
            None.
    """

    x: Tensor
    cu_seqlens: Tensor
    sizes: Tensor | None = None
    began: Tensor | None = None

    @property
    def count(self) -> int:
        """n, the number of images."""
        return self.cu_seqlens.shape[0] - 1

    @cached_property
    def ends(self) -> list[int]:
        """`cu_seqlens` on the host."""
        return self.cu_seqlens.tolist()

    @cached_property
    def lengths(self) -> list[int]:
        """Rows of each image."""
        return [b - a for a, b in itertools.pairwise(self.ends)]

    @property
    def first_rows(self) -> Tensor:
        """int32 [n], the row each image begins with: its class token."""
        return self.cu_seqlens[:-1]

    @staticmethod
    def of(x: Tensor, lengths: Sequence[int]) -> Packed:
        """Rows [T, D] of images of these lengths, which sum to T."""
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return Packed(x, ends)

    def select(self, ops: ModuleType, plan: Plan) -> Packed:
        """The images a plan keeps, in order. Their rows move to the front of `x` (mutated).

        Args:
            plan: one segment over the n images. When it keeps all, nothing is copied.
        """
        if plan.is_all:
            return self
        length = self.lengths[0]
        kept = plan.rows.long()
        began = None if self.began is None else self.began[kept]
        if self.lengths.count(length) == self.count:  # an image is one wide row
            wide = ops.compact(self.x.view(self.count, -1), plan)
            sizes = None
            if self.sizes is not None:
                sizes = self.sizes.view(self.count, -1)[kept].flatten()
            ends = self.cu_seqlens[: len(wide) + 1]
            return Packed(wide.view(-1, self.x.shape[1]), ends, sizes, began)
        lengths = self.cu_seqlens.diff()[kept]
        ends = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        total = int(ends[-1])
        # Row r of the result lies as far behind its image's first row as before.
        shift = torch.repeat_interleave(
            self.cu_seqlens[kept] - ends[:-1], lengths, output_size=total
        )
        rows = torch.arange(total, dtype=torch.int32) + shift
        offsets = torch.tensor([0, total], dtype=torch.int32)
        inverse = torch.full((self.x.shape[0], 1), -1, dtype=torch.int32)
        inverse[rows.long(), 0] = torch.arange(total, dtype=torch.int32)
        packed = Plan(rows, offsets, None, inverse, self.x.shape[0], total)
        sizes = None if self.sizes is None else self.sizes[rows.long()]
        return Packed(ops.compact(self.x, packed), ends, sizes, began)

    @staticmethod
    def join(parts: Sequence[Packed]) -> Packed:
        """All images of `parts`, in order; a single part is returned as it is."""
        if len(parts) == 1:
            return parts[0]
        x = torch.cat([part.x for part in parts])
        whole = Packed.of(x, [length for part in parts for length in part.lengths])
        sizes, began = (
            _joined([getattr(part, name) for part in parts]) for name in ("sizes", "began")
        )
        return Packed(whole.x, whole.cu_seqlens, sizes, began)

    def slice(self, start: int, stop: int) -> Packed:
        """Images start to stop; `x` is a view."""
        if stop - start == self.count:
            return self
        first, last = self.ends[start], self.ends[stop]
        return Packed(
            self.x[first:last],
            self.cu_seqlens[start : stop + 1] - first,
            None if self.sizes is None else self.sizes[first:last],
            None if self.began is None else self.began[start:stop],
        )


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    held = [part for part in parts if part is not None]
    return torch.cat(held) if held else None
