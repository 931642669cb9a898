"""Static channel masks of Gated Compression layers, folded into a feed-forward part.

A reconstruction: the layer's equations are not published in a form we could check (its follow-up,
arXiv 2405.01739, describes what it does). Here a compression gate is y = m * x with a mask m that
training pushed to 0 and 1. Behind an activation such a mask is no work at all: a channel that is
always zero needs neither the row that makes it nor the column that reads it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyruntime.errors import ConversionError


def fold_channel_mask(
    mask: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The parts of x -> down(mask * act(up(x) + up_bias)) that run, for any act of one channel.

    Args:
        mask: bool [H], the channels that pass.
        up: [H, D]; up_bias: [H] or None; down: [O, H].

    Returns:
        up [K, D], up_bias [K] and down [O, K] of the K channels that pass.

    Raises:
        ConversionError: another dtype or shape, or a mask that passes nothing.
    """
    if mask.dtype != torch.bool or mask.dim() != 1:
        raise ConversionError(f"mask: is {mask.dtype} {list(mask.shape)}, expected bool [channels]")
    (channels,) = mask.shape
    given = {"up": (up, 0, 2), "down": (down, 1, 2)}
    if up_bias is not None:
        given["up_bias"] = (up_bias, 0, 1)
    for name, (tensor, axis, rank) in given.items():
        if tensor.dim() != rank or tensor.shape[axis] != channels:
            raise ConversionError(
                f"{name}: is {list(tensor.shape)}, expected {channels} channels on axis {axis} "
                f"of {rank}"
            )
    if not mask.any():
        raise ConversionError("mask: passes no channel; leave out the whole part instead")
    return up[mask], None if up_bias is None else up_bias[mask], down[:, mask]
