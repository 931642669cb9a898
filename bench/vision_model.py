"""Random vision transformers of real sizes with random exits: they serve for speed only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pyruntime.format.load import Container
from pyruntime.format.manifest import Manifest
from pyruntime.format.spec import ExitSpec, Preprocess, ScaleSpec, VisionSpec, vision_tensors
from pyruntime.ops.weight import Weight

SHAPES: dict[str, dict[str, Any]] = {
    "ViT-S/16": {"stem": "patch", "hidden_size": 384, "num_layers": 12, "num_heads": 6,
                 "mlp_size": 1536, "norm_eps": 1e-6},
    "T2T-ViT-7": {"stem": "t2t", "hidden_size": 256, "num_layers": 7, "num_heads": 4,
                  "mlp_size": 512, "norm_eps": 1e-5, "qkv_bias": False},
    "T2T-ViT-14": {"stem": "t2t", "hidden_size": 384, "num_layers": 14, "num_heads": 6,
                   "mlp_size": 1152, "norm_eps": 1e-5, "qkv_bias": False},
}  # fmt: skip
# Relative numbers of images that leave at each of G exits and at the end, by their place in 0 .. 1.
DISTRIBUTIONS = {
    "uniform": lambda place: 1.0,
    "last third heavy": lambda place: 4.0 if place > 2 / 3 else 0.5,
    "first heavy": lambda place: 4.0 if place < 1 / 3 else 0.5,
}


def container(
    name: str,
    dtype: Literal["float32", "bfloat16"],
    exits: bool = True,
    image_size: int = 224,
    classes: int = 1000,
    scales: ScaleSpec | None = None,
) -> Container:
    """A model folder that never was on a disk: random weights, an exit after every block."""
    shape = SHAPES[name]
    after = range(shape["num_layers"] - 1) if exits else ()
    spec = VisionSpec(
        source_family="random", image_size=(image_size, image_size), patch_size=16,
        num_classes=classes, prefix_tokens=1, preprocess=Preprocess((0.5,) * 3, (0.5,) * 3),
        exits=tuple(ExitSpec(block, "jei_dnn", 1.0) for block in after), scales=scales,
        dtype=dtype, **shape,
    )  # fmt: skip
    random = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor | Weight] = {}
    for tensor in vision_tensors(spec):
        if tensor.layout == "panel":
            dense = torch.randn(tensor.shape, generator=random) * tensor.shape[-1] ** -0.5
            tensors[tensor.name] = Weight.pack(dense.to(getattr(torch, tensor.dtype)))
        elif "norm" in tensor.name and tensor.name.endswith("weight"):
            tensors[tensor.name] = torch.ones(tensor.shape)
        else:
            tensors[tensor.name] = torch.randn(tensor.shape, generator=random) * 0.02
    manifest = Manifest(spec, None, None, {}, {}, {})
    return Container(Path(name), spec, None, None, tensors, manifest)


def images(count: int, image_size: int = 224) -> Tensor:
    """Normalised noise, float32 [B, 3, H, W]."""
    random = torch.Generator().manual_seed(2)
    return torch.randn(count, 3, image_size, image_size, generator=random)


def levels(distribution: str, count: int, exits: int) -> list[int]:
    """Where each of `count` images leaves, shuffled; G is the final head. Exact to rounding."""
    if distribution == "none":
        return [exits] * count
    weigh = DISTRIBUTIONS[distribution]
    shares = torch.tensor([weigh(level / exits) for level in range(exits + 1)]).cumsum(0)
    middles = (torch.arange(count) + 0.5) / count * shares[-1]
    found = torch.searchsorted(shares, middles)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(3))
    return [int(level) for level in found[order]]


def survivors(found: Sequence[int], exits: int) -> list[int]:
    """Images that run each stage, [G + 1]."""
    return [sum(level >= stage for level in found) for stage in range(exits + 1)]
