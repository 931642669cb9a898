"""Hash layers (arXiv 2106.04426): a fixed table from input tokens to experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.gates.experts.choice import Choice, refuse_limits, weighted
from pyruntime.gates.experts.gate import Gate, Step
from pyruntime.gates.experts.logits import Router
from pyruntime.ops.topk import TopK


@dataclass(frozen=True, slots=True, eq=False)
class HashGate(Gate):
    """Experts of a row from its token; weights are 1, or a learned router's (DeepSeek-V4).

    Attributes:
        table: integer [vocabulary] or [vocabulary, k], experts of every token.
        num_experts: E.
        router: None for weights of 1. Else they are sqrt(softplus(logit)) of the table's experts,
            divided by their sum plus 1e-20, times `scale`, the best first.
        scale: DeepSeek's routed_scaling_factor.
    """

    table: Tensor
    num_experts: int = field()  # a field, where the base has a property
    router: Router | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.table.dim() not in (1, 2) or self.table.is_floating_point():
            raise InvalidInput(
                f"hash: table must be integer [vocabulary] or [vocabulary, k], got "
                f"{self.table.dtype} {list(self.table.shape)}"
            )
        if self.table.numel() and not (
            0 <= int(self.table.min()) <= int(self.table.max()) < self.num_experts
        ):
            raise InvalidInput(f"hash: the table's experts must lie in [0, {self.num_experts})")
        if self.router is not None and self.router.num_experts != self.num_experts:
            raise InvalidInput(
                f"hash: the router has {self.router.num_experts} experts, not {self.num_experts}"
            )

    @property
    def choices(self) -> int:
        """k of the table."""
        return 1 if self.table.dim() == 1 else self.table.shape[1]

    def choose(self, ops: ModuleType, x: Tensor, step: Step) -> Choice:
        """As `Gate.choose`; needs the step's tokens."""
        tokens = step.tokens
        if tokens is None:
            raise InvalidInput("hash: experts are looked up by token, and no tokens were given")
        size = len(self.table)
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
            raise InvalidInput(f"hash: tokens must lie in [0, {size}), the table's vocabulary")
        ids = self.table[tokens].view(-1, self.choices)
        if self.router is None:
            refuse_limits("hash", step.limits)
            return Choice(ids, torch.ones(ids.shape, device=x.device))
        logits = self.router.logits(ops, x).gather(1, ids.long())
        rule = TopK(self.choices, "sqrt_softplus", normalize=True, epsilon=1e-20, scale=self.scale)
        return weighted(ops, ids, logits, rule, step.limits)
