"""Thresholds keep what their budget says, also while the layers below skip."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.engine.runtime import Runtime, load
from pyruntime.errors import InvalidInput
from pyruntime.format.load import write_calibration
from pyruntime.gates.policy import ComputePolicy
from pyruntime.profile.calibrate import calibrate, cheapest_within
from pyruntime.profile.data import Corpus
from pyruntime.profile.measure import Quality, Ticker, calls_of, evaluate, run
from pyruntime.profile.thresholds import BUDGETS
from tests.profile.models import gated, ungated

pytestmark = pytest.mark.usefixtures("one_thread")
SILENT = Ticker(1, None)


def corpus(seed: int, sequences: int = 12, length: int = 100, low: int = 3) -> Corpus:
    random = torch.Generator().manual_seed(seed)
    return Corpus(torch.randint(low, 259, (sequences, length), generator=random).tolist())


@pytest.fixture(scope="module")
def vector(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    return load(gated(tmp_path_factory.mktemp("vector"), "vector"))


def calibrated(runtime: Runtime, record: dict[str, Any]) -> Runtime:
    return Runtime(replace(runtime.container, calibration=record))


@pytest.mark.parametrize("gate_type", ["scalar", "vector"])
@pytest.mark.parametrize("call_tokens", [10_000, 400])
def test_kept_is_the_budget(tmp_path: Path, gate_type: str, call_tokens: int) -> None:
    runtime = load(gated(tmp_path, gate_type))
    record = calibrate(runtime, corpus(0), call_tokens=call_tokens).record
    kept = record["kept"]
    assert record["budgets"] == list(BUDGETS) and len(BUDGETS) == 21
    assert kept[0] == 1.0 and kept[-1] == 0.0
    assert kept == sorted(kept, reverse=True)
    assert max(abs(k - b) for k, b in zip(kept, BUDGETS, strict=True)) <= 0.03
    # Other text of the same kind, and budgets between those of the grid.
    other = calls_of(corpus(1).sequences, runtime.spec, 1000)
    again = calibrated(runtime, record)
    for budget in (0.9, 0.77, 0.51, 0.33):
        quality = evaluate(again, other, ComputePolicy(budget=budget, mode="calibrated"), SILENT)
        assert 1 - quality.skipped_share == pytest.approx(budget, abs=0.06)


def test_thresholds_are_those_of_the_official_rule_on_one_call(vector: Runtime) -> None:
    """One call over everything: batch_quantile and the thresholds decide alike, row by row."""
    data = corpus(0)
    record = calibrate(vector, data, call_tokens=10_000).record
    again = calibrated(vector, record)
    for budget in (0.8, 0.5, 0.2):
        kept = [
            again.forward(data.sequences, ComputePolicy(budget=budget, mode=mode)).trace.kept
            for mode in ("calibrated", "batch_quantile")
        ]
        assert torch.equal(*kept)


def test_thresholds_of_dense_passes_would_have_drifted(vector: Runtime) -> None:
    """Why every budget has a pass of its own."""
    data = corpus(0)
    record = calibrate(vector, data).record
    drifted = dict(record)
    scores: dict[tuple[int, int], torch.Tensor] = {}
    call = calls_of(data.sequences, vector.spec, 10_000)[0]

    def remember(layer: int, branch: int, row_scores: torch.Tensor) -> torch.Tensor:
        scores[layer, branch] = row_scores.clone()
        return torch.tensor(-torch.inf)

    policy = ComputePolicy(budget=1.0, mode="calibrated")
    run(vector, call, call.silent(), policy, call.cache(), remember)
    drifted["thresholds"] = [
        [
            [float(torch.quantile(scores[layer, branch], 1 - budget)) for branch in (0, 1)]
            for layer in range(vector.spec.num_layers)
        ]
        for budget in BUDGETS
    ]

    def error(record: dict[str, Any]) -> float:
        quality = evaluate(
            calibrated(vector, record),
            [call],
            ComputePolicy(budget=0.5, mode="calibrated"),
            SILENT,
        )
        return abs(0.5 - quality.skipped_share)

    assert error(record) < 0.01 < error(drifted)


def test_protected_rows_are_left_out(tmp_path: Path) -> None:
    runtime = load(gated(tmp_path))
    data = corpus(0)
    clean = calibrate(runtime, data).record
    # End tokens after the text change nothing before them, and must not enter the quantiles.
    padded = Corpus([[*sequence, *[2] * 50] for sequence in data.sequences])
    record = calibrate(runtime, padded).record
    assert record["thresholds"] == clean["thresholds"] and record["kept"] == clean["kept"]
    assert record["data_sha256"] != clean["data_sha256"]
    assert record["tokens"] == 1800


def test_a_branch_without_a_gate_and_a_saturated_one_never_skip(tmp_path: Path) -> None:
    runtime = load(gated(tmp_path / "one", gate_attention=False))
    record = calibrate(runtime, corpus(0)).record
    assert all(layer[0] is None for table in record["thresholds"] for layer in table)
    assert record["kept"][10] == pytest.approx(0.5, abs=0.03)
    runtime = load(gated(tmp_path / "two", bias=100.0))
    record = calibrate(runtime, corpus(0)).record
    assert all(tau is None for table in record["thresholds"] for layer in table for tau in layer)
    assert record["kept"] == [1.0] * 21


def test_the_record_is_what_a_folder_stores(tmp_path: Path) -> None:
    folder = gated(tmp_path)
    done: list[tuple[int, int]] = []
    found = calibrate(
        load(folder), corpus(0), default_budget=0.5, progress=lambda *args: done.append(args)
    )
    assert done == [(n + 1, len(done)) for n in range(len(done))]
    write_calibration(folder, found.record)
    runtime = load(folder)
    assert runtime.resolve(ComputePolicy(mode="calibrated")) == ("calibrated", 0.5)
    assert runtime.calibration is not None
    lowest = runtime.calibration.thresholds[0]
    assert bool((lowest <= runtime.calibration.thresholds[1]).all())
    trace = runtime.forward(corpus(0).sequences, ComputePolicy(budget=0.5)).trace
    assert trace.skipped_share == pytest.approx(0.5, abs=0.03)


def test_the_cheapest_budget_within_a_drop() -> None:
    accuracies = [0.5 - 0.01 * step for step in range(21)]
    qualities = [Quality(100, 1.0, accuracy, 0.0, 1, 1) for accuracy in accuracies]
    assert cheapest_within(0.0, BUDGETS, qualities) == 1.0
    assert cheapest_within(0.0251, BUDGETS, qualities) == 0.9
    assert cheapest_within(1.0, BUDGETS, qualities) == 0.0


def test_max_drop_becomes_the_default(vector: Runtime) -> None:
    found = calibrate(vector, corpus(0, sequences=3), max_drop=0.01)
    floor = found.qualities[0].accuracy - 0.01
    chosen = found.record["default_budget"]
    assert found.qualities[BUDGETS.index(chosen)].accuracy >= floor
    assert all(
        quality.accuracy < floor
        for budget, quality in zip(BUDGETS, found.qualities, strict=True)
        if budget < chosen
    )


def test_refusals(tmp_path: Path, vector: Runtime) -> None:
    with pytest.raises(InvalidInput, match="no gates"):
        calibrate(load(ungated(tmp_path)), corpus(0))
    with pytest.raises(InvalidInput, match="at least 64 tokens, the data has 20"):
        calibrate(vector, corpus(0, sequences=2, length=10))
    with pytest.raises(InvalidInput, match="not both"):
        calibrate(vector, corpus(0), default_budget=1.0, max_drop=0.1)
    with pytest.raises(InvalidInput, match="maximal drop"):
        calibrate(vector, corpus(0), max_drop=-0.1)
    with pytest.raises(InvalidInput, match="budget"):
        calibrate(vector, corpus(0), default_budget=1.1)
