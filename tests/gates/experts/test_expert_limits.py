"""Limits: how much of its choice a row may use, in every gate whose slots are ordered."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given as hypothesis_given
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.gates.experts import constructor_of
from pyruntime.gates.experts.choice import Choice
from pyruntime.ops import reference
from tests.gates.experts.cases import (
    GATES,
    UNORDERED,
    Given,
    assert_same_choices,
    backends,
    given,
    logits_of,
    plan_of,
    rows_of,
)

INF = torch.inf
ORDERED = [name for name in GATES if name not in UNORDERED]
seeds = st.integers(0, 2**31 - 1)


def cut_row(weights: list[float], slots: float, gap: float, mass: float) -> int:
    """How many slots a row uses."""
    for n in range(1, len(weights)):
        if n >= slots or weights[n - 1] - weights[n] > gap:
            return n
        if sum(weights[:n]) / sum(weights) >= mass:
            return n
    return len(weights)


limits_of_a_row = st.tuples(
    st.sampled_from([1.0, 2.0, 3.0, 8.0, INF]),
    st.sampled_from([0.0, 0.125, 0.25, 1.0, INF]),
    st.sampled_from([0.0, 0.3, 0.55, 0.8, INF]),
)


@hypothesis_given(st.lists(limits_of_a_row, min_size=1, max_size=9), seeds)
def test_cut_is_its_definition(rows: list[tuple[float, float, float]], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    weights = torch.randint(1, 33, (len(rows), 4), generator=random) / 32.0  # exact sums
    weights = weights.sort(dim=1, descending=True).values
    ids = torch.arange(4).expand(len(rows), 4).clone()
    ids[:, 3] = torch.where(torch.rand(len(rows), generator=random) < 0.5, -1, 3)
    found = Choice(ids, weights).cut(torch.tensor(rows))
    for n, limits in enumerate(rows):
        valid = [float(w) for w, e in zip(weights[n], ids[n], strict=True) if e >= 0]
        used = cut_row(valid, *limits)
        assert found.ids[n].tolist() == ids[n, :used].tolist() + [-1] * (4 - used)


@pytest.mark.parametrize(("mass", "used"), [(0.5, 1), (0.625, 2), (0.75, 2), (0.875, 3), (1.0, 3)])
def test_cut_keeps_the_smallest_number_that_has_the_mass(mass: float, used: int) -> None:
    weights = torch.tensor([[0.5, 0.25, 0.25]])
    found = Choice(torch.arange(3)[None], weights).cut(torch.tensor([[INF, INF, mass]]))
    assert int((found.ids >= 0).sum()) == used


@pytest.mark.parametrize("name", ORDERED)
@backends
def test_no_limit_is_none(ops: ModuleType, name: str) -> None:
    gate = GATES[name](given)
    x = logits_of(3, 48)
    limits = torch.tensor([INF, INF, INF]).expand(48, 3).contiguous()
    assert_same_choices(plan_of(gate, ops, x, limits=limits), plan_of(gate, ops, x))


@pytest.mark.parametrize("name", ORDERED)
@backends
@hypothesis_given(seeds)
@settings(max_examples=5)
def test_slots(ops: ModuleType, name: str, seed: int) -> None:
    """The first ones, of each row as it asks for, at least one; capped gates drop afterwards."""
    gate = GATES[name](given)
    rows = rows_of(gate, 48)
    x = logits_of(seed, rows)
    slots = torch.randint(1, 4, (rows, 1), generator=torch.Generator().manual_seed(seed)).float()
    limits = torch.cat([slots, torch.full((rows, 2), INF)], 1)
    ids = plan_of(gate, ops, x, limits=limits).choices()
    assert bool(((ids >= 0).sum(1) <= slots[:, 0]).all())
    if not name.startswith("capped"):
        whole = plan_of(gate, ops, x).choices()
        number = torch.arange(gate.choices)
        assert torch.equal(ids, whole.masked_fill(number >= slots, -1))


@backends
@hypothesis_given(seeds, st.sampled_from([0.2, 0.5, 0.9]))
def test_mass(ops: ModuleType, seed: int, mass: float) -> None:
    z = torch.randn(30, 8, generator=torch.Generator().manual_seed(seed))
    limits = torch.tensor([INF, INF, mass]).expand(30, 3).contiguous()
    gate = constructor_of("topk")(Given(8), 4, normalize=False)
    found, whole = gate.plan(ops, z, limits=limits), gate.plan(ops, z)
    s = whole.slot_weights().double()
    share = s.cumsum(1) / s.sum(1, keepdim=True)
    clear = ((share - mass).abs() > 1e-6).all(1)
    used = (share < mass).sum(1) + 1
    assert torch.equal((found.choices() >= 0).sum(1)[clear], used.clamp(max=4)[clear])


@backends
def test_an_adaptive_gate_obeys_the_stricter_limit(ops: ModuleType) -> None:
    z = torch.tensor([[0.55, 0.25, 0.2], [0.42, 0.4, 0.18]]).log()
    gate = constructor_of("adaptive")(Given(3), 0.5, True)

    def used(gap: float) -> list[int]:
        limits = torch.tensor([[INF, gap, INF]] * 2)
        return (gate.plan(ops, z, limits=limits).choices() >= 0).sum(1).tolist()

    assert (gate.plan(ops, z).choices() >= 0).sum(1).tolist() == [2, 2]
    assert used(0.1) == [1, 2] and used(0.01) == [1, 1]
    assert used(INF) == used(torch.nan) == [2, 2]
    strict = constructor_of("adaptive")(Given(3), 0.1, True)
    loose = torch.full((2, 3), torch.nan)
    assert (strict.plan(ops, z, limits=loose).choices() >= 0).sum(1).tolist() == [1, 2]


def test_limits_are_shares_of_sigmoids_not_of_logits() -> None:
    """Logits 5 and 4.5 are far apart; their sigmoids are 0.9933 and 0.9890."""
    gate = constructor_of("sigmoid_of_chosen")(Given(3), 2)
    limits: Tensor = torch.tensor([[INF, 0.1, INF]])
    z = torch.tensor([[5.0, 4.5, -1.0]])
    assert gate.plan(reference, z, limits=limits).choices().tolist() == [[0, 1]]


@pytest.mark.parametrize("name", sorted(UNORDERED))
def test_slots_without_an_order_refuse_limits(name: str) -> None:
    with pytest.raises(InvalidInput, match="ordered best first"):
        plan_of(GATES[name](given), reference, logits_of(0, 4), limits=torch.full((4, 3), INF))
