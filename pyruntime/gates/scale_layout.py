"""Where the patches of all scales lie, of an image and of a batch: everything known before pixels.

An image is a pyramid of cells: of every scale, the coarsest first, all patches of that size in
raster order. Which of them become tokens is `pyruntime.gates.scale`'s to say.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput


@dataclass(frozen=True, slots=True, eq=False)
class ScaleGrid:
    """The M cells of an image of `rows` x `columns` finest patches.

    Attributes:
        rows, columns: of the finest grid, multiples of the largest ratio.
        patch: side of a finest patch, in pixels.
        ratios: sides of the coarser patches in finest ones, rising; none for a plain ViT.
        starts: first cell of each of the S scales.
        places: int32 [M, 3], top, left (in pixels) and ratio of each cell.
        parent: int64 [M], the cell of the next coarser scale that holds it, or -1.
        scale: int32 [M], 0 is the coarsest.
        chain: int64 [S, Nf], the cell of each scale that holds a finest one.
    """

    rows: int
    columns: int
    patch: int
    ratios: tuple[int, ...]
    starts: tuple[int, ...]
    places: Tensor
    parent: Tensor
    scale: Tensor
    chain: Tensor

    @staticmethod
    def of(height: int, width: int, patch: int, ratios: tuple[int, ...]) -> ScaleGrid:
        """Of an image of any size: the grid is padded up to whole coarsest patches. Cached.

        Raises:
            InvalidInput: a side below 1.
        """
        if min(height, width, patch) < 1:
            raise InvalidInput(
                f"scales: sides must be at least 1, are {height} x {width} in patches of {patch}"
            )
        most = ratios[-1] if ratios else 1
        side = patch * most
        return _grid(-(-height // side) * most, -(-width // side) * most, patch, ratios)

    @property
    def cells(self) -> int:
        """M."""
        return self.places.shape[0]

    @property
    def fine(self) -> int:
        """Nf, cells of the finest scale."""
        return self.rows * self.columns

    @property
    def coarse(self) -> int:
        """C, cells of all other scales: the first ones."""
        return self.cells - self.fine


@dataclass(frozen=True, slots=True, eq=False)
class ScaleLayout:
    """The cells of B images, image by image.

    Attributes:
        sizes: height and width of each image, in pixels.
        ratios: see `ScaleGrid`.
        grids: of each image.
        tables: the distinct grids, in order of appearance.
        first: int64 [B + 1], first cell of each image.
        first_coarse: int64 [B + 1], the same counting cells that are not of the finest scale.
        first_fine: int64 [B + 1], the same counting cells of the finest scale.
        places: int32 [M, 4], image, top, left (in pixels) and ratio of each of the M cells.
        areas: float32 [M], the finest patches that a cell stands for.
        parent: int64 [M], the cell of the next coarser scale that holds it, or -1.
        labels: int32 [M], image * S + scale: the segments of a plan.
        coarse_cells: int64 [C], the cells that are not of the finest scale, ascending.
        coarse_labels: int64 [C], their labels.
        regions: int32 [C, 4], their places, all of ratio 1: squares of pixels, not shrunk.
        position_rows: int32 [M], the cell's row in the tables of `tables`, one after the other.
        region_rows: int32 [C], the same where the tables hold no finest cells.
        chain: int64 [S, Nf], the cell of each scale that holds a finest one.
        line: int64 [S, M], a cell itself and those that hold it, upwards, counted in
            `coarse_cells`; C where there is none, C + 1 for a cell of the finest scale itself.
    """

    sizes: tuple[tuple[int, int], ...]
    ratios: tuple[int, ...]
    grids: tuple[ScaleGrid, ...]
    tables: tuple[ScaleGrid, ...]
    first: Tensor
    first_coarse: Tensor
    first_fine: Tensor
    places: Tensor
    areas: Tensor
    parent: Tensor
    labels: Tensor
    coarse_cells: Tensor
    coarse_labels: Tensor
    regions: Tensor
    position_rows: Tensor
    region_rows: Tensor
    chain: Tensor
    line: Tensor

    @staticmethod
    def of(sizes: tuple[tuple[int, int], ...], patch: int, ratios: tuple[int, ...]) -> ScaleLayout:
        """Of images of these heights and widths. Cached.

        Raises:
            InvalidInput: a side below 1.
        """
        return _layout(sizes, patch, ratios)

    @property
    def count(self) -> int:
        """B, the number of images."""
        return len(self.sizes)

    @property
    def scales(self) -> int:
        """S."""
        return len(self.ratios) + 1

    @property
    def cells(self) -> int:
        """M."""
        return self.places.shape[0]

    @property
    def coarse(self) -> int:
        """C, cells that are not of the finest scale."""
        return self.coarse_cells.shape[0]


@lru_cache(maxsize=256)
def _grid(rows: int, columns: int, patch: int, ratios: tuple[int, ...]) -> ScaleGrid:
    sides = (*reversed(ratios), 1)
    counts = [(rows // side) * (columns // side) for side in sides]
    starts = tuple(itertools.accumulate(counts[:-1], initial=0))
    y, x = (axis.flatten() for axis in _axes(rows, columns))
    places, parents = [], []
    for scale, side in enumerate(sides):
        down, across = (axis.flatten() for axis in _axes(rows // side, columns // side))
        ratio = torch.full_like(down, side)
        places.append(torch.stack([down * side * patch, across * side * patch, ratio], 1))
        if scale == 0:
            parents.append(torch.full_like(down, -1))
            continue
        step = sides[scale - 1] // side
        wide = columns // sides[scale - 1]
        parents.append(starts[scale - 1] + (down // step) * wide + across // step)
    return ScaleGrid(
        rows, columns, patch, ratios, starts,
        places=torch.cat(places).int(),
        parent=torch.cat(parents),
        scale=torch.repeat_interleave(torch.arange(len(sides)), torch.tensor(counts)).int(),
        chain=torch.stack([
            start + (y // side) * (columns // side) + x // side
            for start, side in zip(starts, sides, strict=True)
        ]),
    )  # fmt: skip


def _axes(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    down, across = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return down, across


@lru_cache(maxsize=64)
def _layout(sizes: tuple[tuple[int, int], ...], patch: int, ratios: tuple[int, ...]) -> ScaleLayout:
    grids = tuple(ScaleGrid.of(height, width, patch, ratios) for height, width in sizes)
    shapes = [(grid.rows, grid.columns) for grid in grids]
    tables = dict(zip(shapes, grids, strict=True))  # keys stay in order of appearance
    numbers = {shape: number for number, shape in enumerate(tables)}
    cells_before = _starts([grid.cells for grid in tables.values()])
    coarse_before = _starts([grid.coarse for grid in tables.values()])

    cells = torch.tensor([grid.cells for grid in grids], dtype=torch.int64)
    first = _starts([grid.cells for grid in grids])
    first_fine = _starts([grid.fine for grid in grids])
    image = torch.repeat_interleave(torch.arange(len(grids)), cells)
    inside = torch.arange(len(image)) - first[image]
    table = torch.tensor([numbers[shape] for shape in shapes], dtype=torch.int64)
    places = torch.cat([torch.empty(0, 3, dtype=torch.int32), *(grid.places for grid in grids)])
    scale = torch.cat([torch.empty(0, dtype=torch.int32), *(grid.scale for grid in grids)])
    parent = torch.cat([torch.empty(0, dtype=torch.int64), *(grid.parent for grid in grids)])
    parent = torch.where(parent < 0, -1, parent + first[image])
    chains = [grid.chain + start for grid, start in zip(grids, first[:-1], strict=True)]
    scales = len(ratios) + 1
    is_coarse = scale < scales - 1
    coarse_cells = torch.nonzero(is_coarse)[:, 0]
    places = torch.cat([image[:, None].int(), places], 1)
    labels = image * scales + scale
    regions = places[coarse_cells]
    regions[:, 3] = 1
    table = table[image]  # of each cell
    region_rows = (coarse_before[table] + inside)[coarse_cells]  # coarse cells come first
    return ScaleLayout(
        sizes, ratios, grids, tuple(tables.values()), first,
        first_coarse=first - first_fine,
        first_fine=first_fine,
        places=places,
        areas=places[:, 3].float().square(),
        parent=parent,
        labels=labels.int(),
        coarse_cells=coarse_cells,
        coarse_labels=labels[coarse_cells],
        regions=regions,
        position_rows=(cells_before[table] + inside).int(),
        region_rows=region_rows.int(),
        chain=torch.cat([torch.empty(scales, 0, dtype=torch.int64), *chains], 1),
        line=_line(parent, is_coarse, scales),
    )  # fmt: skip


def _starts(counts: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int64)


def _line(parent: Tensor, is_coarse: Tensor, scales: int) -> Tensor:
    """See `ScaleLayout.line`."""
    number = torch.cumsum(is_coarse, 0) - 1
    coarse = int(is_coarse.sum())
    found = [torch.where(is_coarse, number, coarse + 1)]
    above = parent
    for _ in range(scales - 1):
        held = above >= 0
        found.append(torch.where(held, number[above], coarse))
        above = torch.where(held, parent[above], -1)
    return torch.stack(found)
