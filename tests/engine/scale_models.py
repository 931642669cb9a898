"""Random models of mixed scales, with and without exits, and images of several sizes for them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyruntime import ComputePolicy, ExitPolicy, ScalePolicy, VisionRuntime
from pyruntime.format.load import Container
from pyruntime.format.manifest import Manifest
from pyruntime.format.spec import ScaleGateSpec, ScaleSpec, VisionSpec, WidthSpec
from tests.models.vision_models import exits_of, spec_of, tensors_of

GATE = ScaleGateSpec((12, 10), norms=True, positions=True)
SIZES = ((16, 24), (8, 8), (24, 8), (17, 30), (3, 5))
EXITS = 3
MODELS: dict[str, dict[str, Any]] = {
    "exits": {"exits": exits_of()},
    "no exits": {},
    "bfloat16": {"dtype": "bfloat16", "exits": exits_of("max_prob", 0.4)},
    "mean by area": {
        "prefix_tokens": 0, "pool": "mean",
        "scales": ScaleSpec((2,), gate=GATE, pool_weight="area"),
    },
    "three scales": {
        "image_size": (32, 16), "exits": exits_of("margin", 0.1),
        "scales": ScaleSpec((2, 4), source="variance", thresholds=(1.0, 1.0)),
    },
    "adaptive width": {"width": WidthSpec(3, mlp_bottleneck=16, attention_bottleneck=8)},
}  # fmt: skip


def scale_spec(name: str = "exits", **changes: Any) -> VisionSpec:
    base = {"image_size": (16, 24), "exits": (), "scales": ScaleSpec((2,), gate=GATE)}
    return spec_of(**{**base, **MODELS[name], **changes})


def runtime_of(
    spec: VisionSpec, calibration: dict[str, Any] | None = None, tensors: Any = None
) -> VisionRuntime:
    """Around tensors that never were on a disk."""
    manifest = Manifest(spec, None, calibration, {}, {}, {})
    held = tensors_of(spec) if tensors is None else tensors
    return VisionRuntime(Container(Path("random"), spec, None, calibration, held, manifest))


def images_of(count: int, seed: int = 0) -> list[Tensor]:
    """float32 [3, H, W] of different sizes and contrast."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        size = SIZES[number % len(SIZES)]
        noise = torch.randn(3, *size, generator=generator)
        # Of some corners nothing is left, so that rules by pixels have something to decide.
        noise[:, : size[0] // 2] *= torch.rand(1, generator=generator) * 2
        found.append(noise)
    return found


def scale_policies(spec: VisionSpec) -> list[ScalePolicy | None]:
    """One of every kind that the model knows, for images of at least one coarsest patch."""
    found: list[ScalePolicy | None] = [None]
    found += [ScalePolicy(name) for name in ("all_fine", "all_coarse")]
    found += [ScalePolicy("random", tokens=24, seed=seed) for seed in (1, 2)]
    found += [ScalePolicy("variance", threshold=t) for t in (0.3, 1.0)]
    found += [ScalePolicy("entropy", threshold=4.0), ScalePolicy("variance", tokens=24)]
    assert spec.scales is not None
    if spec.scales.gate is not None:
        found += [ScalePolicy(threshold=t) for t in (-1.0, 0.5)]
        found += [ScalePolicy(threshold=1.0, tokens=30), ScalePolicy(tokens=24)]
    return found


def policies_of(spec: VisionSpec, count: int, seed: int = 3) -> list[ComputePolicy]:
    """Any policy of patches with any policy of exits."""
    draw, scales = random.Random(seed), scale_policies(spec)
    exits: list[ExitPolicy | None] = [None]
    if spec.exits:
        exits += [ExitPolicy(never=True), *(ExitPolicy(level=level) for level in range(EXITS))]
    return [
        ComputePolicy(exit=draw.choice(exits), scales=draw.choice(scales)) for _ in range(count)
    ]
