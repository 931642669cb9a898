"""GateSkip's residual gate: one sigmoid value per channel, or per token, of every branch.

Rule: arXiv 2510.13876 and its code. The gate reads the branch's normalised input, multiplies the
branch's output, and its mean over channels ranks the token. All of it in float32: gates sit near
0.99, where bfloat16 cannot tell tokens apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.ops.weight import Weight


class GateValue(NamedTuple):
    """What a gate says about N rows.

    Attributes:
        scores: float32 [N], importance.
        channels: float32 [N, d] multipliers of the branch output, or None: `scores` multiplies it
            (scalar gates), unless the gate only ranks.
    """

    scores: Tensor
    channels: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class TokenGate:
    """Weights of one gate.

    Attributes:
        probe: float32 [d] of a scalar gate, evaluated inside the norm that feeds it.
        probe_bias: its bias.
        weight, bias: [d, d] and float32 [d] of a vector gate; second layer of an MLP gate, whose
            weight is float32 whatever the model's dtype (as is what it multiplies).
        up, up_bias: first layer of an MLP gate.
        multiplies: False for gates that only rank tokens.
        entry: the branch input is multiplied by the gate as well.
    """

    probe: Tensor | None = None
    probe_bias: float = 0.0
    weight: Weight | None = None
    bias: Tensor | None = None
    up: Weight | None = None
    up_bias: Tensor | None = None
    multiplies: bool = True
    entry: bool = False

    @property
    def weighted(self) -> bool:
        """Whether the combine weight of a row is its score: one multiplier per token."""
        return self.multiplies and self.is_scalar

    @property
    def is_scalar(self) -> bool:
        """One value per token."""
        return self.weight is None or self.weight.out_features == 1

    def evaluate(self, ops: ModuleType, x: Tensor, scores: Tensor | None) -> GateValue:
        """The gate of rows x [N, d]; `scores` float32 [N] if the norm has run the probe."""
        if scores is not None:
            return GateValue(scores, None)
        if self.weight is None:
            raise InvalidInput("gate: a gate without a weight needs the scores of its probe")
        if self.up is not None:
            inner = ops.segment_matmul(x, self.up, bias=self.up_bias, out_dtype=torch.float32)
            x = inner.relu_()  # stays float32: rounded, it would no longer rank the tokens right
        values = ops.segment_matmul(x, self.weight, bias=self.bias, out_dtype=torch.float32)
        scores = ops.gate(values)
        channels = None if self.is_scalar or not self.multiplies else values
        return GateValue(scores, channels)

    def scale_input(self, x: Tensor, value: GateValue) -> Tensor:
        """The branch input of an entry gate: x times the gate, in x's dtype."""
        factor = value.scores[:, None] if value.channels is None else value.channels
        return (x.float() * factor).to(x.dtype)
