"""MSViT's scale gate: an MLP that reads the pixels of one coarse region (arXiv 2307.02321)."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.format.spec.positions import resize_positions
from pyruntime.format.spec.vision import VisionSpec
from pyruntime.gates.experts.logits import Linear
from pyruntime.gates.position_tables import PositionTables
from pyruntime.gates.scale_layout import ScaleGrid, ScaleLayout
from pyruntime.ops.pixels import Pixels


@dataclass(frozen=True, slots=True, eq=False)
class ScaleGate:
    """Linear layers with GELUs between them, one logit out; all of it float32.

    A region stays coarse iff its logit is larger than a threshold.

    Attributes:
        layers: the first one [h0, C * size * size], in the order of a convolution's kernel.
        norms: weight and bias float32 of a layer norm before every GELU, or none at all.
        positions: float32 of every region, added to the first layer, or None.
        size: side of a region in pixels.
        eps: added to the variance.
    """

    layers: tuple[Linear, ...]
    norms: tuple[tuple[Tensor, Tensor], ...]
    positions: PositionTables | None
    size: int
    eps: float = 1e-6

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one region."""
        weights = (layer.weight for layer in self.layers)
        return sum(weight.out_features * weight.in_features for weight in weights)

    def logits(
        self, ops: ModuleType, pixels: Pixels, layout: ScaleLayout, cells: Tensor | None = None
    ) -> Tensor:
        """float32 [n] of n regions; none depends on the others.

        Args:
            pixels: normalised images.
            layout: theirs, of two scales.
            cells: int64 [n], which of the C coarse cells; None: all.
        """
        regions, rows = layout.regions, layout.region_rows
        if cells is not None:
            regions, rows = regions[cells], rows[cells]
        if not len(regions):
            return torch.empty(0)
        positions = None if self.positions is None else self.positions.of(layout)
        epilogue = "none" if self.norms else "gelu"
        first, *rest = self.layers
        x: Tensor = ops.embed_patches(
            pixels, regions, first.weight, first.bias,
            size=self.size,
            positions=positions,
            position_rows=None if positions is None else rows,
            epilogue=epilogue,
            out=torch.empty(len(regions), first.weight.out_features),
        )  # fmt: skip
        for number, layer in enumerate(rest):
            if self.norms:
                x = ops.layer_norm(x, *self.norms[number], self.eps, epilogue="gelu")
            last = number == len(rest) - 1
            x = ops.segment_matmul(
                x, layer.weight, bias=layer.bias, epilogue="none" if last else epilogue
            )
        return x[:, 0]


def region_positions(spec: VisionSpec, positions: Tensor) -> PositionTables:
    """Positions of the regions of any grid, made from those of the spec's, float32 [Nc, h0].

    Raises:
        InvalidInput: a model without scales.
    """
    if spec.scales is None:
        raise InvalidInput("scale gate: this model has one scale only")
    ratio = spec.scales.ratios[-1]
    rows, columns = spec.grid

    def of_grid(grid: ScaleGrid) -> Tensor:
        shape = grid.rows // ratio, grid.columns // ratio
        own = rows // ratio, columns // ratio
        return resize_positions(positions, own, shape, spec.position_resize)

    return PositionTables(of_grid)
