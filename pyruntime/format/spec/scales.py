"""Mixed scales: how an image becomes patches of several sizes, as data."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

from pyruntime.errors import FormatError

Source = Literal[
    "learned", "variance", "entropy", "quadtree", "random", "all_fine", "all_coarse"
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class ScaleGateSpec:
    """MSViT's gate: linear layers on the raw pixels of a coarse region, one logit out.

    Attributes:
        widths: hidden units, first layer first.
        norms: a layer norm before every activation.
        positions: an embedding per region, added after the first layer.
        threshold: a region stays coarse iff its logit is larger.
    """

    widths: tuple[int, ...]
    norms: bool = False
    positions: bool = False
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            raise FormatError(f"scale gate: widths must be positive, are {list(self.widths)}")


@dataclass(frozen=True, slots=True)
class ScaleSpec:
    """Patches of several sizes: every region of the image is one coarse patch or finer ones.

    Attributes:
        ratios: sides of the coarser patches in finest ones, rising; each divides the next.
        embed: a coarser patch is resized to the finest and goes through the same projection
            (``shared``), has a projection of its own (``separate``), or is ``shared`` plus a
            zero-initialised convolution over its finest patches' embeddings (``conv``, arXiv
            2510.18091, APT).
        kernel: of ``separate``: on the resized patch, or on all pixels of the region.
        resize: mean of all pixels, or bilinear without antialias (of the middle ones).
        positions: of coarser patches: mean of the finest, bilinear without antialias, timm's
            bicubic with antialias, or sines of the patch's centre (Quadformer), which the finest
            have as well.
        gate: learned, or None.
        source: who decides unless a policy says otherwise.
        thresholds: of sources ``entropy`` and ``variance``, one per ratio, in their order: a patch
            stays coarse below.
        pool_weight: a mean over patches counts tokens, or the pixels that they stand for.
    """

    ratios: tuple[int, ...]
    embed: Literal["shared", "separate", "conv"] = "shared"
    kernel: Literal["patch", "region"] = "patch"
    resize: Literal["area", "bilinear"] = "area"
    positions: Literal["area", "bilinear", "bicubic_aa", "sinusoidal"] = "area"
    gate: ScaleGateSpec | None = None
    source: Source = "learned"
    thresholds: tuple[float, ...] = ()
    pool_weight: Literal["token", "area"] = "token"

    def __post_init__(self) -> None:
        problems = []
        sides = (1, *self.ratios)
        if not self.ratios:
            problems.append("ratios are missing")
        if any(b <= a or b % a for a, b in itertools.pairwise(sides)):
            problems.append(f"ratios must rise and divide one another, are {list(self.ratios)}")
        if self.gate is not None and len(self.ratios) != 1:
            problems.append("a learned gate knows two scales only")
        if self.source == "learned" and self.gate is None:
            problems.append("source 'learned' needs a gate")
        if self.source in ("entropy", "variance") and len(self.thresholds) != len(self.ratios):
            problems.append(
                f"source {self.source!r} needs a threshold for each of {list(self.ratios)}"
            )
        if self.embed == "conv" and any(ratio & (ratio - 1) for ratio in self.ratios):
            problems.append(f"embed 'conv' needs powers of two, ratios are {list(self.ratios)}")
        if problems:
            raise FormatError("scales: " + "; ".join(problems))
