"""Expert choice (arXiv 2202.09368): experts choose tokens; for encoders only."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.gates.experts.choice import Choice, best, occurrence, probabilities, refuse_limits
from pyruntime.gates.experts.gate import RouterGate, Step


@dataclass(frozen=True, slots=True, eq=False)
class ExpertChoiceGate(RouterGate):
    """Every expert takes the floor(k T / E) most probable of the T tokens of a sequence.

    Weights are probabilities of the softmax over experts; slot e is expert e, and a token has
    between none and all of them.

    Attributes:
        k: experts per token on average.
    """

    k: int

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.num_experts:
            raise InvalidInput(
                f"expert_choice: k must lie in [1, {self.num_experts}], got {self.k}"
            )

    @property
    def choices(self) -> int:
        return self.router.num_experts

    @property
    def causal(self) -> bool:
        """No: later tokens of a sequence push earlier ones out."""
        return False

    @property
    def batch_invariant(self) -> bool:
        """No: a token's experts depend on its sequence (on that alone)."""
        return False

    def choose(self, ops: ModuleType, x: Tensor, step: Step) -> Choice:
        """As `Gate.choose`; without sequences all rows are one."""
        refuse_limits("expert_choice", step.limits)
        rows, experts = len(x), self.num_experts
        weights = probabilities(self.router.logits(ops, x))
        wanted, _ = best(weights.T, rows)  # [E, N]: rows by weight, -1 for those that are NaN
        sequences = torch.zeros(rows, dtype=torch.int64, device=x.device)
        if step.sequences is not None:
            _, sequences = torch.unique(step.sequences, return_inverse=True)
        takes = sequences.bincount() * self.k // experts
        sequence = sequences[wanted.clamp(min=0)]
        expert = torch.arange(experts, device=x.device)[:, None].expand_as(wanted)
        earlier = occurrence((expert * len(takes) + sequence).flatten()).view(experts, rows)
        taken = (wanted >= 0) & (earlier < takes[sequence])
        ids = torch.full((rows, experts), -1, dtype=torch.int64, device=x.device)
        ids[wanted[taken], expert[taken]] = expert[taken]
        return Choice(ids, weights)
