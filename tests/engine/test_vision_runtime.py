"""Batches of images: levels, logits and counts are those of every image alone, however it runs."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pyruntime
from pyruntime import ComputePolicy, ExitPolicy
from pyruntime.engine.runtime import Runtime
from pyruntime.engine.vision import Compaction, VisionRuntime
from pyruntime.errors import FormatError, InvalidInput
from pyruntime.format.spec import ExitSpec
from tests.engine import vision_fakes as fakes
from tests.profile.models import ungated

pytestmark = pytest.mark.usefixtures("one_thread")

COMPACTIONS = get_args(Compaction)
EXITS = 4


def policy(level: int) -> ComputePolicy:
    return ComputePolicy(exit=ExitPolicy(never=True) if level == EXITS else ExitPolicy(level=level))


def never() -> ComputePolicy:
    return ComputePolicy(exit="never")


@given(
    count=st.sampled_from([1, 2, 7, 64]),
    seed=st.integers(0, 2**32 - 1),
    threshold=st.none() | st.floats(-2, 12),
    compaction=st.sampled_from(COMPACTIONS),
)
def test_everyone_gets_what_it_gets_alone(
    count: int, seed: int, threshold: float | None, compaction: Compaction
) -> None:
    runtime = fakes.runtime()
    images = fakes.images(count, seed)
    asked = None if threshold is None else ComputePolicy(exit=threshold)
    output = runtime.forward(images, asked, compaction=compaction)
    assert output.levels.dtype == torch.int32 and output.logits.dtype == torch.float32
    for i, image in enumerate(images):
        level, logits = fakes.alone(runtime.model, image, runtime.resolve(asked))
        assert int(output.levels[i]) == level
        assert torch.equal(output.logits[i], logits)
    assert torch.equal(output.trace.levels, output.levels)


@given(st.lists(st.integers(0, EXITS), max_size=20), st.sampled_from(COMPACTIONS))
def test_any_pattern_of_exits_keeps_the_order(levels: list[int], compaction: Compaction) -> None:
    """All, none, the first, the last, every second one: whatever is drawn."""
    runtime = fakes.runtime()
    images = fakes.images(len(levels))
    output = runtime.forward(images, [policy(level) for level in levels], compaction=compaction)
    assert output.levels.tolist() == levels
    for i, level in enumerate(levels):
        expected = fakes.alone(runtime.model, images[i], runtime.resolve(policy(level)))
        assert torch.equal(output.logits[i], expected[1])


@given(st.permutations(range(16)))
def test_the_order_of_a_batch_does_not_matter(order: list[int]) -> None:
    runtime, images = fakes.runtime(), fakes.images(16)
    straight, mixed = runtime.forward(images), runtime.forward(images[order])
    assert torch.equal(straight.levels[order], mixed.levels)
    assert torch.equal(straight.logits[order], mixed.logits)


def test_never_is_the_backbone() -> None:
    runtime, images = fakes.runtime(), fakes.images(9)
    output = runtime.forward(images, never())
    assert output.levels.tolist() == [EXITS] * 9
    assert torch.equal(output.logits, runtime.model.forward(images))
    assert output.trace.paths == {"all": 4, "packed": 0, "carried": 0, "none": 0}


def test_when_all_leave_no_later_stage_is_called() -> None:
    runtime, images = fakes.runtime(), fakes.images(9)
    output = runtime.forward(images, policy(0))
    assert output.levels.tolist() == [0] * 9
    assert fakes.fake_of(runtime).calls == [(0, 9)]
    assert output.trace.stage_images == (9,)
    assert output.trace.paths == {"all": 0, "packed": 0, "carried": 0, "none": 1}


def test_an_empty_batch_calls_nothing() -> None:
    runtime = fakes.runtime()
    for asked in (None, []):
        output = runtime.forward(torch.empty(0, 3, 4, 4), asked)
        assert output.logits.shape == (0, fakes.CLASSES) and output.levels.shape == (0,)
        assert output.trace.macs_executed == 0 and output.trace.stage_images == ()
    assert fakes.fake_of(runtime).calls == []


def test_a_model_without_exits() -> None:
    runtime, images = fakes.runtime(fakes.spec(0)), fakes.images(3)
    for asked in (None, never(), ComputePolicy(budget=1.0)):
        output = runtime.forward(images, asked)
        assert output.levels.tolist() == [0] * 3
        assert torch.equal(output.logits, runtime.model.forward(images))
        assert output.trace.macs_executed == output.trace.macs_dense
    with pytest.raises(InvalidInput, match="none to choose from"):
        runtime.forward(images, ComputePolicy(exit=0.5))
    with pytest.raises(InvalidInput, match="needs a model with exits or mixed scales"):
        runtime.forward(images, ComputePolicy(budget=0.5))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("compaction", COMPACTIONS)
def test_images_without_finite_logits_run_to_the_end(bad: float, compaction: Compaction) -> None:
    runtime, images = fakes.runtime(), fakes.images(8)
    expected = runtime.forward(images, policy(1))
    images[3] = bad
    fakes.fake_of(runtime).calls.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fakes, "BOOM", math.inf)
        output = runtime.forward(images, policy(1), compaction=compaction)
    others = [0, 1, 2, 4, 5, 6, 7]
    assert output.levels.tolist() == [1, 1, 1, EXITS, 1, 1, 1, 1]
    assert torch.equal(output.logits[others], expected.logits[others])
    assert not bool(output.logits[3].isfinite().any())


@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 20),
    compaction=st.sampled_from(COMPACTIONS),
)
def test_the_trace_counts_what_was_called(seed: int, count: int, compaction: Compaction) -> None:
    runtime = fakes.runtime()
    trace = runtime.forward(fakes.images(count, seed), compaction=compaction).trace
    cost = runtime.model.cost
    calls = [call for call in fakes.fake_of(runtime).calls if call[1] <= count]
    calls = calls[-len(trace.stage_images) :]  # what was timed comes before
    if compaction != "measured":
        assert [images for _, images in calls] == list(trace.stage_images)
    executed = count * cost.stem
    for stage, images in enumerate(trace.stage_images):
        head = cost.head if stage == EXITS else cost.exits[stage]
        executed += images * (cost.stage(stage) + head)
    assert trace.macs_executed == executed
    if compaction == "always":
        assert torch.equal(trace.macs_per_image, cost.executed(trace.levels))
        assert trace.carried == 0
    else:
        assert bool((trace.macs_per_image >= cost.executed(trace.levels)).all())
    assert trace.carried == int((trace.stages - trace.levels - 1).sum())
    assert trace.macs_dense == count * cost.dense()
    assert trace.per_image_compute().tolist() == pytest.approx(
        (trace.macs_per_image / cost.dense()).tolist()
    )
    assert sum(trace.paths.values()) == min(len(trace.stage_images), EXITS)


def test_masked_evaluation_saves_nothing_and_compaction_does() -> None:
    runtime, images = fakes.runtime(), fakes.images(64)
    masked = runtime.forward(images, compaction="never").trace
    compact = runtime.forward(images, compaction="always").trace
    assert masked.stage_images == (64,) * 5
    assert masked.carried > 0 and masked.paths["carried"] == 4
    assert compact.paths["packed"] == 4
    assert compact.macs_executed < masked.macs_executed
    assert compact.stage_images == tuple(
        int((compact.levels >= stage).sum()) for stage in range(EXITS + 1)
    )


@pytest.mark.parametrize("pays", [False, True])
def test_rows_ride_along_where_moving_does_not_pay(
    pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, images = fakes.runtime(), fakes.images(32)
    asked: list[tuple[int, int, int]] = []

    def answer(stage: int, before: int, after: int) -> bool:
        asked.append((stage, before, after))
        return pays

    monkeypatch.setattr(runtime.times, "compaction_pays", answer)
    trace = runtime.forward(images).trace
    assert trace.paths["packed" if pays else "carried"] == len(asked) > 0
    assert all(before > after > 0 for _, before, after in asked)


@pytest.mark.parametrize("compaction", COMPACTIONS)
def test_decisions_of_a_trace_are_repeated(compaction: Compaction) -> None:
    """Those who are told to leave at one exit alone would stay at the next, were they asked."""
    runtime, images = fakes.runtime(), fakes.images(40)
    first = runtime.forward(images)
    again = runtime.forward(images, never(), replay=first.trace, compaction=compaction)
    assert torch.equal(again.levels, first.levels) and torch.equal(again.logits, first.logits)
    levels = torch.randint(0, EXITS + 1, (40,))
    told = runtime.forward(images, replay=levels, compaction=compaction)
    assert torch.equal(told.levels, levels.int())
    expected = runtime.forward(images, [policy(int(level)) for level in levels])
    assert torch.equal(told.logits, expected.logits)


def test_levels_that_are_refused() -> None:
    runtime, images = fakes.runtime(), fakes.images(40)
    levels = torch.zeros(40, dtype=torch.int32)
    for wrong, message in {
        torch.tensor([0.0] * 40): "expected int32",
        levels[:3]: "expected int32",
        levels + 5: r"must be in \[0, 4\]",
        levels - 9: r"must be in \[0, 4\]",
    }.items():
        with pytest.raises(InvalidInput, match=f"replay: .*{message}"):
            runtime.forward(images, replay=wrong)


@given(st.floats(-3, 12), st.floats(-3, 12))
def test_a_higher_threshold_never_lowers_a_level(a: float, b: float) -> None:
    runtime, images = fakes.runtime(), fakes.images(32)
    low = runtime.forward(images, ComputePolicy(exit=min(a, b)))
    high = runtime.forward(images, ComputePolicy(exit=max(a, b)))
    assert bool((low.levels <= high.levels).all())


def test_results_can_be_trained_on() -> None:
    """They are no inference tensors."""
    weight = torch.ones(fakes.CLASSES, requires_grad=True)
    (fakes.runtime().forward(fakes.images(2)).logits @ weight).sum().backward()
    assert weight.grad is not None


def test_images_of_other_libraries() -> None:
    runtime, images = fakes.runtime(), fakes.images(3)
    assert torch.equal(runtime.forward(images.numpy()).logits, runtime.forward(images).logits)
    backwards = runtime.forward(images.numpy()[::-1])
    assert torch.equal(backwards.logits.flip(0), runtime.forward(images).logits)
    strided = images.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    assert torch.equal(runtime.forward(strided).logits, runtime.forward(images).logits)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 4, 4), r"float32 \[B, 3, 4, 4\], .*got torch.float32 \[3, 4, 4\]"),
        (torch.zeros(2, 1, 4, 4), r"got torch.float32 \[2, 1, 4, 4\]"),
        (torch.zeros(2, 3, 4, 5), r"got torch.float32 \[2, 3, 4, 5\]"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.float64), "got torch.float64"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "got torch.uint8"),
        (3, "images: expected an array, got int"),
        ([[1.0]], "image 0: expected an array, got list"),
    ],
)
def test_images_that_are_refused(images: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        fakes.runtime().forward(images)


def test_arguments_that_are_refused() -> None:
    runtime, images = fakes.runtime(), fakes.images(3)
    with pytest.raises(InvalidInput, match="2 policies for 3 images"):
        runtime.forward(images, [None, None])
    with pytest.raises(InvalidInput, match="compaction must be"):
        runtime.forward(images, compaction="often")  # type: ignore[arg-type]


def test_folders_are_opened_by_what_they_hold(tmp_path: Any) -> None:
    with pytest.raises(FormatError, match=r"a vision transformer; .* pyruntime\.Classifier"):
        Runtime(fakes.container())
    with pytest.raises(FormatError, match="no vision transformer"):
        pyruntime.load_vision(ungated(tmp_path))
    with pytest.raises(FormatError, match="kind 'experts', expected 'exits'"):
        fakes.runtime(calibration=fakes.calibration(kind="experts"))


# ---- what policies mean ----


def limits(asked: ComputePolicy | None, runtime: VisionRuntime | None = None) -> list[list[float]]:
    found = (runtime or fakes.runtime(jei_dnn())).resolve(asked)
    assert found.dtype == torch.float32 and found.shape == (3, 2)
    return found.nan_to_num(99.0, posinf=98.0, neginf=-98.0).tolist()


def jei_dnn() -> Any:
    """Exits with rules of their own: two of JEI-DNN, one that nobody takes."""
    exits = (
        ExitSpec(1, "jei_dnn", 1.0),
        ExitSpec(2, "jei_dnn", 1.0, tau=0.25),
        ExitSpec(3, "max_prob", None),
    )
    return fakes.spec(num_layers=5, exits=exits)


@pytest.mark.parametrize(
    ("exit_", "expected"),
    [
        (None, [[1.0, 2.0], [1.0, 4.0], [99.0, 2.0]]),
        ("never", [[99.0, 2.0], [99.0, 4.0], [99.0, 2.0]]),
        (0.5, [[0.5, 2.0], [0.5, 4.0], [0.5, 2.0]]),
        ({"tau": 0.2}, [[1.0, 5.0], [1.0, 5.0], [99.0, 5.0]]),
        ({"level": 0}, [[-98.0, 2.0], [-98.0, 4.0], [-98.0, 2.0]]),
        ({"level": 1}, [[99.0, 2.0], [-98.0, 4.0], [-98.0, 2.0]]),
        ({"level": 2, "threshold": 0.75}, [[0.75, 2.0], [0.75, 4.0], [-98.0, 2.0]]),
        ({"level": 1, "tau": 1.0}, [[1.0, 1.0], [-98.0, 1.0], [-98.0, 1.0]]),
    ],
)
def test_exit_policies_as_limits(exit_: Any, expected: list[list[float]]) -> None:
    assert limits(ComputePolicy(exit=exit_)) == expected


def calibrated(**changes: Any) -> VisionRuntime:
    record = fakes.calibration(
        budgets=[1.0, 0.8, 0.5],
        thresholds=[[0.9, 0.8, None], [0.7, 0.6, None], [0.3, 0.2, None]],
    )
    return fakes.runtime(jei_dnn(), record | changes)


@pytest.mark.parametrize(
    ("budget", "thresholds"),
    [
        (1.0, [99, 99, 99]),
        (0.9, [0.8, 0.7, 99]),
        (0.8, [0.7, 0.6, 99]),
        (0.65, [0.5, 0.4, 99]),
        (0.5, [0.3, 0.2, 99]),  # the smallest budget is an entry like the others
    ],
)
def test_budgets_as_limits(budget: float, thresholds: list[float]) -> None:
    found = limits(ComputePolicy(budget=budget), calibrated())
    assert [row[0] for row in found] == pytest.approx(thresholds)
    assert [row[1] for row in found] == [2.0, 4.0, 2.0]


def test_the_default_budget_or_the_own_rule() -> None:
    own = [[1.0, 2.0], [1.0, 4.0], [99.0, 2.0]]
    assert limits(None, calibrated()) == own
    assert limits(None, calibrated(default_budget=1.0))[0][0] == 99
    assert limits(None, calibrated(default_budget=0.8))[0][0] == pytest.approx(0.7)
    chosen = ComputePolicy(exit=0.5)
    assert limits(chosen, calibrated(default_budget=0.8))[0] == [0.5, 2.0]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (ComputePolicy(budget=0.5, exit=0.5), "give one of them"),
        (ComputePolicy(budget=0.4), "smallest of this model is 0.5"),
        (ComputePolicy(exit=ExitPolicy(level=3)), "level 3 asked for, .* exits 0 to 2"),
        (ComputePolicy(mode="batch_quantile"), "rule of residual gates"),
        (ComputePolicy(experts=1), "experts is set"),
        (ComputePolicy(kv_mode="copy"), "kv_mode is set"),
        (ComputePolicy(branches=("mlp",)), "residual gates"),
        (ComputePolicy(every_second_layer=True), "residual gates"),
    ],
)
def test_policies_that_are_refused(asked: ComputePolicy, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        calibrated().resolve(asked)


def test_what_a_model_lacks_is_named() -> None:
    with pytest.raises(InvalidInput, match="run `pyruntime calibrate` first"):
        fakes.runtime().resolve(ComputePolicy(budget=0.5))
    with pytest.raises(InvalidInput, match="tau belongs to JEI-DNN"):
        fakes.runtime().resolve(ComputePolicy(exit=ExitPolicy(tau=0.5)))
    none = calibrated(thresholds=[[None] * 3, [0.7, 0.6, None], [0.3, 0.2, None]])
    with pytest.raises(InvalidInput, match=r"stored between 1\.0 and 0\.8"):
        none.resolve(ComputePolicy(budget=0.9))


def test_many_budgets_do_not_pile_up() -> None:
    runtime = calibrated()
    for i in range(200):
        runtime.resolve(ComputePolicy(budget=0.5 + i / 1000))
    assert len(runtime.limits._tables) <= 64
