"""Token reduction inside a network: which blocks drop or merge rows, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pyruntime.errors import FormatError

Method = Literal["dynamicvit", "evit", "tome"]


@dataclass(frozen=True, slots=True)
class ReductionSpec:
    """Rows of an image that leave, or become one, on the way.

    Attributes:
        method: ``dynamicvit`` (arXiv 2106.02034): a predictor before a block keeps the best patch
            rows; ``evit`` (arXiv 2202.07800): a block keeps those that the class row attends to
            most; ``tome`` (arXiv 2210.09461): a block merges the most similar pairs.
        blocks: the blocks concerned, rising.
        keep: of ``dynamicvit``: int(N * keep) of the N patches that the image began with; of
            ``evit``: ceil(keep * n) of those that are left; one for each of `blocks`.
        merge: of ``tome``: pairs merged in each of `blocks`, at most half of the rows that may be.
        fuse: of ``evit``: those that leave become one row, their sum weighted by attention.
        proportional: of ``tome``: a key counts as often as it has rows merged into it.
    """

    method: Method
    blocks: tuple[int, ...]
    keep: tuple[float, ...] = ()
    merge: tuple[int, ...] = ()
    fuse: bool = False
    proportional: bool = True

    def __post_init__(self) -> None:
        problems = []
        if not self.blocks or sorted(set(self.blocks)) != list(self.blocks) or self.blocks[0] < 0:
            problems.append(f"blocks must rise, are {list(self.blocks)}")
        each = self.merge if self.method == "tome" else self.keep
        if len(each) != len(self.blocks):
            problems.append(f"{len(each)} numbers for {len(self.blocks)} blocks")
        if any(not 0 < share <= 1 for share in self.keep):
            problems.append(f"keep must be in (0, 1], is {list(self.keep)}")
        if any(pairs < 0 for pairs in self.merge):
            problems.append(f"merge must be 0 or more, is {list(self.merge)}")
        if problems:
            raise FormatError("reduction: " + "; ".join(problems))
