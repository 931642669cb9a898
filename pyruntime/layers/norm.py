"""Norms: layer norm, and the one of a decoder, which may be a root-mean-square norm."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor


class LayerNorm(NamedTuple):
    """Weight and bias float32 [H], and what is added to the variance."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(
        self,
        ops: ModuleType,
        x: Tensor,
        rows: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Norm of x [N, H], or of its `rows` int32 [R] alone, in `out_dtype` (x's by default)."""
        normed: Tensor = ops.layer_norm(
            x, self.weight, self.bias, self.eps, rows=rows, out_dtype=out_dtype
        )
        return normed


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """The norm of a residual branch, which may read a gate's score on the way.

    Attributes:
        weight: float32 [d].
        eps: added to the variance.
        bias: float32 [d] of a layer norm; None is a root-mean-square norm.
    """

    weight: Tensor
    eps: float
    bias: Tensor | None = None

    def __call__(
        self, ops: ModuleType, x: Tensor, probe: Tensor | None = None, probe_bias: float = 0.0
    ) -> tuple[Tensor, Tensor | None]:
        """Norm of x [N, d] in x's dtype, and what `probe` reads from it; see `ops.rms_norm`."""
        if self.bias is None:
            normed, scores = ops.rms_norm(x, self.weight, self.eps, probe, probe_bias)
            return normed, scores
        return LayerNorm(self.weight, self.bias, self.eps)(ops, x), None
