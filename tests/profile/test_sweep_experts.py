"""Sweeps over experts: work counted by hand, the whole model as the reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pyruntime.engine.runtime import Runtime, load
from pyruntime.errors import InvalidInput
from pyruntime.format.load import write_calibration
from pyruntime.profile import report
from pyruntime.profile.calibrate import calibrate
from pyruntime.profile.sweep import Report, sweep
from tests.profile.models import gated, mixtral
from tests.profile.test_sweep import corpus

pytestmark = pytest.mark.usefixtures("one_thread")
EXPERT = 3 * 40 * 21  # multiply-accumulates of one expert for one token


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    folder = mixtral(tmp_path_factory.mktemp("mixtral"))
    write_calibration(folder, calibrate(load(folder), corpus(150, 150)).record)
    return load(folder)


@pytest.fixture(scope="module")
def counts(runtime: Runtime) -> Report:
    return sweep(runtime, corpus(50, 31), (2, 1), axis="experts", call_tokens=81, repeats=2)


def test_work_is_counted_exactly(counts: Report) -> None:
    dense, two, one = (row.prefill for row in counts.rows)
    assert dense.macs_executed == dense.macs_dense == two.macs_executed == one.macs_dense
    assert one.macs_executed == dense.macs_dense - 2 * 81 * EXPERT
    assert [row.quality.experts_per_token for row in counts.rows] == [2, 2, 1]
    # Hidden 40, 4 heads of 10 and 2 for keys, 5 experts, vocabulary 300: all of it, by hand.
    context = 50 * 51 // 2 + 31 * 32 // 2
    layer = 81 * (2 * 40 * 40 + 2 * 40 * 20 + 5 * 40 + 2 * EXPERT) + 2 * 40 * context
    assert dense.macs_dense == 2 * layer + 2 * 40 * 300


@pytest.mark.parametrize(
    ("axis", "values"),
    [("budget", (1.0, 0.75, 0.5)), ("mass", (1.0, 0.75, 0.1)), ("gap", (1.0, 0.3, 0.0))],
)
def test_fewer_experts_are_less_work(
    runtime: Runtime, axis: str, values: tuple[float, ...]
) -> None:
    found = sweep(runtime, corpus(60, 60), values, axis=axis, call_tokens=120, repeats=1)
    assert [row.value for row in found.rows] == [None, *values]
    used = [row.quality.experts_per_token or 0.0 for row in found.rows]
    assert used[0] == used[1] == 2 > used[2] > used[3] >= 1
    assert found.rows[0].quality.perplexity == found.rows[1].quality.perplexity
    # One call of two sequences: what is timed is what is evaluated, but for the logits.
    for row, mean in zip(found.rows, used, strict=True):
        saved = row.prefill.macs_dense - row.prefill.macs_executed
        assert saved == round((2 - mean) * 2 * 120) * EXPERT


def test_reports_name_the_axis(counts: Report) -> None:
    table = report.text(counts)
    header, _, dense, two, one = table.splitlines()[2:7]
    assert header.split()[:2] == ["experts", "mode"] and "mean experts" in header
    assert "skipped" not in table and "packed below" not in table and "without gates" not in table
    assert "2.00" in two and "1.00" in one and dense.split()[0] == "–"
    assert len({len(line) for line in (header, dense, two, one)}) == 1
    data = json.loads(report.to_json(counts))
    assert data["axis"] == "experts"
    assert [row["experts"] for row in data["rows"]] == [None, 2, 1]
    assert data["rows"][2]["quality"]["experts_per_token"] == 1
    assert data["rows"][2]["prefill"]["macs_executed"] == counts.rows[2].prefill.macs_executed
    page = report.to_html(counts)
    assert page.count("<tr>") == 4 and "mean experts" in page and "labels: experts" in page


def test_refusals(tmp_path: Path, runtime: Runtime) -> None:
    with pytest.raises(InvalidInput, match=r"experts: .*3.* at most 2"):
        sweep(runtime, corpus(20), (2, 3), axis="experts")
    with pytest.raises(InvalidInput, match=r"slots must be an integer .* got 1\.5"):
        sweep(runtime, corpus(20), (1.5,), axis="experts")
    with pytest.raises(InvalidInput, match="one of budget, experts, gap, mass, not 'depth'"):
        sweep(runtime, corpus(20), (1,), axis="depth")
    with pytest.raises(InvalidInput, match="at least one mass"):
        sweep(runtime, corpus(20), (), axis="mass")
    with pytest.raises(InvalidInput, match="experts is set, but this model has none"):
        sweep(load(gated(tmp_path)), corpus(20), (1,), axis="experts")
