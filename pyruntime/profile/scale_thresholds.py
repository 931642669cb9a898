"""Thresholds of the rule that divides regions: those at which given shares of them are fine."""

from __future__ import annotations

import torch
from torch import Tensor

from pyruntime.engine.images import Preprocessor
from pyruntime.engine.vision import VisionRuntime
from pyruntime.errors import InvalidInput
from pyruntime.format.spec.scales import ScaleSpec
from pyruntime.gates import scale_scores
from pyruntime.gates.scale import ScaleRule
from pyruntime.gates.scale_layout import ScaleGrid
from pyruntime.profile.image_data import ImageSet
from pyruntime.profile.measure import Ticker

# Of the regions of all images. Small shares are where mixed scales save most: they lie closest.
SHARES = (0.0, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7,
          0.8, 0.9)  # fmt: skip


def scale_thresholds(
    runtime: VisionRuntime, scales: ScaleSpec, data: ImageSet, batch: int, tick: Ticker
) -> list[float]:
    """Thresholds of the model's own source, one for all ratios, from nearly all coarse to nearly
    all fine; its own one is among them. `tick` is called after each batch.

    Raises:
        InvalidInput: a source without a threshold; an image that cannot be used.
    """
    rule = ScaleRule.own(scales)
    if not rule.thresholds:
        raise InvalidInput(
            f"the patches of this model are chosen by {scales.source!r}, which has no threshold: "
            "there is nothing to calibrate"
        )
    spec, found = runtime.spec, []
    preprocess = Preprocessor(spec.preprocess, spec.image_size)
    for numbers in data.deal(batch):
        images, _ = data.batch(preprocess, numbers)
        found.append(_scores(runtime, scales, images))
        tick()
    scores = torch.cat(found)
    sign = -1.0 if scales.source == "learned" else 1.0
    own = set(rule.thresholds) if len(set(rule.thresholds)) == 1 else set()
    return sorted(own | {sign * cut for cut in cuts(scores)})


def _scores(runtime: VisionRuntime, scales: ScaleSpec, images: Tensor) -> Tensor:
    """How much every coarser patch asks to be divided, float32 [C]."""
    if scales.source == "learned":
        return -runtime.model.scale_logits(images)
    spec = runtime.spec
    height, width = spec.image_size
    grid = ScaleGrid.of(height, width, spec.patch_size, scales.ratios)
    if scales.source == "variance":
        return torch.cat([scale_scores.variance(image, grid) for image in images])
    return torch.cat([scale_scores.entropy(image, grid, spec.preprocess) for image in images])


def cuts(scores: Tensor) -> list[float]:
    """Scores at or above which SHARES of all scores, float32 [n], lie: in the middle between two of
    them, so that rounding elsewhere moves nobody. Infinite ones and NaN are always above."""
    ordered = scores[scores.isfinite()].sort(descending=True).values
    always = len(scores) - len(ordered)
    found = []
    for share in SHARES:
        above = round(share * len(scores)) - always
        if share == 0 and len(ordered):
            found.append(float(ordered[0].nextafter(torch.tensor(torch.inf))))
        elif 0 < above < len(ordered):
            found.append(float(ordered[above - 1] + ordered[above]) / 2)
    return found
