"""A vision model whose answers are easy to compute, behind the real call signatures.

What an image gets comes from its own rows by single additions and products, so that it is the
same to the last bit whatever it runs with. Exits carry state from one to the next: a mistake in
moving or joining it changes levels.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from pyruntime.engine.vision import VisionRuntime
from pyruntime.format.load import Container
from pyruntime.format.manifest import Manifest
from pyruntime.format.spec import ExitSpec, Preprocess, VisionSpec
from pyruntime.gates.exit import ExitState
from pyruntime.gates.scale import ScaleChoice
from pyruntime.gates.scale import choose as choose_cells
from pyruntime.gates.scale_layout import ScaleLayout
from pyruntime.layers.exit_head import Exit
from pyruntime.layers.packed import Packed
from pyruntime.models.vision_cost import VisionCost
from pyruntime.models.vision_stem import Images
from pyruntime.models.vit import Ran
from pyruntime.ops import reference

BOOM = 1e6  # the first pixel of an image that makes its batch fail
CLASSES = 5


def spec(count: int = 4, **changes: Any) -> VisionSpec:
    """Two blocks in every stage but the last; thresholds that let images leave anywhere."""
    base: dict[str, Any] = {
        "source_family": "fake",
        "image_size": (4, 4),
        "stem": "patch",
        "patch_size": 2,
        "hidden_size": 4,
        "num_layers": 2 * count + 1,
        "num_heads": 1,
        "mlp_size": 8,
        "num_classes": CLASSES,
        "norm_eps": 1e-6,
        "prefix_tokens": 1,
        "preprocess": Preprocess((0.5,) * 3, (0.25,) * 3),
        "exits": tuple(ExitSpec(2 * j + 1, "max_logit", 4.0) for j in range(count)),
    }
    return VisionSpec(**(base | changes))


class FakeVision:
    """Remembers every call of a stage as (stage, images)."""

    step_seconds = 0.0

    def __init__(
        self, spec: VisionSpec, tensors: Any = None, backend_name: str | None = None
    ) -> None:
        self.spec = spec
        self.ops: ModuleType = reference
        self.cost = VisionCost.of(spec)
        self.stages = self.cost.stages
        self.calls: list[tuple[int, int]] = []
        self.go = threading.Event()  # stages wait for it
        self.go.set()

    def choose(self, images: Images, rules: Any = None, stops: Any = None) -> ScaleChoice:
        assert rules is None and stops is None  # of one scale
        images = _images(images)
        sizes = ((images.shape[2], images.shape[3]),) * len(images)
        layout = ScaleLayout.of(sizes, self.spec.patch_size, ())
        return choose_cells(self.ops, layout, torch.zeros(0, dtype=torch.bool))

    def embed_macs(self, choice: ScaleChoice, gated: Any = None) -> Tensor:
        return torch.full((choice.layout.count,), self.cost.stem)

    def embed(self, images: Images, choice: ScaleChoice | None = None) -> Packed:
        images = _images(images)
        rows = images.reshape(len(images), -1)[:, : 4 * self.spec.tokens]
        return Packed.of(rows.reshape(-1, 4).clone(), [self.spec.tokens] * len(images))

    def run_stage(self, packed: Packed, stage: int, features: bool = False) -> Ran:
        if packed.count == 0:
            raise RuntimeError("a stage was called without images")
        time.sleep(self.step_seconds)
        self.go.wait(60)
        self.calls.append((stage, packed.count))
        if bool((packed.x.abs() > BOOM / 2).any()):
            raise RuntimeError("injected fault")
        for _ in self.stages[stage]:
            first = packed.x[packed.first_rows.long()]
            packed.x.mul_(-0.75)
            packed.x[packed.first_rows.long() + 1] += first  # rows of an image, and no others
            packed.x[packed.first_rows.long()] += packed.x[packed.first_rows.long() + 2]
        return Ran(packed, self.cost.stage_of(stage, packed.lengths))

    def exit(self, stage: int, packed: Packed, state: ExitState, limits: Tensor) -> Exit:
        logits = self._logits(packed)
        best = logits.amax(1)
        confidence = best + state.counters[:, 0]
        finite = logits.isfinite().all(1)
        state.counters[:, 0] += torch.where(finite, best * 0.5, 0.0)
        confidence = torch.where(finite, confidence, torch.nan)
        stays = ~(confidence >= limits[:, 0])
        plan = self.ops.plan_partition(torch.where(stays, 0, -1).int(), 1)
        return Exit(logits, confidence, plan)

    def classify(self, packed: Packed) -> Tensor:
        return self._logits(packed)

    def forward(self, images: Tensor) -> Tensor:
        packed = self.embed(images)
        for stage in range(len(self.stages)):
            self.run_stage(packed, stage)
        return self.classify(packed)

    def _logits(self, packed: Packed) -> Tensor:
        row = packed.x[packed.first_rows.long()]
        return torch.stack([row[:, c % 4] * (1 + c // 4) for c in range(CLASSES)], 1)


def container(
    model: VisionSpec | None = None, calibration: dict[str, Any] | None = None
) -> Container:
    """A folder of the fake that never was on a disk."""
    model = model or spec()
    manifest = Manifest(model, None, calibration, {}, {}, {})
    return Container(Path("fake"), model, None, calibration, {}, manifest)


def runtime(
    model: VisionSpec | None = None, calibration: dict[str, Any] | None = None
) -> VisionRuntime:
    """A VisionRuntime around the fake."""
    with patch("pyruntime.engine.vision.VisionTransformer", FakeVision):
        return VisionRuntime(container(model, calibration))


def fake_of(runtime: VisionRuntime) -> FakeVision:
    """Its model."""
    assert isinstance(runtime.model, FakeVision)
    return runtime.model


def untimed(model: VisionSpec | None = None) -> VisionRuntime:
    """A runtime that measures nothing: moving rows always pays, waiting for company never does."""
    found = runtime(model)
    with_times: Any = found.times
    with_times.measure = lambda: None
    with_times.compaction_pays = lambda stage, before, after: True
    with_times.target = lambda stage, most: 1
    return found


def images(count: int, seed: int = 0) -> Tensor:
    """float32 [count, 3, 4, 4] that leave at all levels under the fake's own rule."""
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2


def alone(model: Any, image: Tensor, limits: Tensor) -> tuple[int, Tensor]:
    """Level and logits [C] of one image [C, H, W] run by itself, stage by stage."""
    packed = model.embed(image[None])
    state = ExitState.start(1, model.spec.num_classes, model.spec.exits)
    for stage in range(len(model.stages) - 1):
        model.run_stage(packed, stage)
        found = model.exit(stage, packed, state, limits[None, stage].contiguous())
        if found.plan.kept == 0:
            return stage, found.logits[0]
    model.run_stage(packed, len(model.stages) - 1)
    return len(model.stages) - 1, model.classify(packed)[0]


def calibration(**changes: Any) -> dict[str, Any]:
    """A record of four exits."""
    return {
        "kind": "exits",
        "budgets": [1.0, 0.8, 0.5],
        "thresholds": [[9.0, 8.0, 7.0, None], [6.0, 5.0, 4.0, None], [2.0, 1.0, 0.5, None]],
        "kept": [1.0, 0.79, 0.52],
        "samples": 100,
        "data_sha256": "0" * 64,
        "default_budget": None,
    } | changes


def _images(images: Images) -> Tensor:
    """[B, C, H, W], of one size."""
    if isinstance(images, Tensor) or not images.count:
        return images if isinstance(images, Tensor) else torch.empty(0, images.channels, 1, 1)
    return torch.stack([images.image(i) for i in range(images.count)])
