"""Small random models with exits, and images that tell their exits apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyruntime.engine.images import Preprocessor
from pyruntime.engine.vision import VisionRuntime, load_vision
from pyruntime.format.convert import convert
from pyruntime.profile.image_data import ImageSet
from tests.vision_checkpoints import timm_state, write_pth

IMAGE = (12, 8)
CLASSES = 7


def folder(path: Path, *, exits: int = 3, **shape: Any) -> Path:
    """A converted ViT with an exit after every block but the last, by JEI-DNN's gates."""
    state = timm_state(layers=exits + 1, image=IMAGE, classes=CLASSES, exits=exits, **shape)
    for name in state:
        if name.startswith("gates."):
            # Shares that differ from image to image, and add up to one somewhere on the way.
            state[name] = state[name] - 1.5 if name.endswith("bias") else 5 * state[name]
    source = path / "checkpoint" / "model.pth"
    write_pth(source, state, image=IMAGE, preprocess={"num_heads": 5, "crop_pct": 1.0})
    convert(source, path / "model")
    return path / "model"


def with_rule(runtime: VisionRuntime, **changes: Any) -> VisionRuntime:
    """The same weights with another rule at every exit."""
    spec = runtime.spec
    exits = tuple(replace(exit_, **changes) for exit_ in spec.exits)
    return VisionRuntime(replace(runtime.container, spec=replace(spec, exits=exits)))


def calibrated(runtime: VisionRuntime, record: dict[str, Any]) -> VisionRuntime:
    """With a calibration that was not written."""
    return VisionRuntime(replace(runtime.container, calibration=record))


def pixels(count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """uint8 [N, 12, 8, 3]: blotches of different contrast."""
    random = np.random.default_rng(seed)
    contrast = random.uniform(5, 120, (count, 1, 1, 3))
    noise = random.standard_normal((count, *IMAGE, 3))
    return (128 + contrast * noise).clip(0, 255).astype(np.uint8)


def labelled(runtime: VisionRuntime, count: int, seed: int = 0) -> ImageSet:
    """Images of which the final head is right about four in five."""
    images = list(pixels(count, seed))
    preprocess = Preprocessor(runtime.spec.preprocess, runtime.spec.image_size)
    logits = runtime.model.forward(torch.stack([preprocess(image) for image in images]))
    random = torch.Generator().manual_seed(seed)
    wrong = torch.rand(count, generator=random) < 0.2
    other = torch.randint(CLASSES, (count,), generator=random)
    return ImageSet("random", images, torch.where(wrong, other, logits.argmax(1)))


def opened(path: Path, **shape: Any) -> VisionRuntime:
    """`folder`, loaded."""
    return load_vision(folder(path, **shape))
