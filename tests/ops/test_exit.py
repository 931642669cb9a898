"""plan_exit: the same bits from both CPU backends, and what every rule means."""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from pyruntime import ops as public
from pyruntime.errors import InvalidInput
from pyruntime.ops import ExitHead, ExitRule, Weight, native, reference
from pyruntime.ops.exit import COMPOSITIONS, CRITERIA
from pyruntime.ops.reference.score import log
from tests.ops.exit_cases import (
    FEATURES,
    GATE,
    OFFICIAL,
    PATIENCE,
    SHARES,
    ExitCase,
    exit_cases,
    features,
    head_of,
    levels,
    limits_of,
    patience_logits,
    rule_of,
    share_rules,
)
from tests.ops.strategies import (
    assert_same_bits,
    assert_same_plan,
    both_dtypes,
    check_plan,
    few,
    generator,
    normal,
    seeds,
    several_threads,
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


def same_results(case: ExitCase, expected: ExitCase) -> None:
    """What the native op makes of the case is what the reference makes of another, bit by bit."""
    (logits, confidence, plan), state, total = case.run(native)
    wanted, state_after, total_after = expected.run(reference)
    assert_same_bits(logits, wanted[0])
    assert torch.equal(confidence.isnan(), wanted[1].isnan())
    assert torch.equal(confidence.nan_to_num(9e9), wanted[1].nan_to_num(9e9))  # -0 is 0
    assert_same_plan(plan, wanted[2])
    assert_same_bits(state, state_after)
    assert (total is None) == (total_after is None)
    if total is not None and total_after is not None:
        assert_same_bits(total, total_after)
    check_plan(plan, 1)


# ---- native against the reference ----


@given(exit_cases(headless=True, most=40))
@example(ExitCase(torch.empty(0, 3), rule_of("jei_dnn"), torch.empty(0, 3), torch.empty(0, 2)))
def test_equal_logits_are_equal_bits(case: ExitCase) -> None:
    same_results(case, case)


@given(exit_cases(headless=False))
def test_a_head(case: ExitCase) -> None:
    """Its products round differently; what is made of them does not."""
    assert case.head is not None
    (logits, _, _), _, _ = case.run(native)
    (wanted, _, _), _, _ = case.run(reference)
    # A norm divides by the deviation, which magnifies what the mean of few columns lost.
    torch.testing.assert_close(
        logits, wanted, atol=3e-4 if case.head.norm_weight is not None else 2e-5, rtol=1e-5
    )
    if case.rule.learned:
        return
    bare = replace(case, x=logits, head=None, rows=None, total=None)
    _, confidence, plan = bare.run(reference)[0]
    (_, actual, kept), state, total = case.run(native)
    assert torch.equal(actual.nan_to_num(9e9), confidence.nan_to_num(9e9))
    assert_same_plan(kept, plan)
    assert_same_bits(state, bare.run(reference)[1])
    if total is not None:
        assert_same_bits(total, logits)


@pytest.mark.parametrize("classes", [1, 10, 1000])
@pytest.mark.parametrize("criterion", CRITERIA)
@several_threads
def test_any_batch_on_any_threads(threads: None, criterion: str, classes: int) -> None:
    """Large enough for the parallel forms of norm, product and statistics."""
    rule, count, width = rule_of(criterion), 128, 576
    head = head_of(1, classes + rule.learned, width, True, 2)
    rows = torch.randperm(300, generator=generator(2))[:count].int()
    x, state = normal(3, 300, width, dtype=torch.bfloat16), torch.zeros(count, 3)
    case = ExitCase(x, rule, state, limits_of(count, 0.4), head, rows)
    (logits, confidence, plan), after, _ = case.run(native)
    (wanted, _, _), _, _ = case.run(reference)
    torch.testing.assert_close(logits, wanted, atol=2e-5, rtol=1e-5)
    check_plan(plan, 1)
    if not rule.learned:
        again = ExitCase(logits, rule, state, case.limits)
        same_results(again, again)
        assert torch.equal(again.run(reference)[0][1], confidence)
    order = torch.randperm(count, generator=generator(4))
    for ids in (order, order[:1], order[:5], order[60:]):
        (some, sure, left), moved, _ = case.take(ids).run(native)
        assert_same_bits(some, logits[ids])
        assert_same_bits(sure, confidence[ids])
        assert_same_bits(moved, after[ids])
        assert torch.equal(left.inverse < 0, plan.inverse[ids] < 0)


@few
@given(exit_cases())
def test_a_row_does_not_depend_on_the_others(case: ExitCase) -> None:
    (logits, confidence, plan), state, _ = case.run(native)
    for n in range(case.count):
        (alone, sure, own), after, _ = case.take(torch.tensor([n])).run(native)
        assert_same_bits(alone[0], logits[n])
        assert_same_bits(sure[0], confidence[n])
        assert_same_bits(after[0], state[n])
        assert (own.kept == 0) == (int(plan.inverse[n]) < 0)


@given(seeds, st.sampled_from([1.0, 9.0, 30.0]), st.sampled_from([2, 10, 70]))
def test_statistics_are_what_their_names_say(seed: int, spread: float, classes: int) -> None:
    z = normal(seed, 20, classes) * spread
    p = z.double().softmax(1)
    first, second = p.topk(2).values.unbind(1)
    entropy = -torch.special.xlogy(p, p).sum(1)
    wanted = {"max_prob": first, "entropy": -entropy, "margin": first - second}
    for criterion, value in wanted.items():
        case = ExitCase(z, rule_of(criterion), torch.zeros(20, 3), limits_of(20, NAN))
        confidence = case.run(native)[0][1].double()
        torch.testing.assert_close(confidence, value, atol=2e-6, rtol=2e-6)


def test_the_logarithm() -> None:
    x = torch.cat([1 + torch.rand(9999, generator=generator(0)), normal(1, 9999).abs().exp()])
    x = torch.cat([x, 2.0 ** torch.arange(127), torch.tensor([1.0, 1.0 + 2**-23, 3e38])])
    torch.testing.assert_close(log(x).double(), x.double().log(), rtol=2.5e-7, atol=0)


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
    weight = Weight.pack(torch.eye(3))
    for row, leaves in (([1, 2, INF], False), ([1, NAN, 9], False), ([1, 2, 9], True)):
        logits, confidence, plan = ops.plan_exit(
            torch.tensor([row], dtype=torch.float32), rule_of("learned"), torch.zeros(1, 3),
            limits_of(1, 0.5), ExitHead(weight),
        )  # fmt: skip
        assert (plan.kept == 0) == leaves
        if leaves:
            assert logits.tolist() == [[1.0, 2.0]]
            assert float(confidence[0]) == pytest.approx(1 / (1 + math.exp(-9)))


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


# ---- refusals ----

BAD_RULES: list[tuple[dict[str, Any], str]] = [
    ({"criterion": "max"}, "ExitRule: criterion must be one of .*got 'max'"),
    ({"criterion": "jei_dnn"}, "ExitRule: jei_dnn has a gate .* got None for 'jei_dnn'"),
    ({"criterion": "margin", "gate": GATE}, "no other criterion has one, got .* for 'margin'"),
    ({"criterion": "jei_dnn", "gate": (1, 2)}, r"gate must be five finite numbers, got \(1, 2\)"),
    ({"criterion": "jei_dnn", "gate": (1, 2, 3, 4, NAN)}, "five finite numbers, got .*nan"),
    (
        {"criterion": "jei_dnn", "gate": GATE, "composition": "sum"},
        "composition must be one of .*'independent'.*got 'sum'",
    ),
]


@pytest.mark.parametrize(("fields", "message"), BAD_RULES)
def test_a_rule_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        ExitRule(**fields)


W = Weight.pack(torch.zeros(5, 8))
BAD_HEADS: list[tuple[dict[str, Any], str]] = [
    ({"weight": Weight.pack(torch.zeros(2, 5, 8))}, "one float32 matrix, got 2 of torch.float32"),
    ({"weight": Weight.pack(torch.zeros(5, 8).bfloat16())}, "got 1 of torch.bfloat16"),
    ({"weight": W, "bias": torch.zeros(4)}, r"bias must be .*\[5\] on cpu, got .*\[4\]"),
    ({"weight": W, "norm_weight": torch.zeros(8).double()}, r"norm_weight must be .*float64"),
    ({"weight": W, "norm_bias": torch.zeros(8)}, "norm_bias needs norm_weight"),
    ({"weight": W, "eps": 0.0}, "eps must be positive and finite, got 0.0"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_HEADS)
def test_a_head_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        ExitHead(**fields)


X, ONE = torch.zeros(4, 8), Weight.pack(torch.zeros(1, 8))
GOOD = {
    "x": X, "rule": rule_of("margin"), "state": torch.zeros(4, 3), "limits": torch.zeros(4, 2)
}  # fmt: skip
I4 = torch.arange(4).int()
REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"state": torch.zeros(4, 2)}, r"state must be \[4, 3\], got .*\[4, 2\]"),
    ({"limits": torch.zeros(3, 2)}, r"limits must be \[4, 2\], got .*\[3, 2\]"),
    ({"total": torch.zeros(4, 7)}, r"total must be \[4, 8\], got .*\[4, 7\]"),
    ({"rule": rule_of("learned")}, "without a head .* None and learned"),
    ({"rows": I4}, r"without a head .* \[4\] and margin"),
    ({"x": X.bfloat16()}, "without a head .*bfloat16"),
    ({"x": X[:, :0]}, r"without a head .*\[4, 0\]"),
    (
        {"head": ExitHead(ONE), "rule": rule_of("learned")},
        "learned needs a head of more outputs, got 1",
    ),
    ({"head": ExitHead(W), "x": X[:, :7].contiguous()}, r"x must be \[T, 8\], got \[4, 7\]"),
    ({"head": ExitHead(W), "rows": I4 + 1}, r"rows must lie in \[0, 4\), got 4"),
    ({"head": ExitHead(W), "rows": I4 - 1}, r"rows must lie in \[0, 4\), got -1"),
]


