"""What the measured times mean, on a model whose clock is part of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyruntime.engine import stage_times
from pyruntime.engine.stage_times import StageTimes, rebatching_threshold
from pyruntime.gates.scale import ScaleChoice
from pyruntime.layers.packed import Packed
from pyruntime.models.vit import Ran
from tests.engine import vision_fakes as fakes

pytestmark = pytest.mark.usefixtures("one_thread")


class TimedVision(fakes.FakeVision):
    """Takes as long as it says: a call of a stage 2 + 4 per image and block, in milliseconds; the
    last one half of that."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.now = 0.0
        self.fixed = 2.0

    def run_stage(self, packed: Packed, stage: int, features: bool = False) -> Ran:
        blocks = len(self.stages[stage])
        whole = (self.fixed + 4.0 * packed.count) * blocks
        self.now += 1e-3 * whole / (2 if stage == len(self.stages) - 1 else 1)
        self.calls.append((stage, packed.count))
        return Ran(packed, self.cost.stage_of(stage, packed.lengths))

    def exit(self, *args: Any) -> Any:
        self.now += 1e-3 * 0.5
        return super().exit(*args)

    def embed(self, images: torch.Tensor, choice: ScaleChoice | None = None) -> Packed:
        self.now += 1e-3 * len(images)
        return super().embed(images, choice)

    def classify(self, packed: Packed) -> torch.Tensor:
        self.now += 1e-3 * 0.25
        return super().classify(packed)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> TimedVision:
    model = TimedVision(fakes.spec())

    class Clock:
        @staticmethod
        def perf_counter() -> float:
            return model.now

    monkeypatch.setattr(stage_times, "time", Clock)
    return model


def times(model: TimedVision, **options: Any) -> StageTimes:
    return StageTimes(model, **options)  # type: ignore[arg-type]  # a fake


def test_parts_are_measured_when_first_asked_and_once(model: TimedVision) -> None:
    found = times(model, part_seconds=100.0)
    assert model.calls == []
    found.stage(0, 3)
    measured = len(model.calls)
    assert measured == 5 * 4 and {count for _, count in model.calls} == {1, 2, 4, 8, 16}
    found.stage(2, 7)  # as long as the first
    assert len(model.calls) == measured


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 40])
def test_times_between_and_beyond_the_measured_numbers(model: TimedVision, count: int) -> None:
    found = times(model)
    assert found.stage(0, count) == pytest.approx(1e-3 * 2 * (2 + 4 * count))
    assert found.stage(4, count) == pytest.approx(1e-3 * (2 + 4 * count) / 2)
    assert found.rest(2, count) == pytest.approx(1e-3 * 4.5 * (2 + 4 * count))
    assert found.exit(count) == pytest.approx(0.5e-3)
    assert found.dense(count) == pytest.approx(1e-3 * (count + 0.25) + found.rest(0, count))


def test_no_images_take_no_time(model: TimedVision) -> None:
    found = times(model)
    assert found.stage(0, 0) == found.dense(0) == found.exit(0) == found.move(0) == 0.0
    assert found.ideal([]) == 0.0


def test_slow_models_are_measured_for_few_images(model: TimedVision) -> None:
    model.fixed = 500.0
    times(model).stage(0, 1)
    assert {count for _, count in model.calls} == {1, 2}


def test_a_disturbed_measurement_does_not_make_fewer_images_slower(
    model: TimedVision, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = stage_times._seconds
    monkeypatch.setattr(
        stage_times, "_seconds", lambda run: honest(run) + (9.0 if model.calls[-1][1] == 2 else 0)
    )
    found = times(model, part_seconds=1e9)
    curve = [found.stage(0, n) for n in range(1, 20)]
    assert curve == sorted(curve) and max(curve) < 1.0


def test_compaction_pays_when_the_stages_left_gain_more_than_the_move(
    model: TimedVision, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = times(model)
    monkeypatch.setattr(found, "move", lambda count: 1e-3 * 9.0)
    assert found.compaction_pays(3, 8, 7)  # 2.5 blocks of 4 ms
    assert not found.compaction_pays(4, 8, 7)  # half a block
    assert found.compaction_pays(4, 8, 3)
    assert not found.compaction_pays(0, 8, 8) and not found.compaction_pays(0, 8, 0)


def test_the_ideal_is_the_sum_of_the_parts_that_run(
    model: TimedVision, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = times(model)
    monkeypatch.setattr(found, "move", lambda count: 1e-3 * 0.125 if count else 0.0)

    def block(count: int) -> float:
        return 2 + 4 * count

    # four images at stages 0 and 1, two at 2 and 3, one at the end
    levels = [1, 4, 1, 3]
    blocks = 2 * (2 * block(4) + 2 * block(2)) + block(1) / 2
    expected = 4 + blocks + 4 * 0.5 + 2 * 0.125 + 0.25
    assert found.ideal(levels) == pytest.approx(1e-3 * expected)
    assert found.ideal(torch.tensor(levels)) == pytest.approx(1e-3 * expected)
    assert found.ideal([0] * 8) == pytest.approx(1e-3 * (8 + 2 * block(8) + 0.5))
    full = found.dense(4) + 4 * found.exit(4)
    assert found.ideal([4] * 4) == pytest.approx(full)


def test_the_rebatching_threshold_of_drex() -> None:
    """Overhead 6 + 6 - 10 = 2: of 16 rows more than 5.33 must leave."""
    found = rebatching_threshold(6.0, 6.0, 10.0, 16)
    assert found == pytest.approx(16 / 3)
    assert [leaving > found for leaving in (5, 6)] == [False, True]


def test_waiting_pays_where_a_call_costs_more_than_its_images(model: TimedVision) -> None:
    model.fixed = 0.0
    linear = times(model)
    assert [linear.target(stage, 32) for stage in (1, 4)] == [1, 1]
    model.fixed = 400.0
    steep = times(model)
    target = steep.target(1, 32)
    assert target > 16
    # by definition: alone it takes at least a tenth longer than its share of a full wave
    alone, share = steep.stage(1, target - 1), (target - 1) / 32 * steep.stage(1, 32)
    assert alone * 0.9 > share + steep.move(target - 1)


def test_a_model_without_exits_is_timed_too(model: TimedVision) -> None:
    one = TimedVision(fakes.spec(0))
    model.now = 0.0
    found = times(one)
    assert found.rest(0, 4) == found.stage(0, 4)


def test_work_is_in_proportion_to_the_products_of_a_block(model: TimedVision) -> None:
    found, spec = times(model), model.spec
    full = spec.tokens
    assert found.work([full] * 3) == 3.0 and found.work([]) == 0.0

    def block(rows: int) -> float:
        d, mlp = spec.hidden_size, spec.mlp_size
        return rows * (4 * d * d + 2 * d * mlp) + 2 * rows * rows * d

    assert found.work([2, full, 9]) == pytest.approx(1 + (block(2) + block(9)) / block(full))


def test_less_than_one_image_takes_its_share(model: TimedVision) -> None:
    found = times(model)
    assert found.stage(0, 0.25) == pytest.approx(found.stage(0, 1) / 4)
    assert found.stage(0, 2.5) == pytest.approx(1e-3 * 2 * (2 + 4 * 2.5))
    levels = [1, 4, 1, 3]
    assert found.ideal(levels, [1.0] * 4) == pytest.approx(found.ideal(levels))
    short = found.ideal([4] * 4, [0.5] * 4)
    assert short == pytest.approx(found.dense(2) + 4 * found.exit(2))
    assert found.ideal(levels, [0.5, 1.0, 0.25, 1.0]) < found.ideal(levels)
