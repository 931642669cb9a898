"""Images to tokens: one linear layer over square patches."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from pyruntime.layers.residual import Linear


@dataclass(frozen=True, slots=True, eq=False)
class PatchEmbed:
    """A convolution whose stride is its size.

    Attributes:
        project: [D, C * size * size], in the order of a convolution's kernel.
        size: of a patch, in pixels.
    """

    project: Linear
    size: int

    def rows_of(self, height: int, width: int) -> int:
        """Rows of the largest matrix that one image needs."""
        return (height // self.size) * (width // self.size)

    def __call__(self, ops: ModuleType, images: Tensor) -> Tensor:
        """Tokens of images float32 [B, C, H, W], float32 [B * N, D], raster by raster."""
        weight, bias = self.project
        rows = ops.patches(images, self.size, self.size, 0, out_dtype=weight.dtype)
        tokens: Tensor = ops.segment_matmul(rows, weight, bias=bias, out_dtype=torch.float32)
        return tokens
