"""Layer norm of packed rows."""

from __future__ import annotations

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
