"""plan_exit on the device, emulated or real: the decisions of the reference, bit by bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from torch import Tensor

import cuda_emulator
from pyruntime.errors import InvalidInput
from pyruntime.ops import ExitHead, Weight, cuda, reference
from pyruntime.ops.exit import COMPOSITIONS, CRITERIA
from tests.ops.device_cases import same_bits, same_plan
from tests.ops.exit_cases import (
    FEATURES,
    OFFICIAL,
    PATIENCE,
    SHARES,
    ExitCase,
    exit_cases,
    features,
    head_of,
    limits_of,
    patience_logits,
    rule_of,
    share_rules,
)
from tests.ops.strategies import normal

few = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def same_numbers(actual: Tensor, expected: Tensor) -> None:
    """Equal bits, but for the payload of a NaN and the sign of a zero."""
    assert torch.equal(actual.cpu().nan_to_num(9e9), expected.nan_to_num(9e9))


def check_exit(case: ExitCase, device: str) -> None:
    """The logits are near; what is made of them is what the reference makes of them."""
    (logits, confidence, plan), state, total = case.to(device).run(cuda)
    (wanted, sure, _), _, _ = case.run(reference)
    if case.head is None:
        same_numbers(logits, wanted)
    else:
        torch.testing.assert_close(logits.cpu(), wanted, atol=3e-4, rtol=1e-5)
    if total is not None:
        same_numbers(total, logits.cpu())
    if case.rule.learned:
        torch.testing.assert_close(confidence.cpu(), sure, atol=1e-4, rtol=0, equal_nan=True)
        threshold = case.limits[:, 0]
        left = confidence.cpu() > threshold if case.rule.strict else confidence.cpu() >= threshold
        labels = torch.where(left, -1, 0).int()
        same_plan(plan, reference.plan_partition(labels, 1))
        same_bits(state, case.state)
        return
    bare = replace(case, x=logits.cpu(), head=None, rows=None, total=None)
    (_, sure, expected), after, _ = bare.run(reference)
    same_numbers(confidence, sure)
    same_plan(plan, expected)
    same_bits(state, after)


@few
@given(case=exit_cases())
@example(case=ExitCase(torch.empty(0, 3), rule_of("margin"), torch.empty(0, 3), torch.empty(0, 2)))
def test_plan_exit(device: str, case: ExitCase) -> None:
    check_exit(case, device)


# outputs, width: both forms of a head, and what only one of them can hold
HEADS = [(10, 192), (1000, 66), (1001, 100), (70, 1000), (3, 12_288), (22, 3_080)]


@pytest.mark.parametrize(("outputs", "width"), HEADS)
def test_heads_of_every_size(device: str, outputs: int, width: int) -> None:
    rule, rows = rule_of("jei_dnn"), torch.tensor([3, 0, 6, 6, 1], dtype=torch.int32)
    head, x = head_of(1, outputs, width, True, 2), normal(2, 7, width, dtype=torch.bfloat16)
    case = ExitCase(x, rule, torch.zeros(5, 3), limits_of(5, 0.9), head, rows)
    check_exit(case, device)
    (together, _, _), _, _ = case.to(device).run(cuda)
    for n in range(5):
        (alone, _, _), _, _ = case.take(torch.tensor([n])).to(device).run(cuda)
        same_bits(alone[0], together[n])


def test_two_launches_or_three(
    monkeypatch: pytest.MonkeyPatch, emulator: cuda_emulator.EmulatedKernels
) -> None:
    cuda_emulator.install(monkeypatch, emulator)
    gate, plan = "plan_exit_gate", "plan_labels_small"
    for count, outputs, names in (
        (0, 10, []),
        (3, 10, ["plan_exit_rows", plan]),
        (3, 700, ["plan_exit_head", gate, plan]),
        (3, None, [gate, plan]),
    ):
        before = len(emulator.launched)
        head = None if outputs is None else head_of(0, outputs, 100, False, 0)
        x = torch.zeros(count, 2 if outputs is None else 100)
        case = ExitCase(x, rule_of("margin"), torch.zeros(count, 3), limits_of(count, 0.5), head)
        case.to("cpu").run(cuda)
        assert emulator.launched[before:] == names, (count, outputs)


@pytest.mark.parametrize(
    ("criterion", "count"), [*((c, n) for c in CRITERIA for n in (1, 300)), ("margin", 8300)]
)
def test_any_batch(device: str, criterion: str, count: int) -> None:
    """300 rows are many blocks; 8300 are more than one block plans."""
    rule = rule_of(criterion, strict=True)
    head = head_of(0, 3, 4, False, 0) if rule.learned else None
    check_exit(
        ExitCase(normal(1, count, 4), rule, torch.zeros(count, 3), limits_of(count, 0.3), head),
        device,
    )


@pytest.mark.parametrize(("logits", "expected"), FEATURES)
def test_features(device: str, logits: list[float], expected: list[float]) -> None:
    assert features(cuda, logits, device=device) == pytest.approx(expected, abs=1e-6)


def alive(case: ExitCase, device: str, state: Tensor) -> tuple[bool, Tensor]:
    """Whether the only row continues, and its state."""
    (_, _, plan), after, _ = replace(case, state=state).to(device).run(cuda)
    return int(plan.offsets[1]) == 1, after.cpu()


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize(("shares", "level"), SHARES)
def test_compositions(device: str, composition: str, shares: list[float], level: int) -> None:
    state, limits = torch.zeros(1, 3), limits_of(1, OFFICIAL[composition])
    for g, rule in enumerate(share_rules(shares, composition)):
        stays, state = alive(ExitCase(torch.zeros(1, 2), rule, state, limits), device, state)
        assert stays == (g < level)
        if not stays:
            break


@pytest.mark.parametrize(("named", "patience", "level"), PATIENCE)
def test_patience(device: str, named: str, patience: int, level: int) -> None:
    state, limits = torch.zeros(1, 3), limits_of(1, float(patience))
    for g, logits in enumerate(patience_logits(named)):
        stays, state = alive(ExitCase(logits, rule_of("patience"), state, limits), device, state)
        assert stays == (g < level)
        if not stays:
            break


def test_rows_that_leave_are_compacted_on_the_device(device: str) -> None:
    """The count of those that go on is never read by the host."""
    x, state = normal(1, 400, 6), torch.zeros(400, 3)
    case = ExitCase(x, rule_of("jei_dnn"), state, limits_of(400, 0.8))
    (_, _, plan), after, _ = case.to(device).run(cuda)
    (_, _, expected), wanted, _ = case.run(reference)
    assert 0 < expected.kept < 400
    moved = cuda.compact(after, plan)
    assert moved.shape == (400, 3)
    same_bits(moved[: expected.kept], reference.compact(wanted, expected))
    logits = cuda.compact(x.clone().to(device), plan)
    same_bits(logits[: expected.kept], x[expected.rows.long()])


PANELS = ExitHead(Weight.pack(torch.zeros(5, 8)))
WIDE = ExitHead(Weight(torch.zeros(1, 2, 12_289), 2, 12_289, "dense"))
REFUSALS: list[tuple[Callable[[str], ExitCase], str]] = [
    (lambda d: case_of(d, state=torch.zeros(4, 2)), r"state must be .* \[4, 3\], got .*\[4, 2\]"),
    (lambda d: case_of(d, limits=torch.zeros(3, 2)), r"limits must be .* \[4, 2\], got .*\[3, 2"),
    (lambda d: case_of(d, total=torch.zeros(4, 7)), r"total must be .* \[4, 8\], got .*\[4, 7\]"),
    (lambda d: case_of(d, rule=rule_of("learned")), "without a head .* and learned"),
    (lambda d: case_of(d, x=torch.zeros(4, 8).double()), "x must be .*got contiguous .*float64"),
]


def case_of(device: str, **changed: object) -> ExitCase:
    case = ExitCase(torch.zeros(4, 8), rule_of("margin"), torch.zeros(4, 3), torch.zeros(4, 2))
    return replace(case, **changed).to(device)  # type: ignore[arg-type]


@pytest.mark.parametrize(("case", "message"), REFUSALS)
def test_wrong_arguments_are_named(
    device: str, case: Callable[[str], ExitCase], message: str
) -> None:
    with pytest.raises(InvalidInput, match=f"plan_exit: .*{message}"):
        case(device).run(cuda)


def test_heads_that_do_not_fit_are_named(device: str) -> None:
    for head, message in ((PANELS, "got panel of 8"), (WIDE, "at most 12288 .*got dense of 12289")):
        moved = replace(head, weight=replace(head.weight, data=head.weight.data.to(device)))
        x = torch.zeros(2, head.weight.in_features, device=device)
        state, limits = torch.zeros(2, 3, device=device), limits_of(2, math.nan).to(device)
        with pytest.raises(InvalidInput, match=message):
            cuda.plan_exit(x, rule_of("margin"), state, limits, moved)
