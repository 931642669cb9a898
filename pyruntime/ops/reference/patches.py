"""Images as rows of patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyruntime.errors import InvalidInput


def patches(
    images: Tensor,
    size: int,
    stride: int,
    padding: int = 0,
    *,
    channels_last: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """What a convolution of these square kernels reads: one row for each place it stops at.

    Rows are image by image and in raster order, their columns in the order (C, y, x) of a
    ``Conv2d`` kernel and of ``torch.nn.Unfold``: the convolution is one `segment_matmul`.

    Args:
        images: [B, C, H, W], float32 or bfloat16; or a map of tokens [B, H, W, C].
        size, stride, padding: of the kernel, in pixels; outside of the image is 0.
        channels_last: ``images`` is a map of tokens.
        out_dtype: of the result, that of ``images`` by default.

    Returns:
        [B * down * across, C * size * size] with down = (H + 2 * padding - size) // stride + 1.

    Raises:
        InvalidInput: a size, stride or padding that is none, or a kernel larger than the image.
    """
    count, channels, down, across = grid(images, size, stride, padding, channels_last)
    maps = images.permute(0, 3, 1, 2) if channels_last else images
    maps = F.pad(maps, (padding, padding, padding, padding))
    windows = maps.unfold(2, size, stride).unfold(3, size, stride)  # [B, C, down, across, y, x]
    rows = windows.permute(0, 2, 3, 1, 4, 5).reshape(count * down * across, channels * size * size)
    return rows.to(out_dtype or images.dtype).contiguous()


def grid(
    images: Tensor, size: int, stride: int, padding: int, channels_last: bool
) -> tuple[int, int, int, int]:
    """(B, C, down, across) of what `patches` makes of these images.

    Raises:
        InvalidInput: see `patches`.
    """
    if images.dim() != 4:
        raise InvalidInput(f"patches: images must be of rank 4, got {list(images.shape)}")
    count, *rest = images.shape
    height, width, channels = rest if channels_last else (*rest[1:], rest[0])
    if size < 1 or stride < 1 or padding < 0 or size > min(height, width) + 2 * padding:
        raise InvalidInput(
            f"patches: size and stride must be at least 1, padding at least 0 and size at most "
            f"that of the padded image, got size={size}, stride={stride}, padding={padding} for "
            f"{height} x {width}"
        )
    down = (height + 2 * padding - size) // stride + 1
    across = (width + 2 * padding - size) // stride + 1
    return count, channels, down, across
