"""DSelect-k (arXiv 2106.03760): k selectors that write expert ids in binary."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.gates.experts.choice import Choice, best
from pyruntime.gates.experts.gate import Gate, Step
from pyruntime.gates.experts.logits import Linear
from pyruntime.ops.topk import TopK


def code_length(num_experts: int) -> int:
    """Bits that name one of E experts."""
    return (num_experts - 1).bit_length()


def smooth_step(values: Tensor, gamma: float) -> Tensor:
    """0 below -gamma/2, 1 above gamma/2, a cubic between them."""
    cubic = -2 / gamma**3 * (values * values * values) + 3 / (2 * gamma) * values + 0.5
    low, high = values <= -gamma / 2, values >= gamma / 2
    return torch.where(low, 0.0, torch.where(high, 1.0, cubic))


def mixture(bits: Tensor, shares: Tensor, num_experts: int, gamma: float, hard: bool) -> Tensor:
    """Weight of every expert, float32 [N, E].

    A code that no expert has loses its mass: nothing is renormalized.

    Args:
        bits: float32 [N, k, m], logits of the bits, the most significant first.
        shares: float32 [N, k], what every selector has to give.
        gamma: width of the smooth step.
        hard: a bit is 1 iff its logit is positive.
    """
    steps = (bits > 0).float() if hard else smooth_step(bits, gamma)
    experts = torch.arange(num_experts, device=bits.device)
    places = range(bits.shape[2])
    codes = [(experts >> place) & 1 == 1 for place in reversed(places)]
    total = torch.zeros(len(bits), num_experts, device=bits.device)
    for step, share in zip(steps.unbind(1), shares.unbind(1), strict=True):
        selected = share[:, None]
        for place, code in zip(places, codes, strict=True):
            one = step[:, place, None]
            selected = selected * torch.where(code, one, 1 - one)
        total = total + selected
    return total


@dataclass(frozen=True, slots=True, eq=False)
class DSelectGate(Gate):
    """Per-token selectors: all experts that receive mass, the heaviest first.

    Attributes:
        codes: [k * m, H] with its bias, the bits' logits, selector by selector.
        shares: [k, H] with its bias; a softmax over the selectors.
        num_experts: E.
        gamma: width of the smooth step.
        hard: bits are rounded, so that a token has at most k experts.
    """

    codes: Linear
    shares: Linear
    num_experts: int = field()  # a field, where the base has a property
    gamma: float = 1.0
    hard: bool = False

    def __post_init__(self) -> None:
        expected = self.shares.num_experts * code_length(self.num_experts)
        if self.num_experts < 2 or self.codes.num_experts != expected:
            raise InvalidInput(
                f"dselect_k: {self.shares.num_experts} selectors of {self.num_experts} experts (at "
                f"least 2) need {expected} bits, got {self.codes.num_experts}"
            )

    @property
    def choices(self) -> int:
        """k when hard, else E: every bit that is not saturated doubles a selector's experts."""
        return min(self.num_experts, self.shares.num_experts) if self.hard else self.num_experts

    def choose(self, ops: ModuleType, x: Tensor, step: Step) -> Choice:
        selectors = self.shares.num_experts
        bits = self.codes.logits(ops, x).view(len(x), selectors, code_length(self.num_experts))
        shares = torch.softmax(self.shares.logits(ops, x), dim=1)
        weights = mixture(bits, shares, self.num_experts, self.gamma, self.hard)
        weights = weights.masked_fill(~(weights > 0), -torch.inf)
        plan = ops.plan_topk(weights, TopK(self.choices), limits=step.limits)
        return Choice(plan.choices(), plan.slot_weights())


@dataclass(frozen=True, slots=True, eq=False)
class StaticGate(Gate):
    """The same experts for every token, known at load: the others need not be loaded at all.

    Attributes:
        kept: int64 [K], ids of the experts that receive mass, rising: the plan's segments.
        order: int64 [K], segments, the heaviest first.
        weights: float32 [K], of `order`.
    """

    kept: Tensor
    order: Tensor
    weights: Tensor

    @staticmethod
    def dselect(
        bits: Tensor, shares: Tensor, num_experts: int, gamma: float = 1.0, hard: bool = False
    ) -> StaticGate:
        """DSelect-k whose bits' logits [k, m] and selector logits [k] do not depend on the input.

        Raises:
            InvalidInput: no expert receives mass.
        """
        given = torch.softmax(shares.float(), dim=0)
        weights = mixture(bits.float()[None], given[None], num_experts, gamma, hard)[0]
        kept = torch.nonzero(weights > 0)[:, 0]
        if not len(kept):
            raise InvalidInput(f"dselect_k: no code names one of the {num_experts} experts")
        order, values = best(weights[kept][None], len(kept))
        return StaticGate(kept, order[0], values[0])

    @property
    def num_experts(self) -> int:
        """How many experts are kept."""
        return len(self.kept)

    @property
    def choices(self) -> int:
        """All that are kept."""
        return len(self.kept)

    def choose(self, ops: ModuleType, x: Tensor, step: Step) -> Choice:
        """As `Gate.choose`; the values of x are not read."""
        rows = (len(x), -1)
        choice = Choice(self.order.expand(rows), self.weights.expand(rows).contiguous())
        return choice.cut(step.limits)
