"""Gates over neighbouring groups of experts: the best of every group, or the best group."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.gates.experts.choice import Choice, best, probabilities, refuse_limits
from pyruntime.gates.experts.gate import RouterGate, Step
from pyruntime.ops.topk import TopK


@dataclass(frozen=True, slots=True, eq=False)
class HierarchicalGate(RouterGate):
    """SAM, Switch and Mixture (HetuMoE), as it was meant: the best k of the best group.

    A group (a device) is worth the sum of its probabilities. Weights are those of the softmax over
    all E, not renormalized.

    Attributes:
        groups: of E / groups neighbouring experts.
        k: experts of a token.
    """

    groups: int
    k: int

    def __post_init__(self) -> None:
        if self.groups < 1 or self.num_experts % self.groups:
            raise InvalidInput(f"sam: {self.num_experts} experts do not form {self.groups} groups")
        if not 1 <= self.k <= self.num_experts // self.groups:
            raise InvalidInput(
                f"sam: k must lie in [1, {self.num_experts // self.groups}], the experts of one "
                f"group, got {self.k}"
            )

    @property
    def choices(self) -> int:
        return self.k

    def choose(self, ops: ModuleType, x: Tensor, step: Step) -> Choice:
        scores = probabilities(self.router.logits(ops, x))
        shares = scores.clamp(min=0.0).view(-1, self.groups, self.num_experts // self.groups)
        group, _ = best(shares.sum(2), 1)
        home = torch.arange(self.num_experts, device=x.device) // shares.shape[2]
        scores = torch.where(home == group, scores, -torch.inf)
        plan = ops.plan_topk(scores, TopK(self.k), limits=step.limits)
        return Choice(plan.choices(), plan.slot_weights())


@dataclass(frozen=True, slots=True, eq=False)
class PrototypeGate(RouterGate):
    """kTop1 (M6-T, arXiv 2105.15082): slot i holds the best of the i-th of k groups of experts.

    Every prototype has a softmax of its own; weights are its probabilities.
    """

    prototypes: int

    def __post_init__(self) -> None:
        if self.prototypes < 1 or self.num_experts % self.prototypes:
            raise InvalidInput(
                f"ktop1: {self.num_experts} experts do not form {self.prototypes} prototypes"
            )

    @property
    def choices(self) -> int:
        return self.prototypes

    def choose(self, ops: ModuleType, x: Tensor, step: Step) -> Choice:
        """As `Gate.choose`; limits are refused, for no prototype is better than another."""
        refuse_limits("ktop1", step.limits)
        size = self.num_experts // self.prototypes
        logits = self.router.logits(ops, x).view(-1, size)
        plan = ops.plan_topk(logits, TopK(1, "softmax"))
        local = plan.choices().view(-1, self.prototypes)
        first = torch.arange(0, self.num_experts, size, device=local.device)
        ids = torch.where(local >= 0, local + first, -1)
        return Choice(ids, plan.slot_weights().view(-1, self.prototypes))
