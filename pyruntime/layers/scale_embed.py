"""Images to tokens: exactly the patches that a choice of scales has, each a row of its image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from pyruntime.format.spec import VisionSpec
from pyruntime.format.spec.positions import coarsen_positions, resize_positions
from pyruntime.gates.position_tables import PositionTables
from pyruntime.gates.scale import ScaleChoice
from pyruntime.gates.scale_layout import ScaleGrid
from pyruntime.layers.residual import Linear
from pyruntime.ops.pixels import Pixels


@dataclass(frozen=True, slots=True, eq=False)
class ScaleEmbed:
    """A convolution whose stride is its size, on patches of one scale or of several.

    A coarser patch is shrunk to the finest size and takes the same projection; or it has a
    projection of its own (`separate`); or what a convolution makes of its finest patches is added
    (`detail`).

    Attributes:
        project: [D, C * size * size], in the order of a convolution's kernel.
        size: of a finest patch, in pixels.
        positions: of all cells, float32.
        resize: how coarser patches are shrunk, see `ops.embed_patches`.
        separate: projections of coarser patches by their ratio, or none.
        whole: those read all pixels of their patch, [D, C * (ratio * size)^2].
        detail: of APT, or None.
    """

    project: Linear
    size: int
    positions: PositionTables
    resize: Literal["area", "bilinear"] = "area"
    separate: dict[int, Linear] | None = None
    whole: bool = False
    detail: Detail | None = None

    @staticmethod
    def of(spec: VisionSpec, linear: Callable[[str], Linear], positions: Tensor) -> ScaleEmbed:
        """Of a model.

        Args:
            linear: reads a matrix and its bias by name.
            positions: float32 [N, D] of the finest patches of an image of the spec's size.
        """
        project, tables = linear("stem"), cell_positions(spec, positions)
        scales = spec.scales
        if scales is None:
            return ScaleEmbed(project, spec.patch_size, tables)
        separate = detail = None
        if scales.embed == "separate":
            separate = {ratio: linear(f"coarse.{j}") for j, ratio in enumerate(scales.ratios)}
        elif scales.embed == "conv":
            detail = Detail(linear("conv"), linear("zero"))
        whole = scales.kernel == "region"
        return ScaleEmbed(project, spec.patch_size, tables, scales.resize, separate, whole, detail)

    def __call__(
        self, ops: ModuleType, pixels: Pixels, choice: ScaleChoice, x: Tensor, prefix: int
    ) -> None:
        """Write the patches of B images into their rows of x [T, D] (mutated).

        Args:
            pixels: float32, normalised.
            choice: of these images.
            x: every image has `prefix` rows, which are not touched, then its patches.
        """
        layout, cells = choice.layout, choice.rows
        if not len(cells):
            return
        places, position_rows = layout.places, layout.position_rows
        if len(cells) != layout.cells:
            places, position_rows = places[cells], position_rows[cells]
        rows = _Rows(places, position_rows, choice.packed_rows(prefix))
        table = self.positions.of(layout)
        if self.separate is None and self.detail is None:
            self._embed(ops, pixels, rows, self.project, table, x)
            return
        for ratio in (1, *layout.ratios):
            part = rows.select(torch.nonzero(places[:, 3] == ratio)[:, 0])
            if not len(part.places):
                continue
            if ratio > 1 and self.detail is not None:
                added = self.detail(ops, pixels, part.places, self.project, self.size, ratio)
                added += table[part.position_rows]
                numbers = torch.arange(len(added), dtype=torch.int32)
                own = _Rows(part.places, numbers, part.out_rows)
                self._embed(ops, pixels, own, self.project, added, x)
            elif ratio > 1 and self.separate is not None:
                self._embed(ops, pixels, part, self.separate[ratio], table, x, ratio)
            else:
                self._embed(ops, pixels, part, self.project, table, x)

    def _embed(
        self,
        ops: ModuleType,
        pixels: Pixels,
        rows: _Rows,
        linear: Linear,
        table: Tensor,
        x: Tensor,
        ratio: int = 1,
    ) -> None:
        """Some rows of x by one projection; `ratio` is of a projection of its own."""
        places, size = rows.places, self.size
        if self.whole and ratio > 1:
            places, size = places.clone(), size * ratio
            places[:, 3] = 1
        ops.embed_patches(
            pixels, places, linear.weight, linear.bias,
            size=size,
            resize=self.resize,
            positions=table,
            position_rows=rows.position_rows,
            out=x,
            out_rows=rows.out_rows,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Detail:
    """What APT adds to a coarser patch: a convolution over its finest patches (arXiv 2510.18091).

    The embeddings of the finest patches, without positions, are merged 2 x 2 by the same
    convolution until one is left; `zero` began training as zero.

    Attributes:
        merge: [D, 4 * D], children in raster order.
        zero: [D, D].
    """

    merge: Linear
    zero: Linear

    def __call__(
        self,
        ops: ModuleType,
        pixels: Pixels,
        places: Tensor,
        project: Linear,
        size: int,
        ratio: int,
    ) -> Tensor:
        """float32 [n, D] of patches int32 [n, 4] that are all of one ratio, a power of two.

        Args:
            project: of the finest patches.
            size: of a finest patch, in pixels.
        """
        weight, bias = project
        children = (places[:, None] + _descendants(ratio, size)).flatten(0, 1)
        x = torch.empty(len(children), weight.out_features, dtype=weight.dtype)
        ops.embed_patches(pixels, children, weight, bias, size=size, out=x)
        while len(x) > len(places):
            x = x.view(-1, self.merge.weight.in_features)
            x = ops.segment_matmul(x, self.merge.weight, bias=self.merge.bias)
        found: Tensor = ops.segment_matmul(
            x, self.zero.weight, bias=self.zero.bias, out_dtype=torch.float32
        )
        return found


def cell_positions(spec: VisionSpec, positions: Tensor) -> PositionTables:
    """Positions of the cells of any grid, made from those of the spec's grid, float32 [N, D]."""
    scales = spec.scales
    rule = "area" if scales is None else scales.positions

    def of_grid(grid: ScaleGrid) -> Tensor:
        shape = grid.rows, grid.columns
        fine = resize_positions(positions, spec.grid, shape, spec.position_resize)
        ratios = (*reversed(grid.ratios), 1)
        parts = [coarsen_positions(fine, shape, ratio, rule) for ratio in ratios]
        return torch.cat(parts)

    return PositionTables(of_grid)


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Patches, the positions that they get and where they go."""

    places: Tensor
    position_rows: Tensor
    out_rows: Tensor

    def select(self, at: Tensor) -> _Rows:
        return _Rows(self.places[at], self.position_rows[at], self.out_rows[at])


def _descendants(ratio: int, size: int) -> Tensor:
    """What to add to a place to get its finest patches, int32 [ratio^2, 4]: every four that follow
    one another make a square, and so do every four such squares."""
    down = across = torch.zeros(1, dtype=torch.int32)
    while len(down) < ratio * ratio:
        down = torch.cat([2 * down[:, None] + y for y in (0, 0, 1, 1)], 1).flatten()
        across = torch.cat([2 * across[:, None] + x for x in (0, 1, 0, 1)], 1).flatten()
    still = torch.zeros_like(down)
    return torch.stack([still, down * size, across * size, still - (ratio - 1)], 1)
