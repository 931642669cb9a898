"""Expert capacity: how many choices an expert takes, and which it drops. Off unless asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, cast

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.gates.experts.choice import Choice, occurrence, slot_sum
from pyruntime.gates.experts.gate import Gate, Step

# (tokens of a group, choices of its busiest expert) -> C
Formula = Callable[[int, int], int]


def switch_capacity(experts: int, factor: float) -> Formula:
    """Switch Transformers: (tokens / E) * factor."""
    return lambda tokens, busiest: int(tokens / experts * factor)


def hetu_capacity(experts: int, k: int, factor: float) -> Formula:
    """HetuMoE: k * ceil(tokens / E * factor)."""
    return lambda tokens, busiest: k * math.ceil(tokens / experts * factor)


def tutel_capacity(experts: int, k: int, factor: float, alignment: int = 1) -> Formula:
    """Tutel (fast_dispatch.py): factor 0 drops nothing, a negative one only bounds that."""

    def formula(tokens: int, busiest: int) -> int:
        bound = k * int(abs(factor) * -(-tokens // experts))
        size = bound if factor > 0 else busiest if factor == 0 else min(busiest, bound)
        size = -(-size // alignment) * alignment
        return size if size <= 256 else -(-size // 128) * 128

    return formula


def megablocks_capacity(experts: int, k: int, factor: float) -> Formula:
    """MegaBlocks on one device: factor * k * tokens / E; 0 drops nothing."""
    return lambda tokens, busiest: int(factor * k * tokens / experts) if factor else busiest


@dataclass(frozen=True, slots=True)
class Capacity:
    """A bound on the choices of every expert, within groups of tokens.

    Attributes:
        limit: C, or a formula that gives it for every group.
        group: whose choices compete: those of the whole call, of a sequence (transformers' Switch),
            or of so many consecutive rows.
        priority: ``slot_major``: all first choices come before any second one (GShard, Tutel);
            ``token_major``: all choices of a token before the next token's (MegaBlocks). Choices
            that are dropped take up their place all the same.
        prioritized: tokens come in falling order of their first weight (V-MoE's batch-prioritized
            routing) instead of in order; meant for weights that are probabilities.
    """

    limit: int | Formula
    group: int | Literal["call", "sequence"] = "call"
    priority: Literal["slot_major", "token_major"] = "slot_major"
    prioritized: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.limit, int) and self.limit < 0:
            raise InvalidInput(f"capacity: limit must not be negative, got {self.limit}")
        if isinstance(self.group, int) and self.group < 1:
            raise InvalidInput(f"capacity: a group needs at least one row, got {self.group}")
        if self.group not in ("call", "sequence") and not isinstance(self.group, int):
            raise InvalidInput(f"capacity: group must be call, sequence or int, is {self.group!r}")
        if self.priority not in ("slot_major", "token_major"):
            raise InvalidInput(
                f"capacity: priority must be slot_major or token_major, got {self.priority!r}"
            )

    def locations(self, ids: Tensor, groups: Tensor, importance: Tensor | None = None) -> Tensor:
        """Choices of the same expert and group that come first, int64 [N, K].

        Args:
            ids: integer [N, K]; -1 takes no place (and its location has no meaning).
            groups: int64 [N].
            importance: float32 [N], or None for rows in order.
        """
        rows, slots = ids.shape
        order = torch.arange(rows, device=ids.device)
        if importance is not None:
            order = importance.argsort(descending=True, stable=True)
        places = order[:, None] * slots + torch.arange(slots, device=ids.device)
        if self.priority == "slot_major":
            places = places.T
        places = places.flatten()
        # The unused slots of a group are an expert of their own, number 0.
        experts = ids.amax() + 2 if ids.numel() else 1
        labels = (groups[:, None] * experts + ids + 1).flatten()
        found = torch.empty_like(labels)
        found[places] = occurrence(labels[places])
        return found.view(rows, slots)

    def drop(self, ids: Tensor, sequences: Tensor | None, importance: Tensor) -> Tensor:
        """Ids [N, K] with -1 where an expert of a group already has its capacity.

        Raises:
            InvalidInput: capacity goes by sequences, and none were given.
        """
        groups = self._groups(ids, sequences)
        location = self.locations(ids, groups, importance if self.prioritized else None)
        if isinstance(self.limit, int):
            return ids.masked_fill(location >= self.limit, -1)
        tokens = groups.bincount()
        load = torch.where(ids >= 0, location + 1, 0).amax(1)
        busiest = torch.zeros_like(tokens).scatter_reduce(0, groups, load, "amax")
        pairs = zip(tokens.tolist(), busiest.tolist(), strict=True)
        limits = tokens.new_tensor([self.limit(*pair) for pair in pairs])
        return ids.masked_fill(location >= limits[groups][:, None], -1)

    def _groups(self, ids: Tensor, sequences: Tensor | None) -> Tensor:
        rows = torch.arange(len(ids), device=ids.device)
        if isinstance(self.group, int):
            return rows // self.group
        if self.group == "call":
            return torch.zeros_like(rows)
        if sequences is None:
            raise InvalidInput("capacity: a bound per sequence needs the sequence of every row")
        _, numbers = torch.unique(sequences, return_inverse=True)
        return cast(Tensor, numbers)


@dataclass(frozen=True, slots=True, eq=False)
class CappedGate(Gate):
    """A gate whose experts have a capacity: what a row gets depends on the rows around it.

    Attributes:
        gate: chooses; limits apply to it, so that a slot it does not use takes no place.
        capacity: drops.
        normalize: divide the weights by their sum before anything is dropped (GShard, Tutel). Say
            it here, not in the gate, when `capacity.prioritized` must see probabilities.
    """

    gate: Gate
    capacity: Capacity
    normalize: bool = False

    @property
    def num_experts(self) -> int:
        return self.gate.num_experts

    @property
    def choices(self) -> int:
        return self.gate.choices

    @property
    def causal(self) -> bool:
        """Only if no later row changes C, comes first by weight, or has an earlier slot."""
        capacity = self.capacity
        in_order = self.choices == 1 or capacity.priority == "token_major"
        known = isinstance(capacity.limit, int) and not capacity.prioritized
        return self.gate.causal and in_order and known

    @property
    def batch_invariant(self) -> bool:
        return False

    @property
    def weights_input(self) -> bool:
        return self.gate.weights_input

    @property
    def identity_experts(self) -> int:
        return self.gate.identity_experts

    def choose(self, ops: ModuleType, x: Tensor, step: Step) -> Choice:
        ids, weights = self.gate.choose(ops, x, step)
        kept = self.capacity.drop(ids, step.sequences, weights[:, 0])
        if self.normalize:
            total = slot_sum(torch.where(ids >= 0, weights, 0.0))
            weights = weights / total.clamp(min=torch.finfo(torch.float32).eps)[:, None]
        return Choice(kept, weights)
