"""A sweep of exits: work counted by hand, plain statements beside it, reports read back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyruntime.cli import main
from pyruntime.engine.images import Preprocessor
from pyruntime.engine.vision import VisionRuntime
from pyruntime.errors import InvalidInput
from pyruntime.gates.policy import ComputePolicy, ExitPolicy
from pyruntime.profile import report
from pyruntime.profile.image_data import ImageSet
from pyruntime.profile.vision_calibrate import calibrate_vision
from pyruntime.profile.vision_quality import calibration_error
from pyruntime.profile.vision_sweep import VisionReport, sweep_vision
from tests.profile.exit_models import calibrated, folder, labelled, opened, pixels, with_rule
from tests.profile.models import gated

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> VisionRuntime:
    return opened(tmp_path_factory.mktemp("exits"))


@pytest.fixture(scope="module")
def data(runtime: VisionRuntime) -> ImageSet:
    return labelled(runtime, 50)


@pytest.fixture(scope="module")
def levels(runtime: VisionRuntime, data: ImageSet) -> VisionReport:
    return sweep_vision(runtime, data, (2, 1, 0), axis="level", batch=10, repeats=2)


def test_work_is_counted_exactly(runtime: VisionRuntime, data: ImageSet) -> None:
    never = with_rule(runtime, threshold=None)
    found = sweep_vision(never, data, (2, 0), axis="level", batch=16, repeats=1)
    dense, own, late, first = (row.quality for row in found.rows)
    # By hand, for hidden 40, 5 heads of 8, MLP 52, 7 classes, patches of 48 values, 1 + 6 rows.
    stem, block = 6 * 48 * 40, 7 * (4 * 40 * 40 + 2 * 40 * 52) + 2 * 7 * 7 * 40
    exit_, head = 7 * 40 + 4, 7 * 40
    # The last block updates the class row alone, from keys and values of all.
    last = 7 * 2 * 40 * 40 + 2 * 40 * 40 + 2 * 40 * 52 + 2 * 7 * 40
    whole = stem + 3 * block + last + head
    assert dense.macs_executed == dense.macs_dense == own.macs_dense == 50 * whole
    assert own.macs_executed == 50 * (whole + 3 * exit_)
    assert late.macs_executed == 50 * (stem + 3 * block + 3 * exit_)
    assert first.macs_executed == 50 * (stem + block + exit_)
    assert own.accuracy == dense.accuracy and own.histogram == (0, 0, 0, 1)
    assert late.histogram == (0, 0, 1, 0) and first.histogram == (1, 0, 0, 0)
    for row in found.rows:
        assert row.timed.macs_dense == 38 * whole  # batches of 13, 13 and 12: at least 32
        assert row.timed.macs_executed * 50 == row.quality.macs_executed * 38
        assert 0 < row.timed.seconds < 10
    shares = [row.ideal_share for row in found.rows]
    assert shares[0] == 1 < shares[1] > shares[2] > shares[3] > 0
    assert found.rows[0].realised is found.rows[1].realised is None
    saved = found.rows[3].timed.time_saved / (1 - shares[3])
    assert found.rows[3].realised == pytest.approx(saved)


def test_rows_are_those_of_the_policies(
    runtime: VisionRuntime, data: ImageSet, levels: VisionReport
) -> None:
    assert [(row.rule, row.value) for row in levels.rows] == [
        ("dense", None), ("own", None), ("level", 2), ("level", 1), ("level", 0),
    ]  # fmt: skip
    preprocess = Preprocessor(runtime.spec.preprocess, runtime.spec.image_size)
    images, labels = data.batch(preprocess, torch.arange(50))
    policies = [
        None,
        ComputePolicy(),
        *(ComputePolicy(exit=ExitPolicy(level=v)) for v in (2, 1, 0)),
    ]
    cost = [runtime.model.cost.repo_metric(level) for level in range(4)]
    for row, policy in zip(levels.rows, policies, strict=True):
        if policy is None:
            logits, left = runtime.model.forward(images), torch.full((50,), 3)
        else:
            output = runtime.forward(images, policy, compaction="always")
            logits, left = output.logits, output.levels.long()
        quality, right = row.quality, logits.argmax(1) == labels
        assert quality.images == 50 and quality.accuracy == pytest.approx(right.double().mean())
        assert quality.mean_level == pytest.approx(left.double().mean())
        assert quality.histogram == pytest.approx([float((left == n).double().mean())
                                                   for n in range(4)])  # fmt: skip
        expected = sum(cost[level] for level in left.tolist()) / (50 * cost[3])
        assert quality.repo_metric == pytest.approx(expected)
        sure = logits.softmax(1).amax(1)
        assert quality.calibration_error == pytest.approx(calibration_error(sure, right), abs=1e-6)


@pytest.mark.parametrize(
    ("axis", "values"),
    [("budget", (1.0, 0.8, 0.5)), ("exit", (1.5, 0.9, 0.4)), ("tau", (1.0, 0.5, 0.2))],
)
def test_the_axes(
    runtime: VisionRuntime, data: ImageSet, axis: str, values: tuple[float, ...]
) -> None:
    ready = calibrated(runtime, calibrate_vision(runtime, data, default_budget=0.9).record)
    found = sweep_vision(ready, data, values, axis=axis, repeats=1)
    assert [row.value for row in found.rows] == [None, None, *values]
    own, *swept = (row.quality for row in found.rows[1:])
    # The default budget is not the checkpoint's own rule.
    assert own == sweep_vision(runtime, data, (0,), axis="level", repeats=1).rows[1].quality
    saved = [quality.macs_saved for quality in swept]
    assert saved == sorted(saved) and saved[0] < saved[-1]
    if axis == "budget":
        assert swept[0].mean_level == 3 and swept[0].macs_saved < 0
    if axis == "tau":
        assert swept[1] == own


@given(st.integers(0, 1000), st.integers(1, 100), st.integers(1, 20))
def test_the_calibration_error(seed: int, count: int, bins: int) -> None:
    random = torch.Generator().manual_seed(seed)
    sure = torch.rand(count, generator=random)
    correct = torch.rand(count, generator=random) < 0.5
    pairs = sorted(zip(sure.tolist(), correct.tolist(), strict=True))
    sizes = [count // bins + (number < count % bins) for number in range(bins)]
    expected, start = 0.0, 0
    for size in sizes:
        some, start = pairs[start : start + size], start + size
        if some:
            mean_sure = sum(s for s, _ in some) / size
            share_right = sum(c for _, c in some) / size
            expected += size / count * abs(mean_sure - share_right)
    assert calibration_error(sure, correct, bins) == pytest.approx(expected, abs=1e-6)


def test_reports(levels: VisionReport) -> None:
    table = report.text(levels).splitlines()
    header, _, dense, own, *others = table[2:8]
    assert header.split()[:3] == ["level", "accuracy", "change"] and "Mul-Adds" in header
    assert dense.split()[0] == "dense" and own.split()[0] == "own"
    assert [line.split()[0] for line in others] == ["2", "1"]
    assert len({len(line) for line in (header, dense, own, *others)}) == 1
    histogram = table[table.index(next(line for line in table if "left at" in line)) :]
    assert histogram[0].split()[-3:] == ["exit", "2", "final"]
    assert histogram[3].split() == ["2", *(f"{s:.1%}" for s in levels.rows[2].quality.histogram)]
    data = json.loads(report.to_json(levels))
    assert [row["level"] for row in data["rows"]] == [None, None, 2, 1, 0]
    assert data["rows"][4]["quality"]["macs_executed"] == levels.rows[4].quality.macs_executed
    assert data["setting"]["exits"] == 3 and data["setting"]["criterion"] == "jei_dnn"
    page = report.to_html(levels)
    assert page.count("<tr>") == 6 and page.count("<circle") == 8 and page.count("<rect") == 16
    assert "http" not in page and "<script" not in page


def test_other_criteria_have_no_repository_metric(runtime: VisionRuntime, data: ImageSet) -> None:
    other = with_rule(runtime, criterion="max_prob", threshold=0.6)
    found = sweep_vision(other, data, (0.5,), axis="exit", repeats=1)
    assert all(row.quality.repo_metric is None for row in found.rows)
    assert "Mul-Adds" not in report.text(found)


def test_refusals_come_before_any_work(tmp_path: Path, runtime: VisionRuntime) -> None:
    nothing = ImageSet("none", [Path("none")], torch.zeros(1, dtype=torch.int64))
    for axis, values, message in (
        ("budget", (0.5,), "run `pyruntime calibrate`"),
        ("level", (1.5,), "level must be an integer"),
        ("level", (3,), "level 3 asked for"),
        ("tau", (0.0,), "tau must be a positive number"),
        ("experts", (1,), "varies one of budget, exit, tau, level, not 'experts'"),
        ("exit", (), "at least one exit"),
    ):
        with pytest.raises(InvalidInput, match=message):
            sweep_vision(runtime, nothing, values, axis=axis)
    with pytest.raises(InvalidInput, match="repeats must be at least 1"):
        sweep_vision(runtime, nothing, (1,), axis="level", repeats=0)
    with pytest.raises(InvalidInput, match="batch must be at least 1"):
        sweep_vision(runtime, nothing, (1,), axis="level", batch=0)
    with pytest.raises(InvalidInput, match="none: No such file"):
        sweep_vision(runtime, nothing, (1,), axis="level")
    with pytest.raises(InvalidInput, match="no exits and no mixed scales: there is nothing"):
        sweep_vision(opened(tmp_path, exits=0), nothing, (1,), axis="level")


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(folder(tmp_path))
    labels = np.arange(40) % 7
    np.savez(tmp_path / "d.npz", images=pixels(40), labels=labels)
    words = ["--data", str(tmp_path / "d.npz"), "--samples", "30", "--batch", "6"]

    assert main(["calibrate", model, *words]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["budget", "kept", "accuracy"] and out[1].split()[0] == "1.000"
    assert "calibrated on 30 images, the checkpoint's own rule by default" in out[-1]
    assert main(["calibrate", model, *words, "--max-drop", "1"]) == 0
    assert "default budget 0." in capsys.readouterr().out.splitlines()[-1]

    files = ["--json", str(tmp_path / "p.json"), "--html", str(tmp_path / "p.html")]
    sweep = ["--sweep", "budget=1.0,0.7", "--repeats", "1"]
    assert main(["profile", model, *words, *sweep, *files]) == 0
    assert "30 images, 3 exits (jei_dnn)" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "p.json").read_text())["rows"]) == 4
    assert (tmp_path / "p.html").read_text().count("<svg") == 2

    for wrong, message in (
        (["--length", "9"], "--length is set, but"),
        (["--tokens", "9"], "classifies images"),
        (["--samples", "0"], "number of images"),
    ):
        assert main(["calibrate", model, *words, *wrong]) == 1
        assert message in capsys.readouterr().err
    assert main(["profile", model, *words, "--sweep", "mass=0.5"]) == 1
    assert "varies one of budget" in capsys.readouterr().err
    two = ["--data", str(tmp_path / "d.npz"), str(tmp_path / "d.npz")]
    assert main(["calibrate", model, *two]) == 1
    assert "expected one folder or .npz file" in capsys.readouterr().err
    language = str(gated(tmp_path / "language"))
    assert main(["calibrate", language, *words]) == 1
    assert "--samples is set, but" in capsys.readouterr().err
