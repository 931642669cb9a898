"""What was executed on images: where each left, and exact multiply-accumulates."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class VisionTrace:
    """Record of one forward pass over B images of a model with G exits.

    Attributes:
        levels: int32 [B], the exit each image left at; G is the final head. Replayable.
        stages: int32 [B], stages that were computed with an image: its level + 1, and more where it
            was carried on because moving the others together would have taken longer.
        macs_per_image: int64 [B], multiply-accumulates executed for each image, heads, gates and
            carried stages included.
        macs_dense_per_image: int64 [B], those of the same model without exits.
        stage_images: images of each stage's call; shorter than G + 1 where all had left before.
        paths: at how many exits "all" images stayed, the others were "packed" together or "carried"
            on with those that had left, or "none" stayed.
    """

    levels: Tensor
    stages: Tensor
    macs_per_image: Tensor
    macs_dense_per_image: Tensor
    stage_images: tuple[int, ...]
    paths: dict[str, int]

    @property
    def macs_executed(self) -> int:
        """Multiply-accumulates of the whole pass."""
        return int(self.macs_per_image.sum())

    @property
    def macs_dense(self) -> int:
        """Multiply-accumulates of the same pass without exits."""
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
