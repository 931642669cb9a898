"""Mixed scales: which cells of an image become tokens, as a Plan.

A rule says of every cell that is not of the finest scale whether it stops there, undivided; what
follows is the same for all rules. Rules are MSViT's gate (arXiv 2307.02321), the entropy of APT
(arXiv 2510.18091), the quadtree of Quadformer (arXiv 2304.14287) and controls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.format.spec.scales import ScaleSpec, Source
from pyruntime.format.spec.vision import Preprocess
from pyruntime.gates import scale_scores
from pyruntime.gates.quadtree import check_tokens, divided
from pyruntime.gates.scale_layout import ScaleGrid, ScaleLayout
from pyruntime.gates.scale_mlp import ScaleGate
from pyruntime.ops.pixels import Pixels
from pyruntime.plan import Plan

_ENDS = torch.tensor([False, True])  # what `ScaleLayout.line` finds behind the stops
_THRESHOLDS = ("learned", "variance", "entropy")


@dataclass(frozen=True, slots=True)
class ScaleRule:
    """How one image chooses.

    Attributes:
        source: ``learned``: a cell stops iff its logit is larger than the threshold (a tie and NaN
            are divided); ``variance``, ``entropy``: iff it is smaller; ``quadtree``, ``random``:
            `tokens` alone decide; ``all_fine``, ``all_coarse``.
        thresholds: one per ratio, of the largest first.
        tokens: how many patches an image may have: the highest scores are divided first (of
            ``learned`` the lowest logits), as long as they fit; of ``quadtree`` it has exactly so
            many. Beside thresholds both limits hold.
        seed: of ``random``.

    Raises:
        InvalidInput: fields that the source does not have, or lacks.
    """

    source: Source
    thresholds: tuple[float, ...] = ()
    tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        source, wants = self.source, self.source in _THRESHOLDS
        if source in ("all_fine", "all_coarse"):
            if self.thresholds or self.tokens is not None:
                raise InvalidInput(f"scales: {source} has neither thresholds nor tokens")
        elif self.tokens is None and not (wants and self.thresholds):
            needed = "thresholds or tokens" if wants else "tokens"
            raise InvalidInput(f"scales: source {source!r} needs {needed}")
        if self.thresholds and not wants:
            raise InvalidInput(f"scales: source {source!r} has no thresholds")
        if any(math.isnan(value) for value in self.thresholds):
            raise InvalidInput(f"scales: thresholds must be numbers, are {list(self.thresholds)}")

    @staticmethod
    def own(spec: ScaleSpec) -> ScaleRule:
        """The checkpoint's own.

        Raises:
            InvalidInput: its source needs a number of tokens, and a checkpoint has none.
        """
        if spec.source == "learned" and spec.gate is not None:
            return ScaleRule("learned", (spec.gate.threshold,))
        return ScaleRule(spec.source, spec.thresholds[::-1])

    def check(self, grid: ScaleGrid) -> None:
        """Refuse an image that the rule does not fit.

        Raises:
            InvalidInput: thresholds of another number of scales; tokens out of reach.
        """
        if self.thresholds and len(self.thresholds) != len(grid.ratios):
            raise InvalidInput(
                f"scales: expected a threshold for each of the ratios {list(grid.ratios)}, got "
                f"{list(self.thresholds)}"
            )
        if self.tokens is not None:
            check_tokens(grid, self.tokens, exact=self.source == "quadtree")

    def limits(self, scales: int) -> tuple[float, ...]:
        """Of every scale, the coarsest first: a cell of a lower score stops; -inf for none."""
        if self.source == "all_coarse":
            return (math.inf,) * scales
        if not self.thresholds:
            return (-math.inf,) * scales
        sign = -1.0 if self.source == "learned" else 1.0
        return (*(sign * value for value in self.thresholds), -math.inf)


@dataclass(frozen=True, slots=True, eq=False)
class ScaleChoice:
    """The tokens of B images.

    Attributes:
        layout: where the cells lie.
        stops: bool [C], see `ScaleLayout.coarse_cells`: the cell is not divided, if it is reached.
        plan: source rows are the cells of the layout; its segments are the B * S pairs of image and
            scale, the coarsest first, so that every S-th offset is where an image begins.
    """

    layout: ScaleLayout
    stops: Tensor
    plan: Plan

    @property
    def rows(self) -> Tensor:
        """int32 [R], the cells that became tokens, image by image, in the order of the layout."""
        return self.plan.rows

    @property
    def sizes(self) -> Tensor:
        """float32 [R], the finest patches that each patch stands for."""
        return self.layout.areas[self.rows]

    def stops_by_image(self) -> tuple[Tensor, ...] | None:
        """`stops` of each image; None where there is one scale."""
        if self.layout.scales == 1:
            return None
        counts = [grid.coarse for grid in self.layout.grids]
        # Tensors of the model are inference tensors, which autograd does not take; users may.
        return tuple(self.stops.clone().split(counts))

    def cu_seqlens(self, prefix: int) -> Tensor:
        """int32 [B + 1], where each image begins if it has `prefix` rows before its patches."""
        ends = self.plan.offsets[:: self.layout.scales]
        return ends + prefix * torch.arange(len(ends), dtype=torch.int32)

    def packed_rows(self, prefix: int) -> Tensor:
        """int32 [R], the row of each patch there."""
        rows = torch.arange(prefix, self.plan.kept + prefix, dtype=torch.int32)
        if not prefix or self.layout.count < 2:
            return rows
        return rows.add_(self.layout.places[:, 0][self.rows], alpha=prefix)

    def slots(self, prefix: int) -> Tensor:
        """int32 [Nf], the row there that holds each finest cell, image by image in raster order."""
        layout = self.layout
        packed = self.plan.inverse[:, 0][layout.chain].amax(0)  # the others are -1
        if prefix:
            packed += (layout.places[:, 0][layout.chain[-1]] + 1) * prefix
        return packed

    def spread(self, values: Tensor, prefix: int) -> Tensor:
        """Values float32 [R] of patches as those of all rows there; a prefix row has 1."""
        spread = values.new_ones(self.plan.kept + prefix * self.layout.count)
        spread[self.packed_rows(prefix)] = values
        return spread


def scores_of(
    ops: ModuleType,
    pixels: Pixels,
    layout: ScaleLayout,
    rules: Sequence[ScaleRule],
    preprocess: Preprocess,
    gate: ScaleGate | None = None,
) -> Tensor:
    """How much each cell asks to be divided, float32 [C]: of ``learned`` minus the logit.

    A rule without scores (``all_fine``, ``all_coarse``) has zeros. See `stops_of`.
    """
    learned = [rule.source == "learned" for rule in rules]
    if any(learned) and gate is None:
        raise InvalidInput("scales: source 'learned' needs a gate, and this model has none")
    if gate is not None and layout.count and all(learned):
        return gate.logits(ops, pixels, layout).neg_()
    scores = torch.zeros(layout.coarse)
    if gate is not None and any(learned):
        cells = torch.nonzero(torch.tensor(learned)[layout.regions[:, 0]])[:, 0]
        scores[cells] = gate.logits(ops, pixels, layout, cells).neg_()
    start = 0
    for i, (rule, grid) in enumerate(zip(rules, layout.grids, strict=True)):
        part = scores[start : start + grid.coarse]
        if rule.source == "variance":
            part.copy_(scale_scores.variance(pixels.image(i), grid))
        elif rule.source == "entropy":
            part.copy_(scale_scores.entropy(pixels.image(i), grid, preprocess))
        elif rule.source == "quadtree":
            part.copy_(scale_scores.resize_error(pixels.image(i), grid))
        elif rule.source == "random":
            part.copy_(scale_scores.chance(rule.seed, grid.coarse))
        start += grid.coarse
    return scores


def stops_of(
    ops: ModuleType,
    pixels: Pixels,
    layout: ScaleLayout,
    rules: Sequence[ScaleRule],
    preprocess: Preprocess,
    gate: ScaleGate | None = None,
) -> Tensor:
    """Which cells stop, bool [C] in the order of `ScaleLayout.coarse_cells`.

    What an image gets depends on its own pixels and rule alone.

    Args:
        pixels: B images, normalised as `preprocess` says.
        layout: theirs.
        rules: one per image.
        gate: for the source ``learned``.

    Raises:
        InvalidInput: rules that do not fit the model or the images.
    """
    if len(rules) != layout.count:
        raise InvalidInput(f"scales: got {len(rules)} rules for {layout.count} images")
    for rule, grid in dict.fromkeys(zip(rules, layout.grids, strict=True)):
        rule.check(grid)
    scores = scores_of(ops, pixels, layout, rules, preprocess, gate)
    limits = [rule.limits(layout.scales) for rule in rules]
    if layout.scales == 2 and len(set(limits)) == 1:
        stops = scores < limits[0][0]
    else:
        each = torch.tensor([limit for image in limits for limit in image])
        stops = scores < each[layout.coarse_labels]
    if any(rule.tokens is not None for rule in rules):
        stops |= ~divided(layout, scores, stops, [rule.tokens for rule in rules])
    return stops


def settle(layout: ScaleLayout, stops: Tensor) -> Tensor:
    """The active cells, bool [M]: they tile every image exactly once.

    Args:
        stops: bool [C], see `stops_of`; below a cell that stops it has no meaning.

    Raises:
        InvalidInput: stops of another shape or dtype.
    """
    if stops.dtype != torch.bool or stops.shape != layout.coarse_cells.shape:
        raise InvalidInput(
            f"stops: expected bool [{layout.coarse}], one for every coarser patch, got "
            f"{stops.dtype} {list(stops.shape)}"
        )
    line = torch.cat([stops, _ENDS])[layout.line]
    if layout.scales == 2:
        return line[0] > line[1]
    return line[0] & ~line[1:].any(0)


def choose(ops: ModuleType, layout: ScaleLayout, stops: Tensor) -> ScaleChoice:
    """The choice that these stops make; see `settle`."""
    active = settle(layout, stops)
    if layout.scales > 1:
        labels = layout.labels.masked_fill(~active, -1)
        plan = ops.plan_partition(labels, layout.count * layout.scales)
    else:
        rows = torch.arange(layout.cells, dtype=torch.int32)
        offsets = layout.first.int()
        plan = Plan(rows, offsets, None, rows.view(-1, 1), layout.cells, layout.cells)
    return ScaleChoice(layout, stops, plan)
