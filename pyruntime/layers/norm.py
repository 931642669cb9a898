"""Norms: root-mean-square, or centred with a bias (layer norm)."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """One norm.

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
        return ops.layer_norm(x, self.weight, self.bias, self.eps), None
