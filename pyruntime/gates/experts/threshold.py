"""Dense to sparse (EvoMoE, arXiv 2112.14397): every expert above a probability."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.gates.experts.choice import Choice
from pyruntime.gates.experts.gate import RouterGate, Step
from pyruntime.ops.topk import TopK


@dataclass(frozen=True, slots=True, eq=False)
class ThresholdGate(RouterGate):
    """All experts with softmax(logits) > threshold, and the best one always; weights as they are.

    EvoMoE's softmax(log p / t) is the softmax of logits / t: fold t into the router
    (`fold_temperature`). Its Gumbel noise and its capacity are for training.
    """

    threshold: float = 0.02

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold < 1.0:
            raise InvalidInput(f"dts: threshold must lie in [0, 1), got {self.threshold}")

    @property
    def choices(self) -> int:
        """As many as can pass: probabilities sum to 1, up to their rounding."""
        if self.threshold * self.num_experts <= 1.0:
            return self.num_experts
        return min(self.num_experts, math.floor(1.0 / self.threshold) + 1)

    def choose(self, ops: ModuleType, x: Tensor, step: Step) -> Choice:
        """As `Gate.choose`; limits cut what passed the threshold."""
        plan = ops.plan_topk(self.router.logits(ops, x), TopK(self.choices, "softmax"))
        weights = plan.slot_weights()
        below = weights <= self.threshold
        below[:, 0] = False
        return Choice(plan.choices().masked_fill(below, -1), weights).cut(step.limits)
