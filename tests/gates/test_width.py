"""Adaptive width: how many learners a token runs, and the plan that runs them."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyruntime.gates.experts.logits import Linear
from pyruntime.gates.width import WidthGate, executed, plan_prefix
from pyruntime.layers.adaptive import Adaptive, Meter
from pyruntime.layers.mlp import FeedForward
from pyruntime.layers.residual import Linear as Layer
from pyruntime.ops import Weight, native, reference

both = pytest.mark.parametrize("ops", [native, reference])


@given(st.lists(st.integers(0, 4), max_size=40))
def test_a_learner_takes_the_rows_that_reach_it(counts: list[int]) -> None:
    chosen = torch.tensor(counts, dtype=torch.int64)
    for ops in (native, reference):
        plan = plan_prefix(ops, chosen, 4)
        plan.validate()
        for learner in range(4):
            rows = plan.rows[plan.offsets[learner] : plan.offsets[learner + 1]]
            assert rows.tolist() == [n for n, k in enumerate(counts) if k > learner]
        assert plan.kept == sum(counts)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20))
def test_rules(counts: list[int]) -> None:
    chosen = torch.tensor(counts)
    assert executed(chosen, 4, "paper").tolist() == counts
    assert executed(chosen, 4, "kminus").tolist() == [min(k, 3) for k in counts]
    stop = max(counts)
    # acm.py: for i in range(1, highest_choice): the rows with k >= i run learner i.
    official = [sum(k >= i for i in range(1, stop)) for k in counts]
    assert executed(chosen, 4, "official").tolist() == official


def test_no_rows_have_no_largest() -> None:
    nobody = torch.zeros(0, dtype=torch.int64)
    for rule in ("paper", "official", "kminus"):
        assert executed(nobody, 4, rule).shape == (0,)  # type: ignore[arg-type]


@both
def test_the_lowest_of_equal_choices_wins(ops: ModuleType) -> None:
    weight = Weight.pack(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    gate = WidthGate(Linear(weight, torch.zeros(4)), 4, 1)
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0], [2.0, 3.0]])
    assert gate.count(ops, x).tolist() == [2, 1, 1, 4]


def adaptive(final_bias: bool, epilogue: str = "gelu") -> tuple[Adaptive, list[torch.Tensor]]:
    """A module whose gate reads k from the first column, and what it is made of."""
    random = torch.Generator().manual_seed(0)
    w1, b1 = torch.randn(4, 6, 10, generator=random), torch.randn(4, 6, generator=random)
    w2, b2 = torch.randn(4, 10, 6, generator=random), torch.randn(5, 10, generator=random)
    # Largest at the k nearest to the first column: 2 k x - k^2.
    steps = torch.arange(5.0)
    choose = torch.zeros(5, 10)
    choose[:, 0] = 2 * steps
    bias = None
    if final_bias:
        bias = b2[1:].clone()
        bias[0] += b2[0]
    module = Adaptive(
        WidthGate(Linear(Weight.pack(choose), -(steps**2)), 4, 0),
        FeedForward(Layer(Weight.pack(w1), b1), Layer(Weight.pack(w2), bias), epilogue),
        b2[0] if final_bias else None,
    )
    return module, [w1, b1, w2, b2]


@both
@pytest.mark.parametrize("final_bias", [False, True])
@pytest.mark.parametrize("epilogue", ["gelu", "none"])
def test_sums_of_the_first_learners(ops: ModuleType, final_bias: bool, epilogue: str) -> None:
    """k = [0, 1, 4, 2, …]: nothing; s1; s1 + … + s4; s1 + s2; …"""
    module, (w1, b1, w2, b2) = adaptive(final_bias, epilogue)
    counts = [0, 1, 4, 2, 3, 0, 4]
    x = torch.randn(7, 10, generator=torch.Generator().manual_seed(1))
    x[:, 0] = torch.tensor(counts, dtype=torch.float32)
    before = torch.randn(7, 10, generator=torch.Generator().manual_seed(2))
    meter, ends = Meter(torch.zeros(3, dtype=torch.int64)), torch.tensor([0, 2, 2, 7]).int()
    out = before.clone()
    module.add(ops, x, out, ends, meter)
    for row, k in enumerate(counts):
        expected = before[row].clone()
        if final_bias:
            expected += b2[0]
        for learner in range(k):
            inner = x[row] @ w1[learner].T + b1[learner]
            inner = torch.nn.functional.gelu(inner) if epilogue == "gelu" else inner
            expected += inner @ w2[learner].T + (b2[learner + 1] if final_bias else 0)
        torch.testing.assert_close(out[row], expected, atol=1e-4, rtol=1e-5)
    if not final_bias:  # their bits are the same
        assert torch.equal(out[[0, 5]], before[[0, 5]])
    assert module.macs == 120
    assert meter.macs.tolist() == [120, 0, 120 * 13]


@both
def test_nobody_runs_anything(ops: ModuleType) -> None:
    module, _ = adaptive(final_bias=False)
    for rows in (0, 3):
        out = torch.ones(rows, 10)
        ends = torch.tensor([0, rows]).int()
        module.add(ops, torch.zeros(rows, 10), out, ends, None)
        assert torch.equal(out, torch.ones(rows, 10))
