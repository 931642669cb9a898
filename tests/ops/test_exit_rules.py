"""What every rule of plan_exit means, spelled out for both CPU backends."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pyruntime.ops import ExitHead, ExitRule, Weight, native, reference
from pyruntime.ops.exit import COMPOSITIONS, CRITERIA
from tests.ops.exit_cases import (
    FEATURES,
    OFFICIAL,
    PATIENCE,
    SHARES,
    features,
    levels,
    limits_of,
    patience_logits,
    rule_of,
    share_rules,
)
from tests.ops.strategies import (
    assert_same_bits,
    both_dtypes,
    check_plan,
    generator,
    normal,
    seeds,
)

BACKENDS = [pytest.param(reference, id="reference"), pytest.param(native, id="native")]
both = pytest.mark.parametrize("ops", BACKENDS)
compositions = pytest.mark.parametrize("composition", COMPOSITIONS)
HEADLESS = tuple(criterion for criterion in CRITERIA if criterion != "learned")
INF, NAN = math.inf, math.nan


def judged(
    ops: ModuleType, logits: list[float], rule: ExitRule, threshold: float = NAN, **others: Any
) -> tuple[float, bool]:
    """Confidence of one row, and whether it leaves."""
    x, state = torch.tensor([logits]), torch.zeros(1, 3)
    _, confidence, plan = ops.plan_exit(x, rule, state, limits_of(1, threshold), **others)
    check_plan(plan, 1)
    return float(confidence[0]), plan.kept == 0


# ---- vectors ----


@both
@pytest.mark.parametrize(("logits", "expected"), FEATURES)
def test_features(ops: ModuleType, logits: list[float], expected: list[float]) -> None:
    assert features(ops, logits) == pytest.approx(expected, abs=1e-6)


@both
@compositions
@pytest.mark.parametrize(("shares", "level"), SHARES)
def test_compositions(ops: ModuleType, composition: str, shares: list[float], level: int) -> None:
    """Constant gates, by the official decision: both ways to write it down."""
    limits = limits_of(1, OFFICIAL[composition])
    out = levels(ops, share_rules(shares, composition), torch.zeros(len(shares), 1, 2), limits)
    assert out.tolist() == [level]


@both
def test_what_the_gates_add_up_to(ops: ModuleType) -> None:
    state, x = torch.zeros(1, 3), torch.zeros(1, 2)
    for shares, sums in (((0.3, 0.3, 0.3), (0.3, 0.6, 0.9)), ((0.4, 0.4, 0.4), (0.4, 0.8, 1.0))):
        for composition in COMPOSITIONS:
            state.zero_()
            for rule, total in zip(share_rules(list(shares), composition), sums, strict=True):
                ops.plan_exit(x, rule, state, limits_of(1, NAN))
                if composition == "independent" or sum(shares) < 1:
                    assert state.tolist() == [[pytest.approx(total, abs=1e-6), 0.0, 0.0]]
    assert state[0, 0] == 1.0  # nothing is left, and a further gate finds a hazard of one
    confidence = ops.plan_exit(x, rule, state, limits_of(1, NAN))[1]
    assert confidence.tolist() == [1.0] and state[0, 0] == 1.0


@both
def test_tau_divides_the_share(ops: ModuleType) -> None:
    for composition, wanted in (
        ("mass_sum", 0.25 + 0.3 * 4),
        ("independent", 0.3 / 0.75 * 0.5 * 4),
    ):
        rule = share_rules([0.3], composition)[0]
        state = torch.tensor([[0.25, 0.0, 0.0]])
        confidence = ops.plan_exit(torch.zeros(1, 2), rule, state, limits_of(1, NAN, 0.25))[1]
        assert float(confidence[0]) == pytest.approx(wanted, abs=1e-6)
        assert float(state[0, 0]) == pytest.approx(0.55, abs=1e-6)


@both
@pytest.mark.parametrize(("named", "patience", "level"), PATIENCE)
def test_patience(ops: ModuleType, named: str, patience: int, level: int) -> None:
    limits = limits_of(1, float(patience))
    assert levels(ops, rule_of("patience"), patience_logits(named), limits).tolist() == [level]


# ---- the official recurrence ----


def official_levels(g: Tensor) -> tuple[Tensor, Tensor]:
    """Level of every row of shares [G, N] by the recurrence of the repository (networkslab/dynn,
    mode WEIGHTED), in float64, and how near to a tie it came."""
    heads, count = g.shape
    level, near = torch.full((count,), heads), torch.full((count,), INF, dtype=torch.float64)
    before, product = torch.zeros(count).double(), torch.ones(count).double()
    for i in range(heads):
        share = torch.minimum(g[i], 1 - before).clamp(min=0)
        hazard = (share / product).clamp(0, 1)
        level = torch.where((level == heads) & (hazard >= 0.5), i, level)
        near = torch.minimum(near, (before + 2 * g[i] - 1).abs())
        before, product = before + g[i], product * (1 - hazard)
    return level, near


@both
@compositions
@pytest.mark.parametrize("heads", [6, 13])
def test_the_closed_form_is_the_recurrence(ops: ModuleType, composition: str, heads: int) -> None:
    count = 20_000
    # Two classes and their margin alone: any share between 0 and a half, small ones often.
    rule = ExitRule("jei_dnn", False, (0.0, 0.0, 8.0, 0.0, -5.0), composition)  # type: ignore[arg-type]
    logits = normal(heads, heads, count, 2)
    margin = logits.double().softmax(2)
    shares = torch.sigmoid(8 * (margin[..., 0] - margin[..., 1]).abs() - 5)
    level, near = official_levels(shares)
    clear = near > 1e-5
    assert clear.sum() > 0.99 * count and level.unique().numel() == heads + 1
    limits = limits_of(count, OFFICIAL[composition])
    out = levels(ops, rule, logits, limits)
    assert torch.equal(out[clear], level[clear])
    naive = (shares >= 0.5).int().argmax(0)
    assert (naive[clear] != level[clear]).float().mean() > 0.03  # and it is not the obvious rule


# ---- invariants ----


@given(
    seeds,
    st.sampled_from(HEADLESS),
    st.sampled_from(COMPOSITIONS),
    st.lists(st.floats(-1.5, 3, width=32), min_size=2, max_size=2),
    st.booleans(),
)
def test_stricter_never_leaves_earlier(
    seed: int, criterion: str, composition: str, thresholds: list[float], strict: bool
) -> None:
    logits, rule = normal(seed, 5, 30, 3) * 2, rule_of(criterion, composition, strict)
    early, late = (levels(native, rule, logits, limits_of(30, t)) for t in sorted(thresholds))
    assert bool((early <= late).all())
    if criterion == "jei_dnn":
        fast, slow = (
            levels(native, rule, logits, limits_of(30, OFFICIAL[composition], tau))
            for tau in sorted(0.1 + abs(t) for t in thresholds)
        )
        assert bool((fast <= slow).all())
    never = levels(native, rule, logits, limits_of(30, NAN))
    assert never.tolist() == [5] * 30


@both
@pytest.mark.parametrize("criterion", HEADLESS)
def test_what_is_not_finite_never_leaves(ops: ModuleType, criterion: str) -> None:
    for value in (NAN, INF, -INF):
        x = torch.tensor([[5.0, value, 0.0], [5.0, 1.0, 0.0]])
        state = torch.tensor([[0.25, 3.0, 1.0], [0.25, 3.0, 1.0]])
        _, confidence, plan = ops.plan_exit(x, rule_of(criterion), state, limits_of(2, -INF))
        assert plan.rows.tolist() == [0] and plan.inverse.tolist() == [[0], [-1]]
        assert math.isnan(confidence[0]) and math.isfinite(confidence[1])
        # Whoever comes next meets a row that no head has named.
        assert state[0].tolist() == [0.25, *((0.0, 0.0) if criterion == "patience" else (3.0, 1.0))]


@both
def test_a_score_that_is_not_finite_never_leaves(ops: ModuleType) -> None:
    for score, leaves in ((INF, False), (-INF, False), (NAN, False), (9.0, True)):
        head = ExitHead(Weight.pack(torch.eye(3)), torch.tensor([0.0, 0.0, score]))
        logits, confidence, plan = ops.plan_exit(
            torch.tensor([[1.0, 2.0, 0.0]]), rule_of("learned"), torch.zeros(1, 3),
            limits_of(1, -INF), head,
        )  # fmt: skip
        assert logits.tolist() == [[1.0, 2.0]] and (plan.kept == 0) == leaves
        wanted = 1 / (1 + math.exp(-9)) if leaves else NAN
        assert float(confidence[0]) == pytest.approx(wanted, nan_ok=True)


@both
def test_a_head_that_names_nothing_agrees_with_none(ops: ModuleType) -> None:
    state = torch.tensor([[0.0, 3.0, 0.0]])
    ops.plan_exit(torch.tensor([[NAN, 1.0]]), rule_of("patience"), state, limits_of(1, NAN))
    assert not state.any()


@both
def test_extreme_logits(ops: ModuleType) -> None:
    margin, entropy, most = rule_of("margin"), rule_of("entropy"), rule_of("max_prob")
    assert judged(ops, [1e30, -1e30, 0], margin, 1.0) == (1.0, True)
    assert judged(ops, [3e38, -3e38], entropy, 0.0) == (0.0, True)
    assert judged(ops, [-3e38, -3e38], margin) == (0.0, False)
    assert judged(ops, [-3e38, -3e38], most, 0.5) == (0.5, True)
    assert judged(ops, [4.0], margin, 1.0) == (1.0, True)  # one class: p2 is 0
    assert judged(ops, [4.0], most) == (1.0, False)
    assert judged(ops, [-7.0] * 5, margin, 0.0) == (0.0, True)
    assert judged(ops, [1e30, 2e30], rule_of("max_logit"), 2e30)[1]
    assert features(ops, [3e38, -3e38, 0]) == pytest.approx([1, 0, 1, 0], abs=1e-7)


@both
def test_ties_are_of_the_lower_class(ops: ModuleType) -> None:
    state = torch.zeros(2, 3)
    ops.plan_exit(
        torch.tensor([[1.0, 5.0, 5.0], [0.0, -0.0, 0.0]]), rule_of("patience"), state,
        limits_of(2, NAN),
    )  # fmt: skip
    assert state.tolist() == [[0.0, 0.0, 2.0], [0.0, 0.0, 1.0]]


@both
def test_at_the_threshold(ops: ModuleType) -> None:
    for threshold, strict, leaves in (
        (0.5, False, True), (0.5, True, False), (0.25, True, True), (1.0, True, False),
        (-INF, True, True), (INF, False, False), (NAN, False, False), (NAN, True, False),
    ):  # fmt: skip
        rule = ExitRule("max_prob", strict)
        assert judged(ops, [3.0, 3.0], rule, threshold) == (0.5, leaves)


@both
def test_only_what_a_rule_reads_is_written(ops: ModuleType) -> None:
    x, limits = normal(1, 6, 4), limits_of(6, 0.5)
    for criterion in HEADLESS:
        state = torch.rand(6, 3, generator=generator(2))
        before, x_before = state.clone(), x.clone()
        logits, _, _ = ops.plan_exit(x, rule_of(criterion), state, limits)
        assert logits is x and torch.equal(x, x_before)
        changed = (state != before).any(0).tolist()
        assert changed == {
            "jei_dnn": [True, False, False],
            "patience": [False, True, True],
        }.get(criterion, [False] * 3)


@both
def test_heads_that_add_up(ops: ModuleType) -> None:
    """BoostedNet: the confidence is of the sum, which the row carries on."""
    total, steps = torch.zeros(5, 4), normal(1, 3, 5, 4)
    for g in range(3):
        logits, confidence, _ = ops.plan_exit(
            steps[g], rule_of("max_prob"), torch.zeros(5, 3), limits_of(5, NAN), total=total
        )
        summed = steps[: g + 1].sum(0)
        torch.testing.assert_close(logits, summed)
        torch.testing.assert_close(confidence, summed.softmax(1).amax(1))
        assert_same_bits(total, logits)
        assert logits.data_ptr() != total.data_ptr()  # compacting one must not move the other


@both
@both_dtypes
def test_rows_that_leave_are_compacted_away(ops: ModuleType, dtype: torch.dtype) -> None:
    """A packed matrix of three images of 2, 3 and 1 rows, and what is left of it."""
    x = torch.zeros(6, 2, dtype=dtype)
    x[[0, 2, 5]] = torch.tensor([[9, 0], [0, 0], [0, 9]], dtype=dtype)
    state = torch.zeros(3, 3)
    rows = torch.tensor([0, 2, 5], dtype=torch.int32)
    head = ExitHead(Weight.pack(torch.eye(2)))
    logits, _, plan = ops.plan_exit(x, rule_of("max_prob"), state, limits_of(3, 0.9), head, rows)
    assert logits.tolist() == [[9, 0], [0, 0], [0, 9]]
    assert plan.rows.tolist() == [1] and plan.inverse.tolist() == [[-1], [0], [-1]]
    state[:, 0] = torch.arange(3)
    assert ops.compact(state, plan)[:, 0].tolist() == [1]
