"""Kernels of convolutions whose windows do not overlap: rows of a matrix, for any patch size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyruntime.format.convert.checkpoint import Checkpoint
from pyruntime.format.convert.derive import Rows


def patch_rows(weights: Checkpoint, name: str, channels: int, side: int, to_side: int) -> Rows:
    """Rows [channels * to_side²] of the kernel [D, channels, side, side] called `name`.

    Very old checkpoints store it as a matrix, which is read as well.
    """
    flat = len(weights.entries[name].shape) == 2
    lines = 1 if flat else channels * side  # of the file, in one row of ours
    resize = None if to_side == side else resize_matrix(side, to_side)

    def read(start: int, stop: int) -> Tensor:
        rows = weights.rows(name, start * lines, stop * lines).reshape(stop - start, -1)
        if resize is None:
            return rows
        kernels = rows.double().view(stop - start, channels, side * side)
        return (kernels @ resize).float().flatten(1)

    return read


def child_rows(weights: Checkpoint, name: str, width: int) -> Rows:
    """Rows [4 * width] of the kernel [D, width, 2, 2] called `name`: by child, then by channel."""
    lines = 2 * width

    def read(start: int, stop: int) -> Tensor:
        kernels = weights.rows(name, start * lines, stop * lines).view(-1, width, 2, 2)
        return kernels.permute(0, 2, 3, 1).flatten(1)

    return read


def resize_matrix(side: int, to_side: int) -> Tensor:
    """float64 [side², to_side²]: a kernel for patches of `side` pixels times this one fits others.

    FlexiViT's rule (arXiv 2212.08013), as in timm's `resample_patch_embed`: what the new kernel
    says of a patch resized to `to_side` pixels (bicubic, antialias) comes closest to what the old
    one says of the patch itself.
    """
    basis = torch.eye(side * side, dtype=torch.float64).view(-1, 1, side, side)
    resized = F.interpolate(
        basis, (to_side, to_side), mode="bicubic", align_corners=False, antialias=True
    )
    inverse: Tensor = torch.linalg.pinv(resized.view(side * side, to_side * to_side))
    return inverse.T
