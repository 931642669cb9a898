"""Capacity: specification 1.1, 1.2, vectors V2 and V3, invariant 4."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from hypothesis import given as hypothesis_given
from hypothesis import strategies as st
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.gates.experts import Capacity, CappedGate, constructor_of
from pyruntime.gates.experts.capacity import (
    Formula,
    hetu_capacity,
    megablocks_capacity,
    switch_capacity,
    tutel_capacity,
)
from tests.gates.experts.cases import Given, assert_same_choices, backends

seeds = st.integers(0, 2**31 - 1)
priorities = st.sampled_from(["slot_major", "token_major"])


def one_group(ids: Tensor) -> Tensor:
    return torch.zeros(len(ids), dtype=torch.int64)


def test_v2() -> None:
    ids = torch.tensor([[0], [0], [0], [1], [0], [1]])
    for formula in (switch_capacity(2, 1.0), hetu_capacity(2, 1, 1.0), tutel_capacity(2, 1, 1.0)):
        assert formula(6, 4) == 3
        capacity = Capacity(formula)
        found = capacity.locations(ids, one_group(ids))
        assert found.flatten().tolist() == [0, 1, 2, 0, 3, 1]
        dropped = capacity.drop(ids, None, torch.ones(6))
        assert dropped.flatten().tolist() == [0, 0, 0, 1, -1, 1]


V3 = torch.tensor([[0, 1], [0, 2], [1, 0], [0, 1]])


@pytest.mark.parametrize(
    ("priority", "locations", "dropped"),
    [
        ("slot_major", [[0, 1], [1, 0], [0, 3], [2, 2]], (2, 1)),
        ("token_major", [[0, 0], [1, 0], [1, 2], [3, 2]], (3, 0)),
    ],
)
def test_v3(priority: str, locations: list[list[int]], dropped: tuple[int, int]) -> None:
    capacity = Capacity(3, priority=priority)  # type: ignore[arg-type]
    assert capacity.locations(V3, one_group(V3)).tolist() == locations
    expected = V3.clone()
    expected[dropped] = -1
    assert torch.equal(capacity.drop(V3, None, torch.ones(4)), expected)


def in_priority(capacity: Capacity, ids: Tensor, importance: Tensor) -> Iterator[tuple[int, int]]:
    rows = list(range(len(ids)))
    if capacity.prioritized:
        rows.sort(key=lambda n: (-float(importance[n]), n))
    slots = range(ids.shape[1])
    if capacity.priority == "slot_major":
        yield from ((n, j) for j in slots for n in rows)
    else:
        yield from ((n, j) for n in rows for j in slots)


@hypothesis_given(
    seeds, st.integers(0, 30), st.integers(1, 3), st.integers(0, 6), priorities, st.booleans(),
    st.sampled_from(["call", "sequence", 4]),
)  # fmt: skip
def test_drops_are_a_count_in_order(
    seed: int, rows: int, slots: int, limit: int, priority: str, prioritized: bool, group: object
) -> None:
    """Against one choice at a time; unused slots take no place."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, 4, (rows, slots), generator=random)
    importance = torch.randint(0, 5, (rows,), generator=random).float()
    sequences = torch.randint(0, 3, (rows,), generator=random).int()
    capacity = Capacity(limit, group, priority, prioritized)  # type: ignore[arg-type]
    counts: dict[tuple[int, int], int] = {}
    expected = ids.clone()
    for n, j in in_priority(capacity, ids, importance):
        where = {"call": 0, "sequence": int(sequences[n])}.get(str(group), n // 4)
        key = (where, int(ids[n, j]))
        if key[1] >= 0 and counts.get(key, 0) >= limit:
            expected[n, j] = -1
        counts[key] = counts.get(key, 0) + 1
    assert torch.equal(capacity.drop(ids, sequences, importance), expected)


@hypothesis_given(seeds, st.integers(0, 40), priorities, st.booleans())
def test_more_capacity_only_adds(seed: int, rows: int, priority: str, prioritized: bool) -> None:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 4, (rows, 2), generator=random)
    importance = torch.rand(rows, generator=random)
    before = torch.full_like(ids, -1)
    for limit in range(0, 2 * rows + 1):
        kept = Capacity(limit, "call", priority, prioritized).drop(ids, None, importance)  # type: ignore[arg-type]
        sizes = kept[kept >= 0].bincount(minlength=4)
        assert torch.equal(sizes, ids.flatten().bincount(minlength=4).clamp(max=limit))
        assert bool(((before < 0) | (before == kept)).all())
        before = kept
    assert torch.equal(before, ids)


