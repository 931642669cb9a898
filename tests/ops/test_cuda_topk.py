"""plan_topk and plan_partition on the device, emulated or real: the bits of the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import cuda_emulator
from pyruntime.errors import InvalidInput
from pyruntime.ops import TopK, cuda, reference
from tests.ops.device_cases import same_bits, same_plan
from tests.ops.strategies import TopKCase, generator, normal, seeds, topk_cases

few = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def moved(case: TopKCase, device: str) -> tuple[Tensor, TopK, Tensor | None, Tensor | None]:
    bias = None if case.bias is None else case.bias.to(device)
    limits = None if case.limits is None else case.limits.to(device)
    return case.logits.to(device), case.rule, bias, limits


def check_topk(case: TopKCase, device: str) -> None:
    expected = reference.plan_topk(case.logits, case.rule, case.bias, case.limits)
    same_plan(cuda.plan_topk(*moved(case, device)), expected)


@settings(parent=few, max_examples=60)
@given(case=topk_cases(on_device=True))
def test_plan_topk(device: str, case: TopKCase) -> None:
    check_topk(case, device)


V3 = TopK(
    8, "sigmoid", normalize=True, epsilon=1e-20, scale=2.5, groups=8, top_groups=4,
    group_score="sum2", round_weights=True,
)  # fmt: skip
# rows, segments, rule: every kernel, and both sides of the bounds between them
SIZES = [
    (3, 1, TopK(1)),
    (2, 64, TopK(8, "softmax", normalize=True)),
    (2, 65, TopK(33, "softmax")),
    (64, 256, V3),
    (65, 256, V3),
    (2, 257, TopK(64, "sqrt_softplus", normalize=True)),
    (3, 1024, TopK(40, "softmax", over_chosen=True)),
    (256, 64, TopK(8, "softmax")),
    (2049, 4, TopK(4, "softmax", normalize=True)),
]


@pytest.mark.parametrize(("count", "segments", "rule"), SIZES)
def test_plan_topk_of_every_size(device: str, count: int, segments: int, rule: TopK) -> None:
    bias = normal(1, segments) if rule is V3 else None
    limits = torch.rand(count, 3, generator=generator(2)) * torch.tensor([rule.k + 2, 0.5, 1.5])
    check_topk(TopKCase(normal(3, count, segments), rule, bias, limits), device)


def test_one_launch_for_a_small_batch(
    monkeypatch: pytest.MonkeyPatch, emulator: cuda_emulator.EmulatedKernels
) -> None:
    cuda_emulator.install(monkeypatch, emulator)
    for count, segments, names in (
        (1, 64, ["plan_topk_small_2"]),
        (64, 256, ["plan_topk_small_8"]),
        (1, 512, ["plan_topk_choose_32", "plan_labels_small"]),
        (257, 64, ["plan_topk_choose_2", "plan_labels_small"]),
        (4100, 8, ["plan_topk_choose_2", "plan_labels_count", "plan_scan", "plan_labels_scatter"]),
    ):
        before = len(emulator.launched)
        cuda.plan_topk(torch.zeros(count, segments), TopK(min(segments, 4)))
        assert emulator.launched[before:] == names, (count, segments)


@few
@given(
    seed=seeds,
    count=st.integers(0, 700),
    choices=st.sampled_from([0, 1, 3]),
    segments=st.sampled_from([1, 2, 31, 32, 33, 257, 1500]),
    weighted=st.booleans(),
)
def test_plan_partition(
    device: str, seed: int, count: int, choices: int, segments: int, weighted: bool
) -> None:
    shape = (count, choices) if choices else (count,)
    labels = torch.randint(-1, segments, shape, generator=generator(seed)).int()
    weights = normal(seed, *shape) if weighted else None
    actual = cuda.plan_partition(
        labels.to(device), segments, None if weights is None else weights.to(device)
    )
    expected = reference.plan_partition(labels, segments, weights)
    same_plan(actual, expected)
    same_bits(actual.choices(), labels.view(expected.inverse.shape))
    same_bits(actual.slot_weights(), expected.slot_weights())


@pytest.mark.parametrize("count", [8192, 8193, 20_000])
def test_partitions_around_the_one_launch_bound(device: str, count: int) -> None:
    labels = torch.randint(-1, 300, (count // 4, 4), generator=generator(2)).int()
    weights = normal(count, count // 4, 4)
    actual = cuda.plan_partition(labels.to(device), 300, weights.to(device))
    same_plan(actual, reference.plan_partition(labels, 300, weights))


def test_an_unknown_label_is_dropped(device: str) -> None:
    labels = torch.tensor([0, 5, -7, 1], dtype=torch.int32)
    plan = cuda.plan_partition(labels.to(device), 2)
    assert plan.inverse.flatten().tolist() == [0, -1, -1, 1]
    assert plan.offsets.tolist() == [0, 1, 2]


X = torch.zeros(4, 8)
REFUSALS: list[tuple[Callable[[str], object], str]] = [
    (lambda d: cuda.plan_topk(X.to(d), TopK(9)), r"k must lie in \[1, 8\], got 9"),
    (
        lambda d: cuda.plan_topk(torch.zeros(2, 1025).to(d), TopK(2)),
        "at most 1024 segments, 64 slots and 32 groups on a GPU, got 1025, 2 and 1",
    ),
    (lambda d: cuda.plan_topk(torch.zeros(2, 99).to(d), TopK(65)), "got 99, 65 and 1"),
    (
        lambda d: cuda.plan_topk(X.to(d), TopK(1), torch.zeros(7).to(d)),
        r"selection_bias must be .* \[8\], got .* \[7\]",
    ),
    (
        lambda d: cuda.plan_topk(X.to(d), TopK(1), None, torch.zeros(4, 2).to(d)),
        r"limits must be .* \[4, 3\], got .* \[4, 2\]",
    ),
    (
        lambda d: cuda.plan_partition(torch.zeros(4, 2).int().to(d), 3, torch.zeros(2, 4).to(d)),
        r"plan_partition: weights must be .* \[4, 2\], got .* \[2, 4\]",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSALS)
def test_wrong_arguments_are_named(
    device: str, call: Callable[[str], object], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        call(device)
