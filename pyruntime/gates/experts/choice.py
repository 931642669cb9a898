"""Choosing: the one tie rule of the package, and what limits leave of a choice."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.ops.topk import TopK


class Choice(NamedTuple):
    """Experts of N rows.

    Attributes:
        ids: integer [N, K], -1 where a slot is not used.
        weights: float32 [N, K], of no meaning where it is not.
    """

    ids: Tensor
    weights: Tensor

    def cut(self, limits: Tensor | None) -> Choice:
        """The first slots of every row that its limits allow; for slots in order, best first.

        Args:
            limits: float32 [N, 3] or None. A row stops after the first slot n with
                n >= limits[:, 0], w_n - w_(n+1) > limits[:, 1] or
                (w_1 + ... + w_n) / (w_1 + ... + w_K) >= limits[:, 2]. (K, inf, inf) is no limit.
        """
        if limits is None:
            return self
        slots, gap, mass = limits.split(1, dim=1)
        weights = torch.where(self.ids >= 0, self.weights, 0.0)
        total = weights.cumsum(1)
        number = torch.arange(1, weights.shape[1] + 1, device=weights.device)
        drops = F.pad(weights[:, :-1] - weights[:, 1:] > gap, (0, 1))
        stops = (number >= slots) | drops | (total / total[:, -1:] >= mass)
        stopped = stops.int().cumsum(1) - stops.int() > 0
        return Choice(self.ids.masked_fill(stopped, -1), self.weights)


def best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest scores of every row: higher first, then LOWER id; NaN counts as -inf.

    Args:
        scores: float [N, M], k <= M.

    Returns:
        ids int64 [N, k], -1 where only -inf was left, and their scores [N, k].
    """
    ranked = finite(scores).sort(dim=1, descending=True, stable=True)
    values = ranked.values[:, :k]
    return ranked.indices[:, :k].masked_fill(values == -torch.inf, -1), values


def finite(scores: Tensor) -> Tensor:
    """The scores with -inf for NaN: what cannot be compared is never chosen."""
    return scores.masked_fill(scores.isnan(), -torch.inf)


def probabilities(logits: Tensor) -> Tensor:
    """Softmax over all experts, float32 [N, E], -inf for those that must not be chosen."""
    known = finite(logits)
    return finite(torch.softmax(known, dim=1)).masked_fill(known == -torch.inf, -torch.inf)


def weighted(
    ops: ModuleType, ids: Tensor, logits: Tensor, rule: TopK, limits: Tensor | None
) -> Choice:
    """Experts that are chosen already, weighted by a rule over their logits alone.

    The op, not torch, computes the scores: torch's exp of an element depends on where it lies in
    the tensor, and so on the other rows.

    Args:
        ids: integer [N, K], -1 for none.
        logits: float32 [N, K].
        rule: with k = K; it puts the best slot first.
    """
    unused = ids < 0
    plan = ops.plan_topk(logits.masked_fill(unused, -torch.inf), rule, None, limits)
    slots = plan.choices().long()
    found = ids.gather(1, slots.clamp(min=0)).masked_fill(slots < 0, -1)
    return Choice(found, plan.slot_weights())


def slot_sum(weights: Tensor) -> Tensor:
    """Sums of float32 [N, K], added in slot order, [N]."""
    total = torch.zeros_like(weights[:, 0])
    for slot in weights.unbind(1):
        total = total + slot
    return total


def occurrence(labels: Tensor) -> Tensor:
    """How many earlier entries of int64 [M] carry the same label (all >= 0), int64 [M]."""
    order = labels.argsort(stable=True)
    sizes = labels.bincount()
    first = sizes.cumsum(0) - sizes
    count = torch.empty_like(labels)
    count[order] = torch.arange(labels.numel(), device=labels.device) - first[labels[order]]
    return count


def refuse_limits(gate: str, limits: Tensor | None) -> None:
    """Refuse limits where a row's slots have no order to cut.

    Raises:
        InvalidInput: limits were given.
    """
    if limits is not None:
        raise InvalidInput(
            f"{gate}: compute limits need slots that are ordered best first, this gate's are not"
        )