@backends
@hypothesis_given(seeds, st.integers(0, 40), priorities)
def test_enough_capacity_is_none(ops: ModuleType, seed: int, rows: int, priority: str) -> None:
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))
    gate = constructor_of("topk")(Given(6), 2)
    dropless = gate.plan(ops, x)
    formulas: tuple[int | Formula, ...] = (
        2 * rows, switch_capacity(6, 1e6), tutel_capacity(6, 2, 0.0), megablocks_capacity(6, 2, 0.0)
    )  # fmt: skip
    for limit in formulas:
        capped = CappedGate(gate, Capacity(limit, "call", priority))  # type: ignore[arg-type]
        assert_same_choices(capped.plan(ops, x), dropless)


def test_formulas() -> None:
    assert switch_capacity(8, 1.25)(100, 99) == 15
    assert hetu_capacity(8, 2, 1.25)(100, 99) == 32
    assert tutel_capacity(8, 2, 1.25)(100, 99) == 2 * int(1.25 * 13)
    assert tutel_capacity(8, 2, 0.0)(100, 41) == 41
    assert tutel_capacity(8, 2, -1.0)(100, 41) == 26
    assert tutel_capacity(8, 2, -1.0)(100, 11) == 11
    assert tutel_capacity(8, 2, 0.0, alignment=8)(100, 41) == 48
    assert tutel_capacity(8, 2, 0.0)(1000, 257) == 384
    assert megablocks_capacity(8, 2, 1.25)(100, 99) == 31
    assert megablocks_capacity(8, 2, 0.0)(100, 99) == 99


def test_gshard_normalizes_before_it_drops() -> None:
    """A token that loses its second expert keeps the weight of the first."""
    p = torch.tensor([[0.5, 0.25, 0.25], [0.6, 0.3, 0.1]])
    gate = constructor_of("topk")(Given(3), 2, normalize=False)
    plan = CappedGate(gate, Capacity(1), normalize=True).plan(*_reference(p.log()))
    assert plan.choices().tolist() == [[0, 1], [-1, -1]]
    assert torch.allclose(plan.slot_weights()[0], torch.tensor([2 / 3, 1 / 3]))


def test_batch_prioritized_routing_serves_the_surest_first() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.06, 0.04], [0.6, 0.3, 0.1]])
    gate = constructor_of("topk")(Given(3), 1, normalize=False)
    capacity = Capacity(2, prioritized=True)
    plan = CappedGate(gate, capacity, normalize=True).plan(*_reference(p.log()))
    assert plan.choices().flatten().tolist() == [-1, 0, 0]
    assert plan.slot_weights().flatten().tolist() == [0.0, 1.0, 1.0]


def test_a_capped_gate_is_causal_only_where_it_is() -> None:
    one, two = constructor_of("switch")(Given(4)), constructor_of("topk")(Given(4), 2)
    assert CappedGate(one, Capacity(2)).causal
    assert CappedGate(two, Capacity(2, priority="token_major")).causal
    assert not CappedGate(two, Capacity(2)).causal
    assert not CappedGate(one, Capacity(2, prioritized=True)).causal
    assert not CappedGate(one, Capacity(switch_capacity(4, 1.0))).causal
    assert not CappedGate(one, Capacity(2)).batch_invariant
    llama = constructor_of("sigmoid_of_chosen")(Given(4))
    assert CappedGate(llama, Capacity(2)).weights_input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": -1}, "limit"),
        ({"limit": 1, "group": 0}, "at least one row"),
        ({"limit": 1, "group": "batch"}, "group must be"),
        ({"limit": 1, "priority": "random"}, "priority must be"),
    ],
)
def test_refusals(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Capacity(**settings)  # type: ignore[arg-type]


def test_sequences_are_needed_where_they_are_asked_for() -> None:
    gate = CappedGate(constructor_of("switch")(Given(4)), Capacity(1, "sequence"))
    with pytest.raises(InvalidInput, match="sequence of every row"):
        gate.plan(*_reference(torch.zeros(3, 4)))


def _reference(x: Tensor) -> tuple[ModuleType, Tensor]:
    from pyruntime.ops import reference

    return reference, x
