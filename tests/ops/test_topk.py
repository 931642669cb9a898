"""plan_topk: the same bits from both CPU backends, and what every field of its rule means, spelled
out once more, one number at a time."""

from __future__ import annotations

import itertools
import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from pyruntime import ops as public
from pyruntime.errors import InvalidInput
from pyruntime.ops import TopK, native, reference
from pyruntime.ops.reference.score import exp
from tests.ops.strategies import (
    TopKCase,
    assert_same_bits,
    assert_same_plan,
    check_plan,
    generator,
    normal,
    seeds,
    several_threads,
    topk_cases,
)

BACKENDS = [pytest.param(reference, id="reference"), pytest.param(native, id="native")]
both = pytest.mark.parametrize("ops", BACKENDS)
INF = math.inf


def one_row(
    ops: ModuleType, logits: list[float], rule: TopK, **others: Tensor
) -> tuple[list[int], list[float]]:
    """Ids and weights of a single row."""
    plan = ops.plan_topk(torch.tensor([logits], dtype=torch.float32), rule, **others)
    check_plan(plan, rule.k)
    return plan.choices()[0].tolist(), plan.slot_weights()[0].tolist()


# ---- against plain Python ----


def all_scores(logits: Tensor, rule: TopK) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The scores [N, S] themselves: what choosing every segment by them weighs it with."""
    if rule.over_chosen or rule.score == "none":
        return logits.numpy()
    plan = reference.plan_topk(logits, TopK(logits.shape[1], rule.score))
    scores = torch.zeros(logits.shape[0], logits.shape[1] + 1)  # and a place for the -1
    return scores.scatter(1, plan.choices().long() % scores.shape[1], plan.slot_weights()).numpy()[
        :, :-1
    ]


def slowly(case: TopKCase) -> tuple[list[list[int]], list[list[float]]]:
    """Ids and weights of every row, float32 number by float32 number."""
    rule, f32 = case.rule, np.float32
    ids, weights = [], []
    scores = all_scores(case.logits, rule)
    size = case.logits.shape[1] // rule.groups
    for n, z in enumerate(case.logits.tolist()):
        s = scores[n]
        c = [
            -INF if math.isnan(z[e]) or z[e] == -INF
            else float(s[e] + (f32(0) if case.bias is None else f32(case.bias[e].item())))
            for e in range(len(z))
        ]  # fmt: skip
        c = [-INF if math.isnan(x) else x for x in c]
        if rule.groups > 1:
            worth = []
            for g in range(rule.groups):
                best = sorted(c[g * size : (g + 1) * size], reverse=True)
                value = f32(best[0]) + f32(best[1]) if rule.group_score == "sum2" else f32(best[0])
                worth.append(-INF if np.isnan(value) else float(value))
            kept = sorted(range(rule.groups), key=lambda g: (-worth[g], g))[: rule.top_groups]
            c = [x if e // size in kept else -INF for e, x in enumerate(c)]
        order = sorted(range(len(c)), key=lambda e: (-c[e], e))
        chosen = [e for e in order[: rule.k] if c[e] > -INF]
        share = raw = [s[e] for e in chosen]
        if rule.over_chosen and chosen:
            top = max(raw)
            values = exp(torch.tensor([f32(0) if x == top else x - top for x in raw])).numpy()
            raw = list(values)
            share = [x / total(raw) for x in raw]
        used = len(chosen)
        if case.limits is not None:
            slots, gap, mass = case.limits[n].numpy()
            used = next(
                (
                    j for j in range(1, len(chosen))
                    if j >= slots or share[j - 1] - share[j] > gap
                    or total(share[:j]) / total(share) >= mass
                ),
                used,
            )  # fmt: skip
        counted = used if rule.renormalize_used else len(chosen)
        w = [x / total(raw[:counted]) for x in raw] if rule.over_chosen else raw
        if rule.normalize:
            w = [x / (total(w[:counted]) + f32(rule.epsilon)) for x in w]
        w = [x * f32(rule.scale) for x in w]
        if rule.round_weights:
            w = [torch.tensor(x).bfloat16().float().numpy()[()] for x in w]
        ids.append(chosen[:used] + [-1] * (rule.k - used))
        weights.append([float(x) for x in w[:used]] + [0.0] * (rule.k - used))
    return ids, weights


def total(values: list[np.float32]) -> np.float32:
    return next(iter(reversed(list(itertools.accumulate([np.float32(0), *values])))))


@given(topk_cases())
@example(TopKCase(torch.empty(0, 3), TopK(2)))
@example(TopKCase(torch.tensor([[0.5, 0.5, 0.5]]), TopK(2, normalize=True)))
@example(TopKCase(torch.full((2, 3), torch.nan), TopK(3, "softmax")))
@example(TopKCase(torch.tensor([[-INF, math.nan, -INF]]), TopK(2, "sigmoid")))
@example(TopKCase(torch.tensor([[0.0, -0.0]]), TopK(1)))
@example(TopKCase(torch.tensor([[-INF, INF, INF, 0.0]]), TopK(3, "softmax")))
@example(TopKCase(torch.tensor([[INF, -INF, 1, 2]]), TopK(2, groups=2, group_score="sum2")))
def test_plan_topk(case: TopKCase) -> None:
    with np.errstate(all="ignore"):
        ids, weights = slowly(case)
    args = case.logits, case.rule, case.bias, case.limits
    plan = native.plan_topk(*args)
    check_plan(plan, case.rule.k)
    assert_same_plan(plan, reference.plan_topk(*args))
    shape = plan.inverse.shape
    assert_same_bits(plan.choices(), torch.tensor(ids, dtype=torch.int32).view(shape))
    assert_same_bits(plan.slot_weights(), torch.tensor(weights).float().view(shape))


@given(seeds, st.sampled_from(["softmax", "sigmoid", "sqrt_softplus"]), st.sampled_from([1, 9, 30]))
def test_scores_are_what_their_names_say(seed: int, kind: Any, spread: int) -> None:
    logits = normal(seed, 5, 70) * spread
    plan = native.plan_topk(logits, TopK(70, kind))
    actual = torch.empty(5, 70).scatter(1, plan.choices().long(), plan.slot_weights())
    wide = logits.double()
    below = logits - logits.amax(1, keepdim=True)  # what float32 makes of far ones
    wanted = {
        "softmax": below.double().softmax(1),
        "sigmoid": wide.sigmoid(),
        "sqrt_softplus": torch.nn.functional.softplus(wide, threshold=1e9).sqrt(),
    }[kind]
    smallest = 2e-19 if kind == "sqrt_softplus" else 2e-38  # below e^-87 there is only 0
    torch.testing.assert_close(actual.double(), wanted, rtol=4e-7, atol=smallest)


# ---- invariants ----

SKEWS = ["uniform", "zipf", "one"]


def skewed(skew: str, count: int, segments: int) -> Tensor:
    logits = normal(count, count, segments)
    if skew == "zipf":
        logits -= 1.2 * torch.arange(1.0, segments + 1).log()
    elif skew == "one":
        logits[:, 5] += 100.0
    return logits


@pytest.mark.parametrize("skew", SKEWS)
@pytest.mark.parametrize("count", [0, 1, 17, 4096])
@several_threads
def test_any_batch_on_any_threads(threads: None, count: int, skew: str) -> None:
    """The parallel forms of choice and sort are reached by the largest."""
    logits, rule = skewed(skew, count, 24), TopK(8, "softmax", normalize=True, scale=2.5)
    plan = native.plan_topk(logits, rule)
    assert_same_plan(plan, reference.plan_topk(logits, rule))
    plan.validate()
    assert plan.kept == 8 * count and plan.num_segments == 24
    if skew == "one":
        assert (plan.choices()[:, 0] == 5).all()
    sums = plan.slot_weights().sum(1)
    torch.testing.assert_close(sums, torch.full_like(sums, 2.5))


@both
@pytest.mark.parametrize("rule", [TopK(2, "softmax"), TopK(2, "softmax", over_chosen=True)])
def test_a_constant_added_to_all_logits_changes_nothing(ops: ModuleType, rule: TopK) -> None:
    logits = normal(1, 100, 9)
    plan, moved = ops.plan_topk(logits, rule), ops.plan_topk(logits + 8.0, rule)
    assert torch.equal(plan.choices(), moved.choices())
    torch.testing.assert_close(plan.slot_weights(), moved.slot_weights(), atol=1e-6, rtol=1e-5)


@both
def test_permuted_columns_permute_ids(ops: ModuleType) -> None:
    logits, order = normal(2, 50, 40), torch.randperm(40, generator=generator(3))
    plan, moved = ops.plan_topk(logits, TopK(7)), ops.plan_topk(logits[:, order], TopK(7))
    assert torch.equal(plan.choices(), order[moved.choices().long()].int())


@given(topk_cases(min_rows=1))
def test_a_row_does_not_depend_on_the_others(case: TopKCase) -> None:
    plan = native.plan_topk(case.logits, case.rule, case.bias, case.limits)
    for n in range(case.logits.shape[0]):
        limits = None if case.limits is None else case.limits[n : n + 1]
        alone = native.plan_topk(case.logits[n : n + 1], case.rule, case.bias, limits)
        assert_same_bits(alone.choices()[0], plan.choices()[n])
        assert_same_bits(alone.slot_weights()[0], plan.slot_weights()[n])


# ---- vectors ----


@both
def test_ties_go_to_the_lower_segment(ops: ModuleType) -> None:
    assert one_row(ops, [1, 2, 2, 0, 2, 1], TopK(2))[0] == [1, 2]
    assert one_row(ops, [0.0] * 64, TopK(8, "softmax"))[0] == list(range(8))


@both
def test_deepseek_v3(ops: ModuleType) -> None:
    """The largest score, segment 4, is excluded: its group is not among the best two."""
    rule = TopK(
        2, "sigmoid", normalize=True, epsilon=1e-20, scale=2.5, groups=4, top_groups=2,
        group_score="sum2",
    )  # fmt: skip
    bias = torch.tensor([0.0, 0.3, 0.0, 0.0, -0.2, 0.0, 0.1, 0.0])
    logits = [1.0, -1.0, 0.5, 0.4, 2.0, 0.0, -0.5, 0.2]
    ids, weights = one_row(ops, logits, rule, selection_bias=bias)
    assert ids == [0, 2]
    assert weights == pytest.approx([1.350293, 1.149707], abs=1e-6)


@both
def test_adaptive_gating(ops: ModuleType) -> None:
    """Gap 1/8: above it one segment, at it or below two. Exact binary scores."""
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.4375, 0.0625], [0.5, 0.375, 0.125]])
    limits = torch.tensor([[INF, 0.125, INF]]).repeat(3, 1)
    plan = ops.plan_topk(logits, TopK(2, normalize=True), limits=limits)
    assert plan.choices().tolist() == [[0, -1], [0, 1], [0, 1]]
    torch.testing.assert_close(
        plan.slot_weights(), torch.tensor([[1.0, 0.0], [8 / 15, 7 / 15], [4 / 7, 3 / 7]])
    )
    raw = ops.plan_topk(logits, TopK(2), limits=limits)
    assert raw.slot_weights().tolist() == [[0.5, 0.0], [0.5, 0.4375], [0.5, 0.375]]
    whole = ops.plan_topk(logits, TopK(2, normalize=True, renormalize_used=False), limits=limits)
    torch.testing.assert_close(whole.slot_weights()[0], torch.tensor([2 / 3, 0.0]))


@both
@pytest.mark.parametrize(
    ("limit", "used"),
    [
        ((INF, INF, INF), 3),
        ((math.nan, math.nan, math.nan), 3),
        ((9.0, 9.0, 9.0), 3),
        ((2.0, INF, INF), 2),
        ((0.0, INF, INF), 1),
        ((INF, -1.0, INF), 1),
        ((INF, INF, 0.0), 1),
        ((INF, INF, 0.5), 1),
        ((INF, INF, 0.5625), 2),
        ((INF, INF, 0.875), 2),
        ((INF, INF, 0.9), 3),
        ((2.0, INF, 0.9), 2),
        ((3.0, 0.0, 0.9), 1),
    ],
)
def test_limits(ops: ModuleType, limit: tuple[float, float, float], used: int) -> None:
    rule, limits = TopK(3), torch.tensor([limit])
    ids, weights = one_row(ops, [0.125, 0.5, 0.375, 0.0], rule, limits=limits)
    assert ids == [1, 2, 0][:used] + [-1] * (3 - used)
    assert weights == [0.5, 0.375, 0.125][:used] + [0.0] * (3 - used)


@both
def test_what_is_never_chosen(ops: ModuleType) -> None:
    for score in ("none", "softmax", "sigmoid", "sqrt_softplus"):
        assert one_row(ops, [math.nan, 1.0, -INF, 2.0], TopK(3, score))[0] == [3, 1, -1]
        assert one_row(ops, [math.nan, -INF], TopK(2, score, normalize=True)) == ([-1, -1], [0, 0])
    bias = torch.tensor([0.0, -INF, math.nan])
    assert one_row(ops, [1.0, 2.0, 3.0], TopK(2), selection_bias=bias)[0] == [0, -1]
    # Group 1 has the best segment, but is worth -inf: it counts two.
    rule = TopK(2, groups=2, group_score="sum2")
    assert one_row(ops, [1.0, 2.0, 9.0, -INF], rule)[0] == [1, 0]
    assert one_row(ops, [-INF, -INF, -INF, 5.0], rule)[0] == [-1, -1]  # a tie of groups: the lower


@both
def test_a_negative_bias_moves_the_choice_alone(ops: ModuleType) -> None:
    bias = torch.tensor([-2.0, -1.0, -2.0])
    ids, weights = one_row(ops, [0.0, 0.0, 1.0], TopK(2, "sigmoid"), selection_bias=bias)
    assert ids == [1, 2] and weights == pytest.approx([0.5, 1 / (1 + math.exp(-1))])


@both
def test_softmax_over_the_chosen(ops: ModuleType) -> None:
    rule = TopK(2, "softmax", over_chosen=True)
    ids, weights = one_row(ops, [5.0, 1.0, 5.0 + math.log(3), -7.0], rule)
    assert ids == [2, 0] and weights == pytest.approx([0.75, 0.25])
    gap = torch.tensor([[INF, 0.25, INF]])  # of the shares, not of the logits
    cut = one_row(ops, [5.0, 1.0, 5.0 + math.log(3), -7.0], rule, limits=gap)
    assert cut == ([2, -1], [1.0, 0.0])
    kept = TopK(2, "softmax", over_chosen=True, renormalize_used=False)
    assert one_row(ops, [5.0, 1.0, 5.0 + math.log(3), -7.0], kept, limits=gap)[1] == pytest.approx(
        [0.75, 0.0]
    )


@both
def test_rounded_weights(ops: ModuleType) -> None:
    plan = ops.plan_topk(normal(4, 20, 8), TopK(4, "softmax", round_weights=True, scale=1.7))
    exact = ops.plan_topk(normal(4, 20, 8), TopK(4, "softmax", scale=1.7))
    assert_same_bits(plan.weights, exact.weights.bfloat16().float())


# ---- refusals ----

BAD: list[tuple[dict[str, Any], str]] = [
    ({"k": 0}, "TopK: k must be at least 1, got 0"),
    ({"k": 1, "score": "tanh"}, "TopK: score must be one of .*got 'tanh'"),
    ({"k": 1, "group_score": "mean"}, "TopK: group_score must be one of .*got 'mean'"),
    ({"k": 1, "groups": 0}, r"TopK: top_groups must lie in \[1, groups=0\], got 1"),
    ({"k": 1, "groups": 2, "top_groups": 3}, r"top_groups must lie in \[1, groups=2\], got 3"),
    ({"k": 1, "score": "sigmoid", "over_chosen": True}, "over_chosen needs score='softmax'"),
    ({"k": 1, "epsilon": -1.0}, "TopK: epsilon must be .*got -1.0 and 1.0"),
    ({"k": 1, "scale": math.nan}, "TopK: epsilon .* scale finite, got 0.0 and nan"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_a_rule_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        TopK(**fields)


@both
def test_plan_topk_refuses(ops: ModuleType) -> None:
    x = torch.zeros(4, 8)
    with pytest.raises(InvalidInput, match=r"plan_topk: k must lie in \[1, 8\], got 9"):
        ops.plan_topk(x, TopK(9))
    with pytest.raises(InvalidInput, match="8 segments do not form 3 groups"):
        ops.plan_topk(x, TopK(1, groups=3))
    with pytest.raises(InvalidInput, match="do not form 8 groups for group_score='sum2'"):
        ops.plan_topk(x, TopK(1, groups=8, group_score="sum2"))
    with pytest.raises(InvalidInput, match="k=3 segments cannot come from 1 groups of 2"):
        ops.plan_topk(x, TopK(3, groups=4))
    with pytest.raises(InvalidInput, match=r"plan_topk: selection_bias must be \[8\], got .*\[7\]"):
        ops.plan_topk(x, TopK(1), torch.zeros(7))
    with pytest.raises(InvalidInput, match=r"plan_topk: limits must be \[4, 3\], got .*\[4, 2\]"):
        ops.plan_topk(x, TopK(1), None, torch.zeros(4, 2))


def test_the_public_function_is_the_native_one() -> None:
    logits, bias, limits = normal(1, 10, 4), normal(2, 4), normal(3, 10, 3).abs()
    rule = public.TopK(2, "sigmoid", normalize=True)
    assert_same_plan(
        public.plan_topk(logits, rule, bias, limits), native.plan_topk(logits, rule, bias, limits)
    )
