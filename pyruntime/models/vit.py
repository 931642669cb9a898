"""Vision transformers on packed rows, in stages that end at their early exits."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.format.spec import VisionSpec
from pyruntime.gates.exit import ExitState
from pyruntime.gates.scale import ScaleChoice, ScaleRule
from pyruntime.layers.adaptive import Meter
from pyruntime.layers.exit_head import Exit, mean_rows
from pyruntime.layers.packed import Packed
from pyruntime.layers.reduce import Reduction
from pyruntime.layers.vision_block import Rows
from pyruntime.models.vision_cost import VisionCost, block_macs, last_rows
from pyruntime.models.vision_layers import VisionLayers
from pyruntime.models.vision_stem import Images, VisionStem
from pyruntime.ops.backend import backend
from pyruntime.ops.weight import Weight

# Rows that run together through all blocks of a stage: few enough for their activations to stay in
# the cache, enough for a matmul to read its weights seldom.
PART_ROWS = 1536


class Ran(NamedTuple):
    """A stage that n images ran: their rows, and its multiply-accumulates for each, int64 [n]."""

    packed: Packed
    macs: Tensor


class VisionTransformer:
    """A vision transformer (ViT, DeiT, DINOv2 backbones, T2T-ViT) with its exits.

    Rows of images are packed, prefix rows first: [prefix | coarse patches | finer ones], raster by
    raster. The caller runs ``choose`` and ``embed``, then for every stage ``run_stage`` and
    ``exit``, dropping the images that leave, and after the last stage ``classify``; `forward` is
    the backbone alone.

    Args:
        spec: the architecture.
        tensors: those `pyruntime.format.spec.vision_tensors` lists; read, never written.
        backend_name: forces an implementation of the ops.

    Attributes:
        cost: multiply-accumulates of its parts.
        stages: the blocks of every stage: stage s ends at exit s, the last one at the final head.
    """

    def __init__(
        self,
        spec: VisionSpec,
        tensors: Mapping[str, Tensor | Weight],
        backend_name: str | None = None,
    ) -> None:
        self.spec = spec
        self.ops: ModuleType = backend("cpu", backend_name)
        self.cost = VisionCost.of(spec)
        self.stages = self.cost.stages
        self._layers = VisionLayers.of(spec, tensors)
        self._stem = VisionStem(spec, self._layers, self.ops)
        self._by_area = spec.scales is not None and spec.scales.pool_weight == "area"

    @torch.inference_mode()
    def choose(
        self,
        images: Images,
        rules: ScaleRule | Sequence[ScaleRule] | None = None,
        stops: Tensor | None = None,
    ) -> ScaleChoice:
        """Which patches of the images become tokens.

        Args:
            images: see `embed`.
            rules: one for all, or one per image; None: all fine.
            stops: bool [C], instead of rules: for every coarser patch of the batch, in the order
                of `ScaleLayout.coarse_cells`, whether it is not divided.

        Raises:
            InvalidInput: see `embed`; rules or stops of another number, or for a
                model of one scale.
        """
        return self._stem.choose(self._stem.pixels(images), rules, stops)

    @torch.inference_mode()
    def scale_logits(self, images: Images) -> Tensor:
        """What the learned gate says of every region of the images, float32 [C]; see `choose`.

        Raises:
            InvalidInput: see `embed`; a model without a learned gate.
        """
        return self._stem.logits(self._stem.pixels(images))

    @torch.inference_mode()
    def embed(self, images: Images, choice: ScaleChoice | None = None) -> Packed:
        """Rows of images, normalised as `spec.preprocess` says.

        Args:
            images: float32 [B, C, H, W], or `Pixels` of any sizes. Outside of an image, up to whole
                patches, is 0: the mean colour.
            choice: from `choose` on images of these sizes; None: all fine.

        Raises:
            InvalidInput: images of another shape or dtype than the model's.
        """
        pixels = self._stem.pixels(images)
        if choice is None:
            choice = self._stem.choose(pixels, None, None)
        elif choice.layout.sizes != pixels.sizes:
            raise InvalidInput("choice: was made for images of other sizes")
        return self._stem.embed(pixels, choice)

    def embed_macs(self, choice: ScaleChoice, gated: Sequence[bool] | None = None) -> Tensor:
        """Multiply-accumulates of `choose` and `embed` for every image, int64 [n].

        Args:
            gated: n, whether the learned gate looked at an image's regions; None: at nobody's.
        """
        return self._stem.macs(self.cost, choice, gated)

    @torch.inference_mode()
    def run_stage(self, packed: Packed, stage: int, features: bool = False) -> Ran:
        """Run the blocks of a stage on n images (``packed.x`` is mutated).

        The last block of the last stage updates only the rows that the final head reads, whose bits
        are those of the whole block.

        Args:
            features: update all rows there too.
        """
        blocks = self.stages[stage]
        ran = self._run(packed, blocks, features)
        if not any(block in self._layers.reductions for block in blocks):
            ran.macs.add_(self.cost.stage_of(stage, packed.lengths))
        return ran

    @torch.inference_mode()
    def exit(self, stage: int, packed: Packed, state: ExitState, limits: Tensor) -> Exit:
        """What exit `stage` answers for the n images that ran its stage, and who continues.

        Args:
            state: of the n images; mutated.
            limits: float32 [n, 2], see `ops.plan_exit`.
        """
        return self._layers.exits[stage](self.ops, packed, state, limits)

    @torch.inference_mode()
    def classify(self, packed: Packed) -> Tensor:
        """Logits float32 [n, C] of the final head, of images that ran the last stage."""
        spec, layers, ops = self.spec, self._layers, self.ops
        first = packed.first_rows
        if spec.pool in ("class", "distilled"):
            logits = self._head(layers.norm(ops, packed.x, first, torch.float32), 0)
            if spec.pool == "class":
                return logits
            other = layers.norm(ops, packed.x, first + 1, torch.float32)
            return (logits + self._head(other, 1)) / 2
        if spec.norm_after_pool:
            pooled = layers.norm(ops, mean_rows(packed, spec.prefix_tokens, self._by_area))
        else:
            normed = layers.norm(ops, packed.x, out_dtype=torch.float32)
            pooled = mean_rows(replace(packed, x=normed), spec.prefix_tokens, self._by_area)
            if spec.pool == "class_mean":
                pooled = torch.cat([normed[first.long()], pooled], 1)
        return self._head(pooled, 0)

    @torch.inference_mode()
    def forward(
        self, images: Images, rules: ScaleRule | Sequence[ScaleRule] | None = None
    ) -> Tensor:
        """Logits float32 [B, C] of images: the backbone, without any exit; see `choose`."""
        packed = self.embed(images, self.choose(images, rules))
        ran = self._run(packed, range(self.spec.num_layers), features=False)
        return self.classify(ran.packed)

    @torch.inference_mode()
    def features(
        self, images: Images, rules: ScaleRule | Sequence[ScaleRule] | None = None
    ) -> list[Tensor]:
        """A map of every image, float32 [rows, columns, D] of its finest grid: the final block's
        patch rows, normed as the head has them; a coarser patch repeats itself where it lies.

        Raises:
            InvalidInput: as `choose`; a model whose rows leave on the way.
        """
        if self.spec.reduction is not None:
            raise InvalidInput("features: rows of this model leave or merge on the way")
        pixels = self._stem.pixels(images)
        choice = self._stem.choose(pixels, rules, None)
        packed = self._stem.embed(pixels, choice)
        packed = self._run(packed, range(self.spec.num_layers), features=True).packed
        x = packed.x.float()
        if not self.spec.norm_after_pool:
            x = self._layers.norm(self.ops, packed.x, out_dtype=torch.float32)
        dense = x[choice.slots(self.spec.prefix_tokens).long()]
        found = []
        side = self.spec.patch_size
        for grid, (height, width), part in zip(
            choice.layout.grids, pixels.sizes, dense.split([g.fine for g in choice.layout.grids]),
            strict=True,
        ):  # fmt: skip
            whole = part.view(grid.rows, grid.columns, -1)
            found.append(whole[: -(-height // side), : -(-width // side)])
        return found

    def _head(self, x: Tensor, number: int) -> Tensor:
        weight, bias = self._layers.heads[number]
        logits: Tensor = self.ops.segment_matmul(x, weight, bias=bias)
        return logits

    def _run(self, packed: Packed, blocks: range, features: bool) -> Ran:
        """See `run_stage`. A part of the images runs all blocks before the next part begins.

        Counted are learners, and all of it where rows leave on the way.
        """
        last, reductions = self.spec.num_layers - 1, self._layers.reductions
        reduces = any(block in reductions for block in blocks)
        macs = torch.zeros(packed.count, dtype=torch.int64)
        head_rows = None if features else last_rows(self.spec)
        left: list[Packed] = []
        for start, stop in self._parts(packed):
            part = packed.slice(start, stop)
            rows = Rows(part.x, part.cu_seqlens, part.sizes, part.began)
            meter = None if self.spec.width is None else Meter(macs[start:stop])
            for block in blocks:
                wanted = _first_rows(rows.ends, head_rows) if block == last and head_rows else None
                reduction, before = reductions.get(block), rows.ends
                rows = self._layers.blocks[block](self.ops, rows, meter, wanted, reduction)
                if reduces:
                    updated = None if wanted is None else head_rows
                    macs[start:stop] += self._block_macs(before, rows.ends, updated, reduction)
            left.append(Packed(*rows))
        return Ran(Packed.join(left) if reduces and left else packed, macs)

    def _block_macs(
        self, before: Tensor, after: Tensor, updated: int | None, reduction: Reduction | None
    ) -> Tensor:
        """Of a block of a stage in which rows leave, int64 [n]; `updated` None is all rows."""
        seen, fed = before.diff().long(), after.diff().long()
        extra = 0 if reduction is None else reduction.macs(seen)
        if reduction is not None and reduction.leads:
            seen = fed
        if updated is None:
            return extra + block_macs(self.spec, seen, seen, fed)
        if reduction is not None and not reduction.leads:
            extra = 0  # it did not run
        return extra + block_macs(self.spec, seen, torch.full_like(seen, updated))

    def _parts(self, packed: Packed) -> Iterator[tuple[int, int]]:
        """First and last + 1 of the images of every part: about equal numbers of rows."""
        ends = packed.ends
        if not ends[-1]:
            return
        count = -(-ends[-1] // PART_ROWS)
        width = self.spec.width
        if width is not None and width.rule == "official":  # looks at the whole batch
            count = 1
        cuts = [bisect_left(ends, ends[-1] * part / count) for part in range(count)]
        for start, stop in zip(cuts, [*cuts[1:], packed.count], strict=True):
            if start < stop:
                yield start, stop


def _first_rows(ends: Tensor, each: int) -> Rows:
    """Numbers of the first `each` rows of every image."""
    count = len(ends) - 1
    steps = torch.arange(each, dtype=torch.int32)
    numbers = (ends[:-1, None] + steps).flatten()
    return Rows(numbers, torch.arange(count + 1, dtype=torch.int32) * each)
