"""Norms and the vector gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyruntime.errors import InvalidInput


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
    epilogue: str = "none",
) -> Tensor:
    """Centred norm of x [N, H], computed in float32 and rounded once (Ba et al. 2016).

    Args:
        weight, bias: float32 [H].
        eps: added to the variance, which is the mean square of the differences from the mean.
        rows: int32 [R] in [0, N): only these rows of x, in this order (the class rows before a
            head); None for all.
        out_dtype: of the result, x's by default.
        epilogue: none, or gelu (erf) of the norm.

    Returns:
        [N, H], or [R, H] with ``rows``.

    Raises:
        InvalidInput: unknown epilogue.
    """
    if epilogue not in ("none", "gelu"):
        raise InvalidInput(f"layer_norm: epilogue must be none or gelu, got {epilogue!r}")
    wide = (x if rows is None else x[rows.long()]).float()
    normed = F.layer_norm(wide, weight.shape, weight, bias, eps)
    return (F.gelu(normed) if epilogue == "gelu" else normed).to(out_dtype or x.dtype)


def gate(logits: Tensor) -> Tensor:
    """Sigmoid of float32 [N, H] in place (mutated); returns the mean of every row, float32 [N]."""
    return logits.sigmoid_().mean(1)
