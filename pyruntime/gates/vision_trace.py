"""What was executed on images: their patches, where each left, exact multiply-accumulates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyruntime.gates.scale import ScaleChoice
from pyruntime.gates.scale_layout import ScaleGrid


@dataclass(frozen=True, slots=True, eq=False)
class VisionTrace:
    """Record of one forward pass over B images of a model with G exits.

    Attributes:
        levels: int32 [B], the exit each image left at; G is the final head. Replayable.
        stages: int32 [B], stages that were computed with an image: its level + 1, and more where it
            was carried on because moving the others together would have taken longer.
        choice: which patches each image had.
        prefix: rows of each image before them.
        macs_per_image: int64 [B], multiply-accumulates executed for each image, heads, gates and
            carried stages included.
        macs_dense_per_image: int64 [B], those of the same model without exits, of an image of the
            same size whose patches are all fine.
        stage_images: images of each stage's call; shorter than G + 1 where all had left before.
        paths: at how many exits "all" images stayed, the others were "packed" together or "carried"
            on with those that had left, or "none" stayed.
    """

    levels: Tensor
    stages: Tensor
    choice: ScaleChoice
    prefix: int
    macs_per_image: Tensor
    macs_dense_per_image: Tensor
    stage_images: tuple[int, ...]
    paths: dict[str, int]

    @property
    def tokens(self) -> Tensor:
        """int32 [B], rows that each image began with: prefix rows and patches of any scale."""
        return self.choice.cu_seqlens(self.prefix).diff()

    @property
    def stops(self) -> tuple[Tensor, ...] | None:
        """Of each image bool [C_i]: which of its coarser patches were not divided, in the order
        of `pyruntime.gates.scale_layout.ScaleGrid`; None in a model of one scale. Replayable.
        """
        return self.choice.stops_by_image()

    @property
    def macs_executed(self) -> int:
        """Multiply-accumulates of the whole pass."""
        return int(self.macs_per_image.sum())

    @property
    def macs_dense(self) -> int:
        """Multiply-accumulates of the same pass without exits and coarser patches."""
        return int(self.macs_dense_per_image.sum())

    @property
    def carried(self) -> int:
        """Calls of a stage with an image that had left before."""
        return int((self.stages - self.levels - 1).sum())

    def per_image_compute(self) -> Tensor:
        """Executed over dense multiply-accumulates of each image, float32 [B].

        Above 1 where heads and gates cost more than they save.
        """
        return self.macs_per_image.float() / self.macs_dense_per_image.float()


def ratio_map(grid: ScaleGrid, stops: Tensor) -> Tensor:
    """What stands for each finest patch of an image, int32 [rows, columns]: its side in them.

    Args:
        stops: bool [C], see `VisionTrace.stops`.
    """
    found = torch.ones(grid.fine, dtype=torch.int32)
    is_open = torch.ones(grid.fine, dtype=torch.bool)
    for ratio, cells in zip(reversed(grid.ratios), grid.chain, strict=False):
        here = is_open & stops[cells]
        found[here] = ratio
        is_open &= ~here
    return found.view(grid.rows, grid.columns)
