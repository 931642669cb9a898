"""What a coarser patch would lose, read from its pixels: the rules that need no training.

A score is float32 [C], of every cell of one image that is not of the finest scale, in the order of
`ScaleGrid`: the larger, the sooner a cell is divided. Images are scored one by one, so that no sum
ever depends on the images beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.format.spec.vision import Preprocess
from pyruntime.gates.scale_layout import ScaleGrid

_BINS = 512
_GRAY = (0.2989, 0.5870, 0.1140)
_PARTIAL = 1e6  # entropy of a patch that sticks out of the image: it is always divided


def variance(image: Tensor, grid: ScaleGrid) -> Tensor:
    """Unbiased variance of all values of a cell, of normalised pixels [C, H, W]; outside is 0."""
    padded = _padded(image, grid)
    found = []
    for side in _sides(grid):
        values = _squares(padded, side)
        centred = values - values.mean(1, keepdim=True)
        found.append(centred.square_().sum(1).div_(values.shape[1] - 1))  # torch.var is far slower
    return torch.cat(found)


def entropy(image: Tensor, grid: ScaleGrid, preprocess: Preprocess) -> Tensor:
    """Bits of the histogram of a cell's grey levels (APT, arXiv 2510.18091, and its code).

    512 bins of half a level each, of the pixels [C, H, W] before `preprocess` normalised them; a
    cell that lies outside of the image in part has 1e6.

    Raises:
        InvalidInput: an image that has neither one channel nor three.
    """
    _, height, width = image.shape
    bins = (_gray(image, preprocess) * 2).floor_().clamp_(0, _BINS - 1)
    padded = _padded(bins.long()[None], grid)[0]
    found = []
    for side in _sides(grid):
        down, across = padded.shape[0] // side, padded.shape[1] // side
        counts = torch.bincount(
            (padded + _cell_of_pixel(down, across, side) * _BINS).flatten(),
            minlength=down * across * _BINS,
        )
        share = counts.view(-1, _BINS).float().div_(side * side)
        bits = (share * (share + 1e-10).log2_()).sum(1).neg_().view(down, across)
        bits[height // side :] = _PARTIAL
        bits[:, width // side :] = _PARTIAL
        found.append(bits.flatten())
    return torch.cat(found)


def resize_error(image: Tensor, grid: ScaleGrid) -> Tensor:
    """How far pixels [C, H, W] are from themselves made as small as a finest patch and large again.

    The root of mean squared error times side: the "pixel blur" scorer of Quadformer's code (arXiv
    2304.14287), bilinear without antialias both ways.
    """
    padded = _padded(image, grid)[None]
    size = padded.shape[2], padded.shape[3]
    found = []
    for ratio in reversed(grid.ratios):
        small = F.interpolate(padded, (size[0] // ratio, size[1] // ratio), mode="bilinear")
        error = (F.interpolate(small, size, mode="bilinear") - padded).square_()
        side = ratio * grid.patch
        found.append((_squares(error[0], side).mean(1) * side).sqrt_())
    return torch.cat(found)


@lru_cache(maxsize=64)
def chance(seed: int, cells: int) -> Tensor:
    """Uniform noise of a seed alone: an image gets the same whatever images are beside it."""
    return torch.rand(cells, generator=torch.Generator().manual_seed(seed))


def _sides(grid: ScaleGrid) -> Iterator[int]:
    """Of cells that are not of the finest scale, in pixels, the coarsest first."""
    return (ratio * grid.patch for ratio in reversed(grid.ratios))


def _padded(image: Tensor, grid: ScaleGrid) -> Tensor:
    """[C, H, W] up to whole coarsest patches."""
    down = grid.rows * grid.patch - image.shape[1]
    across = grid.columns * grid.patch - image.shape[2]
    return F.pad(image, (0, across, 0, down)) if down or across else image


def _squares(image: Tensor, side: int) -> Tensor:
    """[C, H, W] as the values of every square [n, C * side * side], in raster order."""
    channels, height, width = image.shape
    squares = image.view(channels, height // side, side, width // side, side)
    return squares.permute(1, 3, 0, 2, 4).reshape(-1, channels * side * side)


def _gray(image: Tensor, preprocess: Preprocess) -> Tensor:
    """Grey levels [H, W], 0 to 255, of normalised pixels [C, H, W]."""
    if len(image) not in (1, 3):
        raise InvalidInput(f"entropy: expected an image of 1 or 3 channels, got {len(image)}")
    mean, std = (
        torch.tensor(values)[:, None, None] * 255 for values in (preprocess.mean, preprocess.std)
    )
    levels = image * std + mean
    if len(image) == 1:
        return levels[0]
    red, green, blue = _GRAY
    return red * levels[0] + green * levels[1] + blue * levels[2]


@lru_cache(maxsize=64)
def _cell_of_pixel(down: int, across: int, side: int) -> Tensor:
    """Number of the square that holds each pixel, int64 [down * side, across * side]."""
    numbers = torch.arange(down * across).view(down, across)
    return numbers.repeat_interleave(side, 0).repeat_interleave(side, 1)
