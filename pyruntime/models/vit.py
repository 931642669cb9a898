"""Vision transformers on packed rows, in stages that end at their early exits."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from types import ModuleType

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.format.spec import VisionSpec
from pyruntime.gates.exit import ExitState
from pyruntime.layers.adaptive import Meter
from pyruntime.layers.exit_head import Exit, mean_rows
from pyruntime.layers.packed import Packed
from pyruntime.layers.vision_block import Rows
from pyruntime.models.vision_cost import VisionCost, last_rows
from pyruntime.models.vision_layers import VisionLayers
from pyruntime.ops.backend import backend
from pyruntime.ops.weight import Weight

# Rows that run together through all blocks of a stage: few enough for their activations to stay in
# the cache, enough for a matmul to read its weights seldom.
PART_ROWS = 1536


class VisionTransformer:
    """A vision transformer (ViT, DeiT, DINOv2 backbones, T2T-ViT) with its exits.

    Rows of images are packed, prefix rows first: [prefix | patches], raster by raster. The caller
    runs ``embed``, then for every stage ``run_stage`` and ``exit``, dropping the images that leave,
    and after the last stage ``classify``; `forward` is the backbone alone.

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

    @torch.inference_mode()
    def embed(self, images: Tensor) -> Packed:
        """Rows of images float32 [B, C, H, W], normalised as `spec.preprocess` says.

        Raises:
            InvalidInput: images of another shape or dtype than the model's.
        """
        spec, layers = self.spec, self._layers
        expected = (len(spec.preprocess.mean), *spec.image_size)
        if images.dim() != 4 or images.shape[1:] != expected or images.dtype != torch.float32:
            raise InvalidInput(
                f"images must be float32 [B, {', '.join(map(str, expected))}], got "
                f"{images.dtype} {list(images.shape)}"
            )
        images, prefix = images.contiguous(), spec.prefix_tokens
        dtype = getattr(torch, spec.dtype)
        x = torch.empty(len(images), spec.tokens, spec.hidden_size, dtype=dtype)
        if layers.prefix is not None:
            x[:, :prefix] = layers.prefix
        step = max(1, 2 * PART_ROWS // layers.stem.rows_of(*spec.image_size))
        for part, to in zip(images.split(step), x.split(step), strict=True):
            if len(part):
                patches = layers.stem(self.ops, part).view(len(part), -1, spec.hidden_size)
                torch.add(patches, layers.positions, out=to[:, prefix:])
        rows = x.flatten(0, 1)
        if layers.pre_norm is not None:
            rows = layers.pre_norm(self.ops, rows)
        return Packed.of(rows, [spec.tokens] * len(images))

    @torch.inference_mode()
    def run_stage(self, packed: Packed, stage: int, features: bool = False) -> Tensor | None:
        """Run the blocks of a stage on n images, in place (``packed.x`` is mutated).

        The last block of the last stage updates only the rows that the final head reads, whose bits
        are those of the whole block.

        Args:
            features: update all rows there too.

        Returns:
            Of a model of adaptive width int64 [n], multiply-accumulates of the learners that ran
            (`VisionCost` counts all else); else None.
        """
        return self._run(packed, self.stages[stage], features)

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
            pooled = layers.norm(ops, mean_rows(packed, spec.prefix_tokens))
        else:
            normed = layers.norm(ops, packed.x, out_dtype=torch.float32)
            pooled = mean_rows(Packed(normed, packed.cu_seqlens), spec.prefix_tokens)
            if spec.pool == "class_mean":
                pooled = torch.cat([normed[first.long()], pooled], 1)
        return self._head(pooled, 0)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Logits float32 [B, C] of images float32 [B, C, H, W]: the backbone, without any exit."""
        packed = self.embed(images)
        self._run(packed, range(self.spec.num_layers), features=False)
        return self.classify(packed)

    def _head(self, x: Tensor, number: int) -> Tensor:
        weight, bias = self._layers.heads[number]
        logits: Tensor = self.ops.segment_matmul(x, weight, bias=bias)
        return logits

    def _run(self, packed: Packed, blocks: range, features: bool) -> Tensor | None:
        """See `run_stage`. A part of the images runs all blocks before the next part begins."""
        spec, last = self.spec, self.spec.num_layers - 1
        meter = None if spec.width is None else Meter(torch.zeros(packed.count, dtype=torch.int64))
        head_rows = None if features else last_rows(spec)
        for start, stop in self._parts(packed):
            part = packed.slice(start, stop)
            rows = Rows(part.x, part.cu_seqlens)
            part_meter = None if meter is None else meter.slice(start, stop)
            for block in blocks:
                wanted = _first_rows(part, head_rows) if block == last and head_rows else None
                self._layers.blocks[block](self.ops, rows, part_meter, wanted)
        return None if meter is None else meter.macs

    def _parts(self, packed: Packed) -> Iterator[tuple[int, int]]:
        """First and last + 1 of the images of every part: about equal numbers of rows."""
        ends = packed.cu_seqlens.tolist()
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


def _first_rows(packed: Packed, each: int) -> Rows:
    """Numbers of the first `each` rows of every image."""
    steps = torch.arange(each, dtype=torch.int32)
    numbers = (packed.first_rows[:, None] + steps).flatten()
    return Rows(numbers, torch.arange(packed.count + 1, dtype=torch.int32) * each)
