"""From pixels to the packed rows of a vision transformer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.format.spec import VisionSpec
from pyruntime.gates.scale import ScaleChoice, ScaleRule, choose, stops_of
from pyruntime.gates.scale_layout import ScaleLayout
from pyruntime.layers.packed import Packed
from pyruntime.layers.t2t import TokensToTokens
from pyruntime.models.vision_cost import VisionCost
from pyruntime.models.vision_layers import VisionLayers
from pyruntime.ops.pixels import Pixels

Images = Tensor | Pixels

_STEM_ROWS = 3072  # of the tokens-to-token stem, that run together: as many as stay in the cache
_MOST_FINE = 16  # all-fine choices kept ready, one for each list of image sizes


class VisionStem:
    """Chooses the patches of every image and embeds them.

    A model of one scale has one choice, all fine, and so has one of several that is asked for none.
    """

    def __init__(self, spec: VisionSpec, layers: VisionLayers, ops: ModuleType) -> None:
        self._spec = spec
        self._layers = layers
        self._ops = ops
        self._fine: dict[ScaleLayout, ScaleChoice] = {}

    def pixels(self, images: Images) -> Pixels:
        """Images as `Pixels`, checked.

        Raises:
            InvalidInput: another shape, dtype or number of channels than the model's.
        """
        channels = len(self._spec.preprocess.mean)
        if isinstance(images, Tensor):
            expected = f"float32 [B, {channels}, H, W]"
            if images.dim() != 4 or images.shape[1] != channels or images.dtype != torch.float32:
                raise InvalidInput(
                    f"images must be {expected}, got {images.dtype} {list(images.shape)}"
                )
            images = Pixels.of(images)
        if images.channels != channels:
            raise InvalidInput(f"images must have {channels} channels, have {images.channels}")
        for height, width in set(images.sizes):
            if height < 1 or width < 1:
                raise InvalidInput(f"an image of {height} x {width} pixels has none")
            if self._spec.stem == "t2t" and (height, width) != self._spec.image_size:
                raise InvalidInput(
                    f"images must be of {list(self._spec.image_size)} pixels: the tokens-to-token "
                    f"stem takes no other, got {height} x {width}"
                )
        return images

    def layout(self, pixels: Pixels) -> ScaleLayout:
        """The patches that these images could have."""
        scales = self._spec.scales
        ratios = () if scales is None else scales.ratios
        return ScaleLayout.of(pixels.sizes, self._spec.patch_size, ratios)

    def choose(
        self,
        pixels: Pixels,
        rules: ScaleRule | Sequence[ScaleRule] | None,
        stops: Tensor | None,
    ) -> ScaleChoice:
        """See `VisionTransformer.choose`."""
        layout = self.layout(pixels)
        if stops is None and rules is None:
            return self._all_fine(layout)
        if self._spec.scales is None:
            raise InvalidInput("scales are asked for, but this model has one only")
        if stops is None:
            each = [rules] * pixels.count if isinstance(rules, ScaleRule) else list(rules or ())
            if len(each) != pixels.count:
                raise InvalidInput(f"got {len(each)} scale rules for {pixels.count} images")
            if all(rule.source == "all_fine" for rule in each):
                return self._all_fine(layout)
            gate = self._layers.scale_gate
            stops = stops_of(self._ops, pixels, layout, each, self._spec.preprocess, gate)
        return choose(self._ops, layout, stops)

    def logits(self, pixels: Pixels) -> Tensor:
        """See `VisionTransformer.scale_logits`."""
        gate = self._layers.scale_gate
        if gate is None:
            raise InvalidInput("this model has no learned scale gate")
        return gate.logits(self._ops, pixels, self.layout(pixels))

    def macs(
        self, cost: VisionCost, choice: ScaleChoice, gated: Sequence[bool] | None = None
    ) -> Tensor:
        """See `VisionTransformer.embed_macs`."""
        layout = choice.layout
        if self._spec.stem == "t2t":
            return torch.full((layout.count,), cost.stem)
        regions = None
        if gated is not None:
            coarse = zip(layout.grids, gated, strict=True)
            regions = [grid.coarse if asked else 0 for grid, asked in coarse]
        ends = choice.plan.offsets.tolist()
        patches = [b - a for a, b in itertools.pairwise(ends)]
        return cost.embedding(patches, layout.scales, regions)

    def embed(self, pixels: Pixels, choice: ScaleChoice) -> Packed:
        """Rows of images: prefix, then the chosen patches."""
        spec, layers, ops = self._spec, self._layers, self._ops
        prefix, count = spec.prefix_tokens, pixels.count
        ends = choice.cu_seqlens(prefix)
        total = choice.plan.kept + prefix * count
        x = torch.empty(total, spec.hidden_size, dtype=getattr(torch, spec.dtype))
        if layers.prefix is not None and count:
            rows = ends[:-1, None] + torch.arange(prefix, dtype=torch.int32)
            x[rows.long()] = layers.prefix.to(x.dtype)
        if isinstance(layers.stem, TokensToTokens):
            self._unfold(layers.stem, pixels, x)
        else:
            layers.stem(ops, pixels, choice, x, prefix)
        if layers.pre_norm is not None:
            x = layers.pre_norm(ops, x)
        return Packed(x, ends, self._sizes(choice), self._began(choice))

    def _unfold(self, stem: TokensToTokens, pixels: Pixels, x: Tensor) -> None:
        """The tokens-to-token stem: images of one size, a few at a time."""
        spec = self._spec
        if not pixels.count:
            return
        images = pixels.data.view(pixels.count, pixels.channels, *spec.image_size)
        each = x.view(pixels.count, spec.tokens, -1)[:, spec.prefix_tokens :]
        step = max(1, _STEM_ROWS // stem.rows_of(*spec.image_size))
        for part, to in zip(images.split(step), each.split(step), strict=True):
            tokens = stem(self._ops, part).view(len(part), -1, spec.hidden_size)
            torch.add(tokens, self._layers.positions, out=to)

    def _sizes(self, choice: ScaleChoice) -> Tensor | None:
        """Finest patches that every row stands for, where a mean over them asks."""
        scales = self._spec.scales
        if scales is None or scales.pool_weight == "token":
            return None
        return choice.spread(choice.sizes, self._spec.prefix_tokens)

    def _began(self, choice: ScaleChoice) -> Tensor | None:
        if self._spec.reduction is None:
            return None
        return choice.plan.offsets.diff()

    def _all_fine(self, layout: ScaleLayout) -> ScaleChoice:
        if layout not in self._fine:
            if len(self._fine) >= _MOST_FINE:
                self._fine.clear()
            nothing = torch.zeros(len(layout.coarse_cells), dtype=torch.bool)
            self._fine[layout] = choose(self._ops, layout, nothing)
        return self._fine[layout]
