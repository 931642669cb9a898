"""Mixed scales, with exits and without: budgets are what they cost, and sweeps count exactly."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from pyruntime.cli import main
from pyruntime.engine.images import Preprocessor
from pyruntime.engine.vision import VisionOutput, VisionRuntime, load_vision
from pyruntime.errors import InvalidInput
from pyruntime.format.load import write_calibration
from pyruntime.format.spec import ScaleSpec
from pyruntime.gates.policy import ComputePolicy
from pyruntime.profile import report
from pyruntime.profile.image_data import ImageSet
from pyruntime.profile.scale_thresholds import SHARES, cuts
from pyruntime.profile.vision_calibrate import Line, calibrate_vision, front
from pyruntime.profile.vision_sweep import sweep_vision
from tests.engine.scale_models import runtime_of, scale_spec

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = Path(__file__).resolve().parents[1] / "data"
SPECS: dict[str, Any] = {
    "exits": scale_spec("exits"),
    "no exits": scale_spec("no exits"),
    "variance": scale_spec("three scales"),
    "entropy": scale_spec("no exits", scales=ScaleSpec((2,), source="entropy", thresholds=(5.0,))),
}


@pytest.fixture(scope="module", params=SPECS)
def runtime(request: pytest.FixtureRequest) -> VisionRuntime:
    return runtime_of(SPECS[request.param])


@pytest.fixture(scope="module")
def data(runtime: VisionRuntime) -> ImageSet:
    return scenes(runtime)


def scenes(runtime: VisionRuntime, count: int = 40, seed: int = 0) -> ImageSet:
    """Blotches of different contrast in half of every image; the fine answer is right four times in
    five."""
    random = np.random.default_rng(seed)
    height, width = runtime.spec.image_size
    noise = random.standard_normal((count, height, width, 3))
    noise[:, : height // 2] *= random.uniform(0, 90, (count, 1, 1, 1))
    noise[:, height // 2 :] *= random.uniform(0, 90, (count, 1, 1, 1))
    images = list((128 + noise).clip(0, 255).astype(np.uint8))
    data = ImageSet("random", images, torch.zeros(count, dtype=torch.int64))
    logits = run(runtime, data, ComputePolicy(budget=1.0)).logits
    wrong = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.2
    return replace(data, labels=torch.where(wrong, 3, logits.argmax(1)))


def run(runtime: VisionRuntime, data: ImageSet, policy: ComputePolicy | None) -> VisionOutput:
    preprocess = Preprocessor(runtime.spec.preprocess, runtime.spec.image_size)
    images, _ = data.batch(preprocess, torch.arange(len(data)))
    return runtime.forward(images, policy, compaction="always")


def calibrated(runtime: VisionRuntime, record: dict[str, Any]) -> VisionRuntime:
    return VisionRuntime(replace(runtime.container, calibration=record))


def test_a_budget_is_what_it_costs(runtime: VisionRuntime, data: ImageSet) -> None:
    found = calibrate_vision(runtime, data, batch=7)
    record = found.record
    budgets, exits = record["budgets"], len(runtime.spec.exits)
    assert record["kind"] == "scales" and record["samples"] == 40
    assert budgets[0] == 1.0 and budgets == sorted(set(budgets), reverse=True)
    assert len(budgets) > 1 and record["default_budget"] is None
    assert record["thresholds"][0] == [None] * (1 + exits)
    again = calibrated(runtime, record)
    accuracies = []
    for i, (budget, kept) in enumerate(zip(budgets, record["kept"], strict=True)):
        output = run(again, data, ComputePolicy(budget=budget))
        trace = output.trace
        assert trace.macs_executed / trace.macs_dense == pytest.approx(kept, abs=0.03)
        accuracies.append(float((output.logits.argmax(1) == data.labels).double().mean()))
        assert found.qualities[i].accuracy == pytest.approx(accuracies[-1], abs=0.03)
        if budget < 1:
            assert kept == budget
        else:
            assert set(trace.tokens.tolist()) == {runtime.spec.tokens}
            assert set(output.levels.tolist()) == {exits}
    # The front: whoever is cheaper is less accurate.
    for more, less in itertools.pairwise(found.qualities[1:]):
        assert less.accuracy < more.accuracy
    own = run(again, data, None)
    assert torch.equal(own.logits, run(runtime, data, None).logits)


def test_a_model_with_both_saves_in_both_places() -> None:
    runtime = runtime_of(SPECS["exits"])
    record = calibrate_vision(runtime, scenes(runtime)).record
    rows = record["thresholds"][1:]
    assert any(row[0] is not None and any(v is not None for v in row[1:]) for row in rows)


@pytest.mark.parametrize("max_drop", [0.0, 0.1, 1.0])
def test_the_default_stays_within_the_drop(
    runtime: VisionRuntime, data: ImageSet, max_drop: float
) -> None:
    found = calibrate_vision(runtime, data, max_drop=max_drop)
    record = found.record
    floor = found.qualities[0].accuracy - max_drop
    pairs = zip(record["budgets"], found.qualities, strict=True)
    expected = min(budget for budget, quality in pairs if quality.accuracy >= floor)
    assert record["default_budget"] == expected
    whole, output = (
        run(one, data, policy)
        for one, policy in ((runtime, ComputePolicy(budget=1.0)),
                            (calibrated(runtime, record), None))
    )  # fmt: skip
    drop = [(o.logits.argmax(1) == data.labels).double().mean() for o in (whole, output)]
    assert drop[0] - drop[1] <= max_drop + 0.03


@given(st.lists(st.floats(-50, 50, width=32) | st.sampled_from([math.nan, math.inf]), max_size=99))
def test_cuts_divide_the_scores(values: list[float]) -> None:
    scores = torch.tensor(values, dtype=torch.float32)
    found = cuts(scores)
    assert len(found) <= len(SHARES) and not any(math.isnan(cut) for cut in found)
    shares = [float((~(scores < cut)).double().mean()) for cut in found]
    assert shares == sorted(shares)
    finite = scores[scores.isfinite()]
    if len(finite):
        assert shares[0] == pytest.approx(1 - len(finite) / len(values))  # all coarse
    if len(finite.unique()) == len(values):
        for share, wanted in zip(
            shares, [s for s in SHARES if s * len(values) >= 0.5], strict=False
        ):
            assert share == 0 or abs(share - wanted) < 0.51


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), max_size=30))
def test_the_front(pairs: list[tuple[int, int]]) -> None:
    lines = [Line(float(cost), float(accuracy), []) for cost, accuracy in pairs]
    found = front(lines)
    for line in lines:
        dominated = any(
            other.cost <= line.cost and other.accuracy >= line.accuracy
            and (other.cost, other.accuracy) != (line.cost, line.accuracy)
            for other in lines
        )  # fmt: skip
        assert (line in found) == (not dominated)
    assert [line.cost for line in found] == sorted({line.cost for line in found}, reverse=True)


def test_a_sweep(runtime: VisionRuntime, data: ImageSet) -> None:
    spec = runtime.spec
    least = run(runtime, data, ComputePolicy(scales="all_coarse")).trace.tokens[0]
    coarse = int(least) - spec.prefix_tokens
    values = (coarse, coarse + 9)
    found = sweep_vision(runtime, data, values, axis="tokens", batch=10, repeats=1)
    rules = ["dense", "own", "coarse", "tokens", "tokens"]
    assert [row.rule for row in found.rows] == rules
    policies = [ComputePolicy(), ComputePolicy(scales="all_coarse")]
    policies += [ComputePolicy(scales={"tokens": value}) for value in values]  # type: ignore[arg-type]
    for row, policy in zip(found.rows[1:], policies, strict=True):
        output = run(runtime, data, policy)
        trace, quality = output.trace, row.quality
        assert quality.macs_executed == trace.macs_executed
        assert quality.macs_dense == trace.macs_dense == 40 * runtime.macs_dense
        assert quality.mean_tokens == pytest.approx(float(trace.tokens.double().mean()))
        right = (output.logits.argmax(1) == data.labels).double().mean()
        assert quality.accuracy == pytest.approx(float(right))
        assert 0 < row.ideal_share and row.timed.seconds > 0
    dense, own, all_coarse, first, second = found.rows
    assert dense.quality.mean_tokens == spec.tokens and dense.ideal_share == 1
    assert all_coarse.quality.mean_tokens == first.quality.mean_tokens == int(least)
    assert all_coarse.ideal_share == first.ideal_share <= own.ideal_share <= 1.2
    assert first.quality.mean_tokens < second.quality.mean_tokens <= int(least) + 9
    table = report.text(found)
    assert "mean tokens" in table and ("mean level" in table) == bool(spec.exits)
    assert ("left at" in table) == bool(spec.exits)
    page, plain = report.to_html(found), json.loads(report.to_json(found))
    assert page.count("<circle") == 2 * 3  # work and time of all but dense and all coarse
    assert [row["tokens"] for row in plain["rows"]][3:] == [*values]


def test_the_axes_of_a_model() -> None:
    nothing = ImageSet("none", [Path("none")], torch.zeros(1, dtype=torch.int64))
    both, one = runtime_of(SPECS["exits"]), runtime_of(SPECS["no exits"])
    for model, axis, values, message in (
        (both, "mass", (0.5,), "one of budget, exit, tau, level, scales, tokens, not 'mass'"),
        (one, "level", (1,), "one of budget, scales, tokens, not 'level'"),
        (one, "tokens", (2,), "tokens=2, but all coarse the image has 6"),
        (one, "tokens", (9.5,), "tokens must be an integer"),
        (one, "budget", (0.5,), "run `pyruntime calibrate`"),
        (one, "scales", (0.0,), "none: No such file"),
        (both, "level", (1,), "none: No such file"),
    ):
        with pytest.raises(InvalidInput, match=message):
            sweep_vision(model, nothing, values, axis=axis)


def test_an_axis_leaves_the_rest_to_the_checkpoint() -> None:
    runtime = runtime_of(SPECS["exits"])
    data = scenes(runtime)
    ready = calibrated(runtime, calibrate_vision(runtime, data, max_drop=1.0).record)
    for axis, value in (("level", 1), ("scales", 0.5)):
        found = sweep_vision(ready, data, (value,), axis=axis, repeats=1)
        expected = sweep_vision(runtime, data, (value,), axis=axis, repeats=1)
        pairs = zip(found.rows, expected.rows, strict=True)
        assert all(a.quality == b.quality for a, b in pairs)


def test_sources_without_a_threshold_cannot_be_calibrated() -> None:
    scales = ScaleSpec((2,), source="all_coarse")
    runtime = runtime_of(scale_spec("no exits", scales=scales))
    with pytest.raises(InvalidInput, match="chosen by 'all_coarse', which has no threshold"):
        calibrate_vision(runtime, scenes(runtime))


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tmp_path / "model")
    golden = load_file(DATA / "vectors.safetensors")
    images = golden["images_u8_nhwc"].numpy()
    np.savez(tmp_path / "d.npz", images=images, labels=golden["labels"].numpy())
    assert main(["convert", str(DATA / "msvit_digits_r4.safetensors"), model]) == 0
    words = ["--data", str(tmp_path / "d.npz")]
    assert main(["calibrate", model, *words, "--max-drop", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "calibrated on 16 images, default budget 0." in out
    loaded = load_vision(model)
    assert loaded.calibration is not None
    default = loaded.calibration.default_budget
    assert default is not None and default < 0.2
    assert loaded.rule(None) == loaded.rule(ComputePolicy(budget=default))
    for sweep in ("budget=1.0,0.2", "scales=-1,0,1", "tokens=16,31,61"):
        assert main(["profile", model, *words, "--sweep", sweep, "--repeats", "1"]) == 0
        table = capsys.readouterr().out
        assert "16 images, mixed scales (learned); time of" in table and "exits" not in table
    with pytest.raises(Exception, match="calibration: thresholds must be numbers or null"):
        write_calibration(model, loaded.calibration.record | {"thresholds": [[1.0, 2.0]]})
