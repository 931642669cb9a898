"""BASE layers (arXiv 2103.16716): the nearest centroid, or the auction they train with."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.gates.experts.choice import Choice, best, weighted
from pyruntime.gates.experts.gate import RouterGate, Step
from pyruntime.gates.experts.logits import Linear
from pyruntime.gates.experts.topk import TopKGate, sigmoid_of_chosen
from pyruntime.ops.topk import TopK
from pyruntime.ops.weight import Weight

ROUNDS = 100  # after which bidding settles for less than the best


def base_greedy(centroids: Weight) -> TopKGate:
    """BASE layers at inference (fairseq base_layer.py): the nearest centroid, nothing dropped.

    The weight is alpha = sigmoid(h . c); the layer returns alpha f(h) + (1 - alpha) h.

    Args:
        centroids: [E, H].
    """
    return sigmoid_of_chosen(Linear(centroids), 1, weights_input=False)


def balanced_assignment(scores: Tensor) -> Tensor:
    """Tokens of every expert, int64 [E, T / E], the best first (fairseq balanced_assignment.cpp).

    Args:
        scores: float32 [T, E]; a score that is not finite counts as the smallest one that is.

    Raises:
        InvalidInput: T is no multiple of E.
    """
    tokens, experts = scores.shape
    if tokens % experts:
        raise InvalidInput(f"auction: {tokens} tokens cannot be shared equally by {experts}")
    share = tokens // experts
    if experts == 1 or tokens == 0:
        return torch.arange(tokens, device=scores.device).view(experts, share)
    known = scores.isfinite()
    lowest = torch.where(known, scores, torch.inf).min()
    # Above the lowest: a price is small beside large scores, and would be lost to their rounding.
    scores = torch.where(known, scores - lowest, 0.0).T.contiguous()
    highest = scores.max()
    epsilon = (highest / 50).clamp(min=1e-4)
    cost = torch.zeros(tokens, device=scores.device)
    value, won, turn = scores, None, 0
    while True:
        wanted, worth = best(value, share + 1)
        bids = torch.zeros_like(scores)
        bids.scatter_(1, wanted[:, :share], worth[:, :share] - worth[:, share:] + epsilon)
        if won is not None and turn < ROUNDS:
            bids = torch.where(won, epsilon, bids)  # kept unless somebody bids more this time
        price, winner = bids.max(dim=0)
        sold = price > 0
        if bool(sold.all()):
            return wanted[:, :share]
        cost = cost + price
        won = (torch.arange(experts, device=scores.device)[:, None] == winner) & sold
        value = torch.where(won, highest if turn < ROUNDS else scores, scores - cost)
        turn += 1


@dataclass(frozen=True, slots=True, eq=False)
class AuctionGate(RouterGate):
    """The assignment BASE layers train with: every expert takes exactly T / E of T tokens.

    A token's expert depends on the whole batch: at inference use `base_greedy`.
    The router holds the centroids; the weight is alpha = sigmoid(h . c), as in `base_greedy`.
    """

    @property
    def choices(self) -> int:
        return 1

    @property
    def causal(self) -> bool:
        """No: later tokens bid too."""
        return False

    @property
    def batch_invariant(self) -> bool:
        """No: all tokens of a call share the experts."""
        return False

    def choose(self, ops: ModuleType, x: Tensor, step: Step) -> Choice:
        """As `Gate.choose`; limits leave the one slot alone."""
        scores = self.router.logits(ops, x)
        assigned = balanced_assignment(scores)
        ids = torch.empty(len(x), 1, dtype=torch.int64, device=x.device)
        owners = torch.arange(self.num_experts, device=x.device)[:, None]
        ids[assigned.flatten(), 0] = owners.expand_as(assigned).flatten()
        return weighted(ops, ids, scores.gather(1, ids), TopK(1, "sigmoid"), step.limits)
