"""SparseMixer (Phi-3.5-MoE, arXiv 2409.12136): two experts, each under a softmax of its own."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.gates.experts.choice import Choice, best, finite
from pyruntime.gates.experts.gate import RouterGate, Step


@dataclass(frozen=True, slots=True, eq=False)
class SparseMixerGate(RouterGate):
    """The two largest logits, each weighted against those within 2 epsilon of it, relatively.

    Attributes:
        epsilon: the checkpoint's router_jitter_noise, in force at inference too.
    """

    epsilon: float = 0.01

    def __post_init__(self) -> None:
        if self.num_experts < 2:
            raise InvalidInput("sparse_mixer: needs two experts to choose from, got 1")

    @property
    def choices(self) -> int:
        return 2

    def choose(self, ops: ModuleType, x: Tensor, step: Step) -> Choice:
        """As `Gate.choose`; slots are ordered by logit, so the second may weigh more."""
        logits = finite(self.router.logits(ops, x))
        first, weight = self._strongest(logits, logits)
        others = logits.scatter(1, first.clamp(min=0), -torch.inf)
        second, other_weight = self._strongest(logits, others)
        ids = torch.cat([first, second], dim=1)
        return Choice(ids, torch.cat([weight, other_weight], dim=1)).cut(step.limits)

    def _strongest(self, logits: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """The best of those left, [N, 1], and its weight; distances are relative to all logits."""
        expert, top = best(left, 1)
        far = (top - logits) / torch.maximum(logits.abs(), top) > 2 * self.epsilon
        near = torch.softmax(left.masked_fill(far, -torch.inf), dim=1)
        return expert, near.gather(1, expert.clamp(min=0)).masked_fill(expert < 0, 0.0)
