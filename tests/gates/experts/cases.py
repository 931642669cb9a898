"""One gate of every kind, over logits that a test writes itself or over a real router."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from pyruntime.gates.experts import Capacity, CappedGate, Cosine, Gate, Linear, constructor_of
from pyruntime.gates.experts.capacity import switch_capacity
from pyruntime.ops import Weight, native, reference
from pyruntime.plan import Plan

E, K, H, VOCABULARY = 8, 3, 24, 50
SIZES = (0, 1, 17, 4096)
SKEWS = ("uniform", "zipf", "one")
backends = pytest.mark.parametrize("ops", [reference, native], ids=["reference", "native"])


@dataclass(frozen=True)
class Given:
    """A router whose logits are columns [first, first + num_experts) of x."""

    num_experts: int
    first: int = 0

    def logits(self, ops: ModuleType, x: Tensor) -> Tensor:
        return x[:, self.first : self.first + self.num_experts].contiguous()


Make = Callable[[int, int], Any]  # (outputs, first column of them) -> router


def given(outputs: int, first: int) -> Any:
    return Given(outputs, first)


def linear(outputs: int, first: int) -> Linear:
    random = torch.Generator().manual_seed(first)
    return Linear(Weight.pack(torch.randn(outputs, H, generator=random)))


def _hash(make: Make, learned: bool) -> Gate:
    table = torch.randint(0, E, (VOCABULARY, 2), generator=torch.Generator().manual_seed(1))
    return constructor_of("hash")(table, E, make(E, 0) if learned else None, scale=1.5)


def _bias() -> Tensor:
    return torch.randn(E, generator=torch.Generator().manual_seed(2)) * 0.2


def _top(make: Make, **settings: Any) -> Gate:
    return constructor_of("topk")(make(E, 0), K, **settings)


GATES: dict[str, Callable[[Make], Gate]] = {
    "switch": lambda make: constructor_of("switch")(make(E, 0)),
    "topk": lambda make: _top(make, normalize=False),
    "topk, normalized": lambda make: _top(make, normalize=True, scale=1.5),
    "topk, longcat": lambda make: _top(make, selection_bias=_bias(), identity_experts=2),
    "softmax_of_chosen": lambda make: constructor_of("noisy_topk")(make(E, 0), K),
    "sigmoid_of_chosen": lambda make: constructor_of("sigmoid_of_chosen")(make(E, 0), 2),
    "adaptive": lambda make: constructor_of("adaptive")(make(E, 0), 0.1, renormalize=False),
    "adaptive, renormalized": lambda make: constructor_of("adaptive")(make(E, 0), 0.1, True),
    "grouped, v2": lambda make: constructor_of("grouped")(make(E, 0), K, 4, 2, 16.0),
    "grouped, v3": lambda make: constructor_of("grouped")(make(E, 0), K, 4, 2, 2.5, _bias()),
    "ktop1": lambda make: constructor_of("ktop1")(make(E, 0), 2),
    "sam": lambda make: constructor_of("sam")(make(E, 0), 2, K),
    "base_auction": lambda make: constructor_of("base_auction")(make(E, 0)),
    "hash": lambda make: _hash(make, False),
    "hash, learned": lambda make: _hash(make, True),
    "dts": lambda make: constructor_of("dts")(make(E, 0), 0.1),
    "dselect_k": lambda make: constructor_of("dselect_k")(make(6, 0), make(2, 6), E),
    "dselect_k, hard": lambda make: constructor_of("dselect_k")(
        make(6, 0), make(2, 6), E, hard=True
    ),
    "dselect_static": lambda make: constructor_of("dselect_static")(
        torch.tensor([[0.3, 0.1, -0.7], [0.9, 0.0, 0.2]]), torch.tensor([0.2, -0.3]), E
    ),
    "sparse_mixer": lambda make: constructor_of("sparse_mixer")(make(E, 0), 0.1),
    "expert_choice": lambda make: constructor_of("expert_choice")(make(E, 0), 2),
    "capped, first come": lambda make: CappedGate(
        constructor_of("switch")(make(E, 0)), Capacity(1, "sequence")
    ),
    "capped, slot major": lambda make: CappedGate(_top(make), Capacity(4)),
    "capped, token major": lambda make: CappedGate(_top(make), Capacity(4, 9, "token_major")),
    "capped, prioritized": lambda make: CappedGate(
        _top(make, normalize=False),
        Capacity(switch_capacity(E, 1.0), prioritized=True),
        normalize=True,
    ),
}  # fmt: skip
UNORDERED = {"ktop1", "hash", "expert_choice"}
every_gate = pytest.mark.parametrize("name", GATES)


def base_greedy() -> Gate:
    return constructor_of("base_greedy")(linear(E, 0).weight)


def cosine() -> Gate:
    random = torch.Generator().manual_seed(3)
    similarity = torch.randn(12, E, generator=random)
    projection = Linear(linear(12, 0).weight, torch.randn(12, generator=random))
    return constructor_of("topk")(Cosine.of(projection, similarity), K)


def real_gates() -> dict[str, Gate]:
    """Every kind over routers that multiply."""
    found = {name: build(linear) for name, build in GATES.items()}
    return {**found, "base_greedy": base_greedy(), "cosine": cosine()}


def rows_of(gate: Gate, rows: int) -> int:
    """The auction shares tokens equally."""
    kind = type(gate).__name__
    return rows // gate.num_experts * gate.num_experts if kind == "AuctionGate" else rows


def logits_of(seed: int, rows: int, skew: str = "uniform") -> Tensor:
    """[rows, H] normal numbers; as logits they prefer low experts, or the first alone."""
    x = torch.randn(rows, H, generator=torch.Generator().manual_seed(seed))
    if skew == "zipf":
        x[:, :E] -= 1.2 * torch.arange(1, E + 1).log()
    elif skew == "one":
        x[:, 0] += 30.0
    return x


def context(seed: int, rows: int) -> dict[str, Tensor]:
    """Tokens, and sequences of seven rows."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (rows,), generator=random)
    return {"tokens": tokens, "sequences": (torch.arange(rows) // 7).int()}


def plan_of(gate: Gate, ops: ModuleType, x: Tensor, seed: int = 0, **more: Any) -> Plan:
    return gate.plan(ops, x, **context(seed, len(x)), **more)


def assert_same_choices(actual: Plan, expected: Plan) -> None:
    """The same experts and weights, to the bit."""
    assert torch.equal(actual.choices(), expected.choices())
    assert torch.equal(actual.slot_weights(), expected.slot_weights())
