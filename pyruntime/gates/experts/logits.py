"""Router logits: hidden states to one float32 score per expert."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.ops.weight import Weight


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """x W^T + b, accumulated in float32.

    Attributes:
        weight: one matrix [E, H].
        bias: float32 [E] or None.
    """

    weight: Weight
    bias: Tensor | None = None

    @property
    def num_experts(self) -> int:
        return self.weight.out_features

    def logits(self, ops: ModuleType, x: Tensor) -> Tensor:
        """float32 [N, E] of x [N, H]; a float32 matrix reads x as float32 (DeepSeek)."""
        if self.weight.dtype == torch.float32:
            x = x.float()
        found: Tensor = ops.segment_matmul(x, self.weight, bias=self.bias, out_dtype=torch.float32)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Cosine:
    """Cosine of a projection of x and of one direction per expert (Tutel's CosineTopKGate).

    Attributes:
        projection: to [P] channels.
        directions: float32 [E, P], unit rows times the learned scale: see `of`.
    """

    projection: Linear
    directions: Linear

    @staticmethod
    def of(projection: Linear, similarity: Tensor, temperature: float = math.log(2.0)) -> Cosine:
        """From what a checkpoint holds: similarity [P, E] and the logarithm of the scale."""
        scale = math.exp(min(temperature, math.log(100.0)))
        rows = F.normalize(similarity.float(), dim=0).T * scale
        return Cosine(projection, Linear(Weight.pack(rows.contiguous())))

    @property
    def num_experts(self) -> int:
        return self.directions.num_experts

    def logits(self, ops: ModuleType, x: Tensor) -> Tensor:
        """float32 [N, E] of x [N, H]."""
        return self.directions.logits(ops, F.normalize(self.projection.logits(ops, x), dim=1))


Router = Linear | Cosine


def fold_temperature(
    weight: Tensor, bias: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor | None]:
    """Router matrix [E, H] and bias [E] of softmax(z / temperature), float32, to pack at load.

    Raises:
        InvalidInput: a temperature that is not positive would change the choice.
    """
    if not 0.0 < temperature < math.inf:
        raise InvalidInput(f"temperature must be positive and finite, got {temperature}")
    return weight.float() / temperature, None if bias is None else bias.float() / temperature
