"""Norms and the vector gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, probe: Tensor | None = None, probe_bias: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """Root-mean-square norm of x [N, H], computed in float32 and rounded once.

    Args:
        weight: float32 [H].
        probe: float32 [H]: the second result is ``sigmoid(out @ probe + probe_bias)``, float32
            [N]: a scalar gate at no extra pass. It reads the rounded row, as a gate after the norm
            would.
    """
    wide = x.float()
    out = (wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + eps) * weight).to(x.dtype)
    return out, None if probe is None else torch.sigmoid(out.float() @ probe + probe_bias)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    rows: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Centred norm of x [N, H], computed in float32 and rounded once (Ba et al. 2016).

    Args:
        weight, bias: float32 [H].
        eps: added to the variance, which is the mean square of the differences from the mean.
        rows: int32 [R] in [0, N): only these rows of x, in this order (the class rows before a
            head); None for all.
        out_dtype: of the result, x's by default.

    Returns:
        [N, H], or [R, H] with ``rows``.
    """
    wide = (x if rows is None else x[rows.long()]).float()
    return F.layer_norm(wide, weight.shape, weight, bias, eps).to(out_dtype or x.dtype)


def gate(logits: Tensor) -> Tensor:
    """Sigmoid of float32 [N, H] in place (mutated); returns the mean of every row, float32 [N]."""
    return logits.sigmoid_().mean(1)
