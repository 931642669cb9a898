"""plan_exit: the same bits from both CPU backends, whatever the batch, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from pyruntime import ops as public
from pyruntime.errors import InvalidInput
from pyruntime.ops import ExitHead, ExitRule, Weight, native, reference
from pyruntime.ops.exit import CRITERIA
from pyruntime.ops.reference.score import log
from tests.ops.exit_cases import GATE, ExitCase, exit_cases, head_of, limits_of, rule_of
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
NAN = math.nan


def same_results(case: ExitCase) -> None:
    """What the native op makes of the case is what the reference makes of it, bit by bit."""
    (logits, confidence, plan), state, total = case.run(native)
    wanted, state_after, total_after = case.run(reference)
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
    same_results(case)


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


@both
@both_dtypes
def test_a_head_is_a_norm_and_a_product(ops: ModuleType, dtype: torch.dtype) -> None:
    """The ops one by one say the same bits, so that an exit may be replaced by its head."""
    x, rows = normal(1, 40, 66, dtype=dtype), torch.arange(0, 40, 3).int()
    head, limits = head_of(2, 11, 66, True, 2), limits_of(14, NAN)
    assert head.norm_weight is not None
    case = ExitCase(x, rule_of("margin"), torch.zeros(14, 3), limits, head, rows)
    normed = ops.layer_norm(x, head.norm_weight, head.norm_bias, head.eps, rows, torch.float32)
    logits = ops.segment_matmul(normed, head.weight, bias=head.bias)
    assert_same_bits(case.run(ops)[0][0], logits)


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
        same_results(again)
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
