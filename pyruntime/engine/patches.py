"""The images of a batch, and what the network sees of each: which patches, of which sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyruntime.gates.scale import ScaleChoice, ScaleRule
from pyruntime.gates.scale_layout import ScaleGrid
from pyruntime.models.vision_stem import Images
from pyruntime.models.vit import VisionTransformer


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What the network sees of one image; see `Classification`, which has these fields."""

    tokens: int
    tokens_dense: int
    grid: ScaleGrid
    stops: Tensor | None
    macs_dense: int


@dataclass(frozen=True, slots=True, eq=False)
class Patches:
    """n images with a choice of patches.

    Attributes:
        images: float32 [n, C, H, W], or `Pixels` of any sizes.
        choice: which of their patches become tokens.
        prefix: rows of each image before its patches.
        gated: images whose regions the learned gate looked at, n; None: nobody's.
    """

    images: Images
    choice: ScaleChoice
    prefix: int
    gated: tuple[bool, ...] | None = None

    @staticmethod
    def of(
        model: VisionTransformer,
        images: Images,
        rules: ScaleRule | Sequence[ScaleRule] | None = None,
        stops: Tensor | None = None,
    ) -> Patches:
        """See `VisionTransformer.choose`: rules, or stops, or neither, which is all fine.

        Raises:
            InvalidInput: as there.
        """
        choice, prefix = model.choose(images, rules, stops), model.spec.prefix_tokens
        if rules is None or stops is not None:
            return Patches(images, choice, prefix)
        count = choice.layout.count
        each = [rules] * count if isinstance(rules, ScaleRule) else rules
        gated = tuple(rule.source == "learned" for rule in each)
        return Patches(images, choice, prefix, gated if any(gated) else None)

    @property
    def tokens(self) -> Tensor:
        """int32 [n], rows of each image: prefix and patches."""
        return self.choice.cu_seqlens(self.prefix).diff()

    def macs(self, model: VisionTransformer) -> Tensor:
        """int64 [n], of choosing and embedding."""
        return model.embed_macs(self.choice, self.gated)

    def macs_dense(self, model: VisionTransformer) -> Tensor:
        """int64 [n], of the model without exits on images of these sizes, all patches fine."""
        lengths = self._dense_lengths()
        known = {length: model.cost.dense(length) for length in set(lengths)}
        return torch.tensor([known[length] for length in lengths], dtype=torch.int64)

    def seen(self, model: VisionTransformer) -> list[Seen]:
        """Of each image. Nothing in it keeps pixels alive."""
        grids = self.choice.layout.grids
        stops = self.choice.stops_by_image() or (None,) * len(grids)
        tokens, macs = self.tokens.tolist(), self.macs_dense(model).tolist()
        facts = zip(tokens, self._dense_lengths(), grids, stops, macs, strict=True)
        return [Seen(*fact) for fact in facts]

    def _dense_lengths(self) -> list[int]:
        """Rows of each image all fine."""
        return [self.prefix + grid.fine for grid in self.choice.layout.grids]