@both
@pytest.mark.parametrize(("fields", "message"), REFUSALS)
def test_plan_exit_refuses(ops: ModuleType, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=f"plan_exit: .*{message}"):
        ops.plan_exit(**(GOOD | fields))


def test_native_refuses_what_it_cannot_read() -> None:
    dense = ExitHead(Weight(torch.zeros(1, 5, 8), 5, 8, "dense"))
    for fields, message in (
        ({"x": X.T.contiguous().T}, "x must be a contiguous .* got strided"),
        ({"state": torch.zeros(3, 4).T}, "state must be a contiguous .* got strided"),
        ({"head": dense}, "head.weight must be CPU panels, got dense"),
        ({"head": ExitHead(W), "rows": I4.long()}, "rows must be .*int32.*got .*int64"),
    ):
        with pytest.raises(InvalidInput, match=f"plan_exit: .*{message}"):
            native.plan_exit(**(GOOD | fields))


def test_the_public_function_is_the_native_one() -> None:
    case = ExitCase(normal(1, 10, 4), rule_of("jei_dnn"), torch.zeros(10, 3), limits_of(10, 0.7))
    (logits, confidence, plan), state, _ = case.run(public)
    (_, wanted, expected), after, _ = case.run(native)
    assert logits is case.x
    assert_same_bits(confidence, wanted)
    assert_same_bits(state, after)
    assert_same_plan(plan, expected)
