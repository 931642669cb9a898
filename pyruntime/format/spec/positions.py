"""Tables of positions for other grids, and for the coarser patches of mixed scales.

Pure functions on the raster of one grid: what a checkpoint learned for one grid of patches, brought
to another as the library that trained it does. All of it is float32, whatever the model's dtype.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pyruntime.errors import InvalidInput

ResizeRule = Literal["bicubic_aa", "bicubic"]
CoarseRule = Literal["area", "bilinear", "bicubic_aa", "sinusoidal"]
_LONGEST = 10000.0  # wavelength, in patches over 2 pi, of the slowest sine


def resize_positions(
    table: Tensor, grid: tuple[int, int], to_grid: tuple[int, int], rule: ResizeRule
) -> Tensor:
    """A learned table for another grid; the table itself where the grids are the same.

    `bicubic_aa` is timm's `resample_abs_pos_embed`: bicubic with antialias. `bicubic` is that of
    transformers' `interpolate_pos_encoding` and of EViT: without.

    Args:
        table: float32 [rows * columns, D] in raster order, without prefix rows.
        grid: rows, columns of `table`.
        to_grid: rows, columns of the result.

    Returns:
        float32 [to_rows * to_columns, D].

    Raises:
        InvalidInput: a table of another shape or dtype, or an unknown rule.
    """
    _check(table, grid)
    if rule not in ("bicubic_aa", "bicubic"):
        raise InvalidInput(f"positions: resize rule must be bicubic_aa or bicubic, is {rule!r}")
    if min(to_grid) < 1:
        raise InvalidInput(f"positions: a grid of {_by(to_grid)} patches")
    if grid == to_grid:
        return table
    return _interpolated(table, grid, to_grid, "bicubic", antialias=rule == "bicubic_aa")


def coarsen_positions(table: Tensor, grid: tuple[int, int], ratio: int, rule: CoarseRule) -> Tensor:
    """Positions of the patches that stand for ratio x ratio patches of the grid each.

    `area` is the mean of the patch's children; `bilinear` (align_corners=False, no antialias) reads
    the middle ones alone, which at an even ratio are 2 x 2; `bicubic_aa` is timm's resampler, which
    APT's released code (arXiv 2510.18091) uses. `sinusoidal` reads nothing of the table but its
    width: see `sine_positions`.

    Args:
        table: float32 [rows * columns, D] of the finest grid, in raster order.
        grid: rows, columns; multiples of `ratio`.
        ratio: side of the coarse patch in finest ones; 1 returns what the finest patches have.

    Returns:
        float32 [rows / ratio * columns / ratio, D], in raster order.

    Raises:
        InvalidInput: a table of another shape or dtype, a ratio that does not tile the grid, or an
            unknown rule.
    """
    _check(table, grid)
    rows, columns = grid
    if ratio < 1 or rows % ratio or columns % ratio:
        raise InvalidInput(f"positions: {ratio} x {ratio} patches do not tile {_by(grid)}")
    if rule == "sinusoidal":
        return sine_positions(grid, ratio, table.shape[1])
    if rule not in ("area", "bilinear", "bicubic_aa"):
        raise InvalidInput(
            "positions: rule of coarse patches must be area, bilinear, bicubic_aa or sinusoidal, "
            f"is {rule!r}"
        )
    if ratio == 1:
        return table
    coarse = rows // ratio, columns // ratio
    if rule == "area":
        blocks = table.view(coarse[0], ratio, coarse[1], ratio, -1)
        return blocks.mean((1, 3)).view(coarse[0] * coarse[1], -1)
    if rule == "bilinear":
        return _interpolated(table, grid, coarse, "bilinear", antialias=False)
    return _interpolated(table, grid, coarse, "bicubic", antialias=True)


def sine_positions(grid: tuple[int, int], ratio: int, width: int) -> Tensor:
    """Sines of the patches' centres, as Quadformer has them (arXiv 2304.14287).

    Half of the channels are of x, half of y, in finest patches: of each half the first half are
    sines and the second cosines, at frequencies 10000^(-i / (n - 1)), i < n = width / 4. The centre
    of finest patch (0, 0) is (0.5, 0.5).

    Args:
        grid: rows, columns of the finest grid; multiples of `ratio`.
        ratio: side of a patch in finest ones.
        width: channels, a multiple of 4, at least 8.

    Returns:
        float32 [rows / ratio * columns / ratio, width], in raster order.

    Raises:
        InvalidInput: a width that has no such channels.
    """
    if width % 4 or width < 8:
        raise InvalidInput(f"positions: sines need a multiple of 4 channels from 8 on, not {width}")
    count = width // 4
    steps = torch.arange(count, dtype=torch.float32)
    frequencies = torch.exp(steps * (-math.log(_LONGEST) / (count - 1)))

    def encoded(sides: int) -> Tensor:
        centres = (torch.arange(sides // ratio, dtype=torch.float32) + 0.5) * ratio
        angles = centres[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], 1)

    y, x = encoded(grid[0]), encoded(grid[1])
    shape = (len(y), len(x), 2 * count)
    both = torch.cat([x[None].expand(shape), y[:, None].expand(shape)], 2)
    return both.reshape(len(y) * len(x), width)


def _interpolated(
    table: Tensor, grid: tuple[int, int], to_grid: tuple[int, int], mode: str, *, antialias: bool
) -> Tensor:
    image = table.view(1, *grid, -1).permute(0, 3, 1, 2)
    made = F.interpolate(image, to_grid, mode=mode, align_corners=False, antialias=antialias)
    return made.permute(0, 2, 3, 1).reshape(to_grid[0] * to_grid[1], -1)


def _check(table: Tensor, grid: tuple[int, int]) -> None:
    if table.dtype != torch.float32 or table.dim() != 2 or len(table) != grid[0] * grid[1]:
        raise InvalidInput(
            f"positions: expected float32 [{grid[0] * grid[1]}, D] for {_by(grid)} patches, "
            f"got {table.dtype} {list(table.shape)}"
        )


def _by(grid: tuple[int, int]) -> str:
    return f"{grid[0]} x {grid[1]}"
