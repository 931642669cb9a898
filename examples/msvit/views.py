"""Training scenes: a pool of one split, of which every draw is a new view."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from examples.digit_scenes import Batch, Scenes
from examples.msvit.model import normalise

GRID = 4


class Pool:
    """`count` scenes of the split "fit", each shifted so that its digit lands at a new place."""

    def __init__(self, count: int, seed: int) -> None:
        self.scenes: Batch = Scenes("fit", seed=1).batch(count)
        self.rng = np.random.default_rng(seed)

    def draw(self, count: int, side: int = 64) -> tuple[Tensor, Tensor]:
        """Normalised float32 [count, 3, side, side], cut around the digit, and classes int64."""
        images, rng = self.scenes.images, self.rng
        chosen = rng.integers(0, len(images), count)
        corner, digit = self.scenes.boxes[chosen, :2], self.scenes.boxes[chosen, 2:]
        # Cyclic, but the digit stays whole.
        moved = rng.integers(0, (side - digit) // GRID + 1, (count, 2)) * GRID
        at = (np.arange(side) + (corner - moved)[..., None]) % images.shape[1]
        views = images[chosen[:, None, None], at[:, 0, :, None], at[:, 1, None, :]]
        return normalise(torch.from_numpy(views)), torch.from_numpy(self.scenes.labels[chosen])


def held_out(split: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Scenes as they are: normalised float32 [count, 3, 64, 64], classes int64 [count]."""
    scenes = Scenes(split, seed).batch(count)
    return normalise(torch.from_numpy(scenes.images)), torch.from_numpy(scenes.labels)
