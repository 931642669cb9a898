"""Thresholds release what they should; one pass tells what any thresholds do."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pyruntime.engine.images import Preprocessor
from pyruntime.engine.vision import VisionOutput, VisionRuntime, load_vision
from pyruntime.errors import InvalidInput
from pyruntime.format.load import write_calibration
from pyruntime.gates.policy import ComputePolicy, ExitPolicy
from pyruntime.profile.exit_thresholds import POWERS, begin, budgeted, cut, entries
from pyruntime.profile.image_data import ImageSet
from pyruntime.profile.measure import Ticker
from pyruntime.profile.vision_answers import Answers, collect
from pyruntime.profile.vision_calibrate import MIN_IMAGES, calibrate_vision
from tests.profile.exit_models import calibrated, folder, labelled, opened, pixels, with_rule

pytestmark = pytest.mark.usefixtures("one_thread")

RULES: dict[str, dict[str, Any]] = {
    "mass": {},
    "independent": {"composition": "independent", "threshold": 0.5},
    "max_prob": {"criterion": "max_prob", "threshold": 0.6, "strict": True},
    "max_logit": {"criterion": "max_logit", "threshold": 2.0},
    "entropy": {"criterion": "entropy", "threshold": -1.0, "strict": True},
    "margin": {"criterion": "margin", "threshold": 0.4},
    "patience": {"criterion": "patience", "threshold": 1.0},
    "sums": {"criterion": "max_prob", "threshold": 0.8, "outputs": "sum"},
}


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> VisionRuntime:
    return opened(tmp_path_factory.mktemp("exits"))


@pytest.fixture(scope="module")
def data(runtime: VisionRuntime) -> ImageSet:
    return labelled(runtime, 60)


def answers_of(runtime: VisionRuntime, data: ImageSet) -> Answers:
    return collect(runtime, data, 9, Ticker(7, None))[0]


def run(runtime: VisionRuntime, data: ImageSet, policy: ComputePolicy) -> VisionOutput:
    """All images in one call."""
    preprocess = Preprocessor(runtime.spec.preprocess, runtime.spec.image_size)
    images, _ = data.batch(preprocess, torch.arange(len(data)))
    return runtime.forward(images, policy, compaction="always")


def close(confidence: Tensor, thresholds: Tensor, rule: str) -> Tensor:
    """Images that rounding may send elsewhere, bool [n]: confidences [n, G] may differ in the last
    bits between a batch of all images and one of those that are still there."""
    if rule == "patience":  # counts are exact
        return torch.zeros(len(confidence), dtype=torch.bool)
    return ((confidence - thresholds).abs() < 1e-6).any(1)


def random_answers(seed: int, images: int, exits: int, steps: int | None = None) -> Answers:
    """Distinct confidences, or, with `steps`, few different ones and some that never leave."""
    random = torch.Generator().manual_seed(seed)
    confidence = torch.rand(images, exits, generator=random)
    if steps is None:
        confidence = confidence.argsort(0).float() / images
    else:
        confidence = (confidence * steps).floor() / steps
        confidence[torch.rand(images, exits, generator=random) < 0.2] = math.nan
    macs = torch.arange(1, exits + 2).repeat(images, 1) * 10
    correct = torch.rand(images, exits + 1, generator=random) < 0.7
    return Answers(confidence, correct, macs, 10 * (exits + 1), [i % 2 == 0 for i in range(exits)])


def loop_levels(answers: Answers, power: float) -> list[int]:
    """The published scheme, image by image: sort who is still there, let the first ones go."""
    total, exits = answers.confidence.shape
    weights = [power**k for k in range(exits + 1)]
    levels = [exits] * total
    for k in range(exits):
        here = [i for i in range(total) if levels[i] == exits]
        here.sort(key=lambda i: -float(answers.confidence[i, k]))
        for i in here[: math.floor(total * weights[k] / sum(weights))]:
            levels[i] = k
    return levels


@given(st.integers(0, 10_000), st.integers(1, 80), st.integers(1, 6), st.sampled_from(POWERS))
def test_the_budgeted_scheme(seed: int, images: int, exits: int, power: float) -> None:
    answers = random_answers(seed, images, exits)
    levels = answers.levels(budgeted(answers, power))
    assert levels.tolist() == loop_levels(answers, power)


@given(
    st.lists(st.sampled_from([-1.5, 0.0, 0.25, 0.5, 1.0, math.nan]), max_size=30),
    st.integers(0, 30),
    st.booleans(),
)
def test_a_cut_with_ties(values: list[float], count: int, strict: bool) -> None:
    confidence = torch.tensor(values, dtype=torch.float32)
    threshold = cut(confidence, count, strict)
    gone = {v for v in values if (v > threshold if strict else v >= threshold)}
    known = sorted({v for v in values if not math.isnan(v)}, reverse=True)
    assert math.isnan(threshold) == (not known)
    assert sorted(gone, reverse=True) == known[: len(gone)]  # the surest, and all of equal ones

    def released(groups: int) -> int:
        return sum(values.count(v) for v in known[:groups])

    distances = [abs(released(groups) - count) for groups in range(len(known) + 1)]
    assert len(gone) == distances.index(min(distances))


@given(st.integers(0, 10_000), st.sampled_from([None, 3, 10]))
def test_costs_fall_and_are_what_the_thresholds_cost(seed: int, steps: int | None) -> None:
    answers = random_answers(seed, 50, 4, steps)
    found = entries(answers)
    costs = [line.cost for line in found]
    assert costs == sorted(set(costs), reverse=True) and all(cost < 1 for cost in costs)
    for line in found:
        levels = answers.levels(line.thresholds)
        assert line.cost == pytest.approx((levels.double().mean() + 1) / 5)
        right = answers.correct[torch.arange(50), levels]
        assert line.accuracy == pytest.approx(right.double().mean())
    assert answers.levels(begin(answers)).tolist() == [4] * 50


@pytest.mark.parametrize("rule", RULES)
def test_one_pass_tells_what_any_thresholds_do(
    rule: str, runtime: VisionRuntime, data: ImageSet
) -> None:
    own = with_rule(runtime, **RULES[rule])
    answers = answers_of(own, data)
    limits = own.resolve(ComputePolicy())[:, 0]
    found = run(own, data, ComputePolicy())
    assert answers.levels(limits).tolist() == found.levels.tolist()
    assert found.trace.macs_per_image.tolist() == _at(answers.macs, found.levels).tolist()
    right = found.logits.argmax(1) == data.labels
    assert torch.equal(_at(answers.correct, found.levels), right)
    seen = set()
    everything = answers.confidence.flatten()
    for count in range(20, 180, 20):
        threshold = cut(everything, count, strict=False)
        levels = run(own, data, ComputePolicy(exit=ExitPolicy(threshold=threshold))).levels
        expected = answers.levels(torch.full((3,), threshold))
        near = close(answers.confidence, torch.tensor(threshold), rule)
        assert torch.equal(levels[~near].long(), expected[~near])
        assert near.sum() < 5
        seen |= set(levels.tolist())
    assert seen == {0, 1, 2, 3} or (rule == "patience" and len(seen) > 2)


def test_logits_that_are_not_finite_hold_an_image_back(tmp_path: Path) -> None:
    path = folder(tmp_path)
    runtime = load_vision(path)
    bias = runtime.container.tensors["exits.1.head.bias"]
    assert isinstance(bias, Tensor)
    broken = dict(runtime.container.tensors) | {
        "exits.1.head.bias": torch.where(torch.arange(7) == 2, math.inf, bias)
    }
    runtime = VisionRuntime(replace(runtime.container, tensors=broken))
    data = ImageSet("random", list(pixels(20)), torch.zeros(20, dtype=torch.int64))
    answers = answers_of(runtime, data)
    assert bool(answers.confidence[:, 1].isnan().all())
    record = calibrate_vision(runtime, data).record
    assert all(table[1] is None for table in record["thresholds"])
    levels = run(calibrated(runtime, record), data, ComputePolicy(budget=record["budgets"][-1]))
    assert 1 not in levels.levels.tolist() and 0 in levels.levels.tolist()


@pytest.mark.parametrize("rule", RULES)
def test_a_calibrated_model_keeps_what_the_record_says(
    rule: str, runtime: VisionRuntime, data: ImageSet
) -> None:
    own = with_rule(runtime, **RULES[rule])
    found = calibrate_vision(own, data, batch=7)
    record = found.record
    budgets = record["budgets"]
    assert record["kind"] == "exits" and record["samples"] == 60
    assert record["data_sha256"] == data.sha256 and record["default_budget"] is None
    assert budgets[0] == 1.0 and budgets == sorted(set(budgets), reverse=True)
    # Whole numbers of heads that agree leave little to choose.
    assert len(budgets) > (2 if rule == "patience" else 15)
    confidence = answers_of(own, data).confidence
    again = calibrated(own, record)
    for i, (budget, kept) in enumerate(zip(budgets, record["kept"], strict=True)):
        output = run(again, data, ComputePolicy(budget=budget))
        trace = output.trace
        near = close(confidence, torch.tensor(record["thresholds"][i]), rule)
        slack = 1e-12 + float(near.double().mean())
        assert trace.macs_executed / trace.macs_dense == pytest.approx(kept, abs=slack)
        right = (output.logits.argmax(1) == data.labels).double().mean()
        assert found.qualities[i].accuracy == pytest.approx(float(right), abs=slack)
        if budget < 1:
            assert kept == budget
        else:
            assert set(trace.levels.tolist()) == {3}
    # Between two entries, and without any.
    between = (budgets[0] + budgets[1]) / 2, (budgets[1] + budgets[2]) / 2
    for budget in between:
        run(again, data, ComputePolicy(budget=budget))
    assert torch.equal(run(again, data, ComputePolicy()).levels,
                       run(own, data, ComputePolicy()).levels)  # fmt: skip


def test_the_record_is_written_and_read(tmp_path: Path) -> None:
    path = folder(tmp_path, exits=2)
    runtime = load_vision(path)
    data = labelled(runtime, 40, seed=5)
    record = calibrate_vision(runtime, data, default_budget=0.8).record
    write_calibration(path, record)
    again = load_vision(path)
    assert again.calibration is not None and again.calibration.record == record
    levels = run(again, data, ComputePolicy()).levels
    assert torch.equal(levels, run(again, data, ComputePolicy(budget=0.8)).levels)


@pytest.mark.parametrize("max_drop", [0.0, 0.05, 0.2, 1.0])
def test_the_default_stays_within_the_drop(
    runtime: VisionRuntime, data: ImageSet, max_drop: float
) -> None:
    found = calibrate_vision(runtime, data, max_drop=max_drop)
    record = found.record
    chosen = record["default_budget"]
    floor = found.qualities[0].accuracy - max_drop
    pairs = list(zip(record["budgets"], found.qualities, strict=True))
    assert chosen == min(budget for budget, quality in pairs if quality.accuracy >= floor)
    output = run(calibrated(runtime, record), data, ComputePolicy())
    whole = run(runtime, data, ComputePolicy(exit="never"))
    drop = [(o.logits.argmax(1) == data.labels).double().mean() for o in (whole, output)]
    assert drop[0] - drop[1] <= max_drop + 1e-9
    if max_drop == 1.0:
        assert chosen == record["budgets"][-1]


def test_refusals(tmp_path: Path, runtime: VisionRuntime, data: ImageSet) -> None:
    few = ImageSet("few", data.images[: MIN_IMAGES - 1], data.labels[: MIN_IMAGES - 1])
    with pytest.raises(InvalidInput, match="at least 16 images, the data has 15"):
        calibrate_vision(runtime, few)
    with pytest.raises(InvalidInput, match="not both"):
        calibrate_vision(runtime, data, default_budget=0.5, max_drop=0.1)
    with pytest.raises(InvalidInput, match="drop must be 0 or more"):
        calibrate_vision(runtime, data, max_drop=-0.1)
    with pytest.raises(InvalidInput, match=r"default budget 0\.1: the smallest of this model is"):
        calibrate_vision(runtime, data, default_budget=0.1)
    with pytest.raises(InvalidInput, match="budget must be"):
        calibrate_vision(runtime, data, default_budget=1.5)
    with pytest.raises(InvalidInput, match="batch must be at least 1"):
        calibrate_vision(runtime, data, batch=0)
    with pytest.raises(InvalidInput, match="no exits and no mixed scales: there is"):
        calibrate_vision(opened(tmp_path, exits=0), data)


def _at(table: Tensor, levels: Tensor) -> Tensor:
    return table[torch.arange(len(levels)), levels.long()]
