"""GateSkip's published rule and its relatives: specification G5 to G9, on both backends."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pyruntime.gates.budget import NEVER, batch_quantile, exact_k, seq_quantile
from pyruntime.gates.policy import ComputePolicy
from pyruntime.gates.routing import Router, quantile_rule, replay_rule
from pyruntime.gates.token_gate import TokenGate
from pyruntime.ops import Weight, native, reference

backends = pytest.mark.parametrize("ops", [reference, native], ids=["reference", "native"])


def skipped(
    ops: ModuleType,
    scores: Tensor,
    skip: float,
    valid: Tensor | None = None,
    mode: str = "batch_quantile",
) -> list[int]:
    """Rows that do not run, decided by the whole chain: policy, rule, planner."""
    policy = ComputePolicy(budget=1 - skip, mode=mode)
    sequences = torch.zeros(scores.numel(), dtype=torch.int32)
    rule = quantile_rule(ops, policy, skip, valid, sequences, None)
    plan = Router(ops, scores.numel(), rule).plan(0, 0, scores, False)
    plan.validate()
    return (plan.inverse[:, 0] < 0).nonzero()[:, 0].tolist()


@backends
def test_g05_gate_micro_vector(ops: ModuleType) -> None:
    weight = torch.tensor([[0.1, -0.2], [0.3, 0.05]])
    gate = TokenGate(weight=Weight.pack(weight), bias=torch.tensor([5.0, 5.0]))
    value = gate.evaluate(ops, torch.tensor([[1.0, 2.0]]), None)
    assert value.channels is not None
    assert value.channels[0].tolist() == pytest.approx([0.99098670, 0.99550373], abs=1e-7)
    assert float(value.scores[0]) == pytest.approx(0.99324521, abs=1e-7)
    assert not gate.weighted


@backends
def test_g05_scalar_and_mlp_gates_by_hand(ops: ModuleType) -> None:
    x = torch.tensor([[1.0, 2.0], [0.0, -3.0]])
    scalar = TokenGate(probe=torch.tensor([0.1, -0.2]), probe_bias=5.0)
    _, logits = ops.rms_norm(x, torch.ones(2), 0.0, scalar.probe, scalar.probe_bias)
    value = scalar.evaluate(ops, x, logits)
    normed = x / x.square().mean(1, keepdim=True).sqrt()
    expected = torch.sigmoid(normed @ torch.tensor([0.1, -0.2]) + 5)
    assert scalar.weighted and value.channels is None
    assert value.scores.tolist() == pytest.approx(expected.tolist(), abs=1e-6)

    up, up_bias = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]), torch.zeros(4)
    down = torch.tensor([[0.5, 0.25, 1.0, 0.125]])
    mlp = TokenGate(
        weight=Weight.pack(down), bias=torch.tensor([5.0]), up=Weight.pack(up), up_bias=up_bias
    )
    value = mlp.evaluate(ops, x, None)
    assert mlp.weighted and value.channels is None
    want = [1 / (1 + math.exp(-z)) for z in (5 + 0.5 + 0.5, 5 + 0.125 * 3)]
    assert value.scores.tolist() == pytest.approx(want, abs=1e-6)


G6 = torch.tensor([0.91, 0.40, 0.77, 0.55, 0.99, 0.62, 0.48, 0.83, 0.70, 0.30])


@backends
@pytest.mark.parametrize(
    ("skip", "tau", "rows"),
    [
        (0.05, 0.345, [9]),
        (0.10, 0.390, [9]),
        (0.15, 0.428, [1, 9]),
        (0.20, 0.464, [1, 9]),
        (0.25, 0.4975, [1, 6, 9]),
        (0.30, 0.529, [1, 6, 9]),
        (0.50, 0.660, [1, 3, 5, 6, 9]),
        (1.0, 0.99, list(range(10))),
    ],
)
def test_g06_quantile_vector(ops: ModuleType, skip: float, tau: float, rows: list[int]) -> None:
    assert float(batch_quantile(ops, G6, None, skip)) == pytest.approx(tau, abs=1e-6)
    assert skipped(ops, G6, skip) == rows


G7 = {
    2: (1, 1, 1, 1, 1),
    3: (1, 1, 1, 2, 2),
    4: (1, 1, 1, 2, 3),
    8: (1, 2, 2, 4, 5),
    10: (1, 2, 3, 5, 7),
    16: (1, 3, 4, 8, 11),
    32: (2, 5, 8, 16, 22),
    64: (4, 10, 16, 32, 45),
    128: (7, 20, 32, 64, 89),
    512: (26, 77, 128, 256, 358),
    2048: (103, 308, 512, 1024, 1433),
    4096: (205, 615, 1024, 2048, 2867),
}
G7_SKIPS = (0.05, 0.15, 0.25, 0.5, 0.7)


@backends
@pytest.mark.parametrize("count", G7)
def test_g07_count_table(ops: ModuleType, count: int) -> None:
    random = torch.Generator().manual_seed(count)
    scores = torch.rand(count, generator=random)
    while scores.unique().numel() < count:  # the law is about distinct scores
        scores = torch.rand(count, generator=random)
    found = tuple(len(skipped(ops, scores, skip)) for skip in G7_SKIPS)
    assert found == G7[count] == tuple(int(skip * (count - 1)) + 1 for skip in G7_SKIPS)


@given(
    st.lists(st.integers(0, 2**20), min_size=2, max_size=130, unique=True),
    st.sampled_from([1, 5, 10, 15, 20, 25, 29, 30, 35, 40, 50, 57, 60, 70, 90, 99, 100]),
)
def test_g07_count_law(values: list[int], percent: int) -> None:
    """floor(q (N - 1)) + 1 in exact arithmetic, asked for as a budget of 1 - q."""
    scores = torch.tensor(values, dtype=torch.float32) / 2**20
    budget = ComputePolicy(budget=(100 - percent) / 100, mode="batch_quantile").budget
    assert budget is not None
    assert len(skipped(native, scores, 1.0 - budget)) == percent * (len(values) - 1) // 100 + 1


@backends
@pytest.mark.parametrize("skip", [0.0, 0.05, 0.5, 1.0])
def test_g07_one_row_and_saturated_gates_never_skip(ops: ModuleType, skip: float) -> None:
    assert skipped(ops, torch.tensor([0.3]), skip) == []
    assert skipped(ops, torch.empty(0), skip) == []
    assert skipped(ops, torch.ones(16), skip) == []
    # One score below 1 and the rule is back, ties and all.
    if skip == 0.5:
        assert skipped(ops, torch.tensor([1.0, 1.0, 0.9]), skip) == [0, 1, 2]


@backends
def test_g07_no_skip_ratio_no_skip(ops: ModuleType) -> None:
    assert skipped(ops, G6, 0.0) == []
    assert torch.equal(batch_quantile(ops, G6, None, -0.1), NEVER)


@backends
def test_g08_ties(ops: ModuleType) -> None:
    scores = torch.tensor([0.9, 0.9, 0.9, 0.95])
    assert float(batch_quantile(ops, scores, None, 0.25)) == pytest.approx(0.9)
    assert skipped(ops, scores, 0.25) == [0, 1, 2]
    assert skipped(ops, scores, 0.25, mode="exact_k") == [0]


@given(st.lists(st.sampled_from([0.1, 0.2, 0.3]), max_size=30), st.floats(0, 1), st.data())
def test_g08_exact_k_is_exact(values: list[float], skip: float, data: st.DataObject) -> None:
    scores = torch.tensor(values, dtype=torch.float32)
    size = len(values)
    valid = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=size, max_size=size)), dtype=torch.bool
    )
    keep = exact_k(scores, valid, skip)
    out = (~keep).nonzero()[:, 0].tolist()
    ranked = sorted(valid.nonzero()[:, 0].tolist(), key=lambda n: (values[n], n))
    assert out == sorted(ranked[: round(skip * len(ranked))])


@backends
@given(st.integers(0, 30), st.integers(0, 1000))
def test_g09_padding_is_kept_and_not_counted(ops: ModuleType, padding: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    real = torch.rand(20, generator=random)
    where = torch.randperm(20 + padding, generator=random)
    scores = torch.cat([real, torch.rand(padding, generator=random) * 0.01])[where]
    valid = where < 20
    for mode in ("batch_quantile", "exact_k", "seq_quantile"):
        alone = skipped(ops, real, 0.3, mode=mode)
        assert sorted(where[skipped(ops, scores, 0.3, valid, mode)].tolist()) == alone
        assert alone


@backends
def test_g09_nothing_valid(ops: ModuleType) -> None:
    nothing = torch.zeros(3, dtype=torch.bool)
    for mode in ("batch_quantile", "exact_k", "seq_quantile"):
        assert skipped(ops, torch.tensor([0.1, 0.2, 0.3]), 1.0, nothing, mode) == []


@backends
def test_seq_quantile_is_the_batch_rule_inside_each_sequence(ops: ModuleType) -> None:
    scores = torch.rand(31, generator=torch.Generator().manual_seed(0))
    sequences = torch.tensor([0] * 20 + [1] * 10 + [2]).int()
    fallback = torch.tensor(0.25)
    tau = seq_quantile(ops, scores, None, 0.4, sequences, fallback)
    for rows in (slice(0, 20), slice(20, 30)):
        assert torch.equal(tau[rows].unique(), batch_quantile(ops, scores[rows], None, 0.4)[None])
    assert float(tau[30]) == 0.25  # one row has no quantile of its own


def test_a_replay_obeys_whatever_the_scores_say() -> None:
    scores = torch.tensor([0.1, torch.nan, torch.inf, -torch.inf, torch.nan])
    kept = torch.tensor([False, False, False, True, True])
    plan = Router(native, 5, replay_rule(kept.expand(1, 2, 5))).plan(0, 1, scores, False)
    assert plan.rows.tolist() == [3, 4]


def test_the_router_remembers_and_never_skips_ungated_branches() -> None:
    router = Router(native, 3, lambda layer, branch, scores: torch.tensor(torch.inf))
    assert router.plan(4, 1, None, False).is_all
    assert router.plan(4, 0, torch.zeros(3), False).kept == 0
    assert {place: plan.kept for place, plan in router.plans.items()} == {(4, 1): 3, (4, 0): 0}


def test_without_a_rule_everything_runs_with_its_gate() -> None:
    scores = torch.tensor([0.5, 0.25])
    plan = Router(native, 2).plan(0, 0, scores, True)
    assert plan.is_all and plan.weights is not None and torch.equal(plan.weights, scores)
    assert Router(native, 2).plan(0, 0, scores, False).weights is None


def test_packing_stops_where_it_was_measured_to_stop() -> None:
    router = Router(native, 10, packed_below=0.9)
    plans = {
        n: native.plan_threshold(torch.arange(10.0), torch.tensor(9.5 - n)) for n in (8, 9, 10)
    }
    assert [router.packs(0, n, plan) for n, plan in plans.items()] == [True, False, True]
    assert router.ran_dense == {(0, 9)}
