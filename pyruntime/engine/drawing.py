"""A picture of what the network saw of an image: which regions were fine, which coarse."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.format.spec import Preprocess
from pyruntime.gates.scale_layout import ScaleGrid

_LEAST = 512  # pixels of the longer side
_DIM = 0.7  # of coarse patches
_WHITE, _YELLOW = (1.0, 1.0, 1.0), (1.0, 0.8, 0.1)


def draw_regions(image: Tensor, preprocess: Preprocess, grid: ScaleGrid, ratios: Tensor) -> Tensor:
    """The image as its patches show it, uint8 [H, W, 3], enlarged by a whole number.

    A coarse patch has the pixels that are left of it, and is darker; a yellow line surrounds what
    is fine.

    Args:
        image: float32 [C, H, W], normalised, with one channel or three.
        grid: of its patches.
        ratios: int32 [rows, columns], see `Classification.ratios`.

    Raises:
        InvalidInput: an image of another number of channels.
    """
    if len(image) not in (1, 3):
        raise InvalidInput(f"regions: expected an image of 1 or 3 channels, got {len(image)}")
    down, across = (side * grid.patch for side in ratios.shape)
    padded = F.pad(image, (0, across - image.shape[2], 0, down - image.shape[1]))
    sides = _large(ratios, grid.patch)
    for ratio in grid.ratios:
        mean = F.avg_pool2d(padded[None], ratio)[0]
        padded = torch.where(sides == ratio, _large(mean, ratio), padded)
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (preprocess.mean, preprocess.std)
    )
    colours = (padded * std + mean).clamp(0, 1).expand(3, -1, -1)
    colours = torch.where(sides > 1, colours * _DIM, colours)

    enlarged = math.ceil(_LEAST / max(down, across))
    colours = _large(colours, enlarged)
    cells, is_fine = (_large(part, grid.patch * enlarged) for part in (_cells(grid, ratios),
                                                                      ratios == 1))  # fmt: skip
    thin = max(1, enlarged * grid.patch // 24)
    colours = _lines(colours, _borders(cells, thin), _WHITE, 0.35)
    colours = _lines(colours, _borders(is_fine.int(), 2 * thin), _YELLOW, 1.0)
    return (colours * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()


def _cells(grid: ScaleGrid, ratios: Tensor) -> Tensor:
    """Number of the patch that stands for each finest one, int64 [rows, columns]."""
    found = grid.chain[-1].view(ratios.shape).clone()
    for ratio, cells in zip(reversed(grid.ratios), grid.chain, strict=False):
        found = torch.where(ratios == ratio, cells.view(ratios.shape), found)
    return found


def _large(map_: Tensor, times: int) -> Tensor:
    """[..., H, W] with every value repeated."""
    return map_.repeat_interleave(times, -2).repeat_interleave(times, -1)


def _borders(map_: Tensor, width: int) -> Tensor:
    """bool [H, W], pixels at most `width` right of or below one of another value."""
    found = torch.zeros_like(map_, dtype=torch.bool)
    for step in range(1, width + 1):
        found[step:] |= map_[step:] != map_[:-step]
        found[:, step:] |= map_[:, step:] != map_[:, :-step]
    return found


def _lines(colours: Tensor, where: Tensor, colour: tuple[float, ...], share: float) -> Tensor:
    paint = torch.tensor(colour)[:, None, None]
    return torch.where(where, colours + (paint - colours) * share, colours)
