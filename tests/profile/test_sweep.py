"""A sweep's work is counted by hand here, its times checked for sense, its reports read back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from pyruntime.engine.runtime import Runtime, load
from pyruntime.errors import InvalidInput
from pyruntime.format.load import write_calibration
from pyruntime.gates.policy import ComputePolicy
from pyruntime.profile import report
from pyruntime.profile.calibrate import calibrate
from pyruntime.profile.data import Corpus
from pyruntime.profile.measure import Call, Ticker, calls_of, evaluate
from pyruntime.profile.sweep import Report, sweep
from pyruntime.profile.timing import Timed
from tests.profile.models import gated, ungated

pytestmark = pytest.mark.usefixtures("one_thread")


def corpus(*lengths: int) -> Corpus:
    random = torch.Generator().manual_seed(3)
    return Corpus([torch.randint(3, 259, (n,), generator=random).tolist() for n in lengths])


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    folder = gated(tmp_path_factory.mktemp("gated"), "vector")
    write_calibration(folder, calibrate(load(folder), corpus(150, 150)).record)
    runtime = load(folder)
    runtime.decisions.packed_below = 1.0  # counts must not depend on this machine
    return runtime


@pytest.fixture(scope="module")
def result(runtime: Runtime) -> Report:
    modes = ("calibrated", "batch_quantile")
    data = corpus(50, 50, 20, 31)
    return sweep(runtime, data, (1.0, 0.5, 0.0), modes, call_tokens=75, repeats=2)


def dense_macs(lengths: tuple[int, ...], logits: int) -> int:
    """By hand, for hidden 40, 5 heads of 8 and 1 for keys, MLP 52, vocabulary 300, 3 layers."""
    rows, context = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
    layer = rows * (2 * 40 * 40 + 2 * 40 * 8 + 3 * 40 * 52) + 2 * 40 * context
    return 3 * layer + logits * 40 * 300


def test_work_is_counted_exactly(runtime: Runtime, result: Report) -> None:
    # Calls are dealt: the first, which is timed, holds the sequences of 50 and 20 tokens.
    gates = 3 * 2 * 70 * 40 * 40
    prefill = dense_macs((50, 20), logits=2)
    dense, full, half, none, *_ = (row.prefill for row in result.rows)
    assert [p.macs_dense for p in (dense, full, half, none)] == [prefill] * 4
    assert dense.macs_executed == prefill
    assert full.macs_executed == prefill + gates
    # Nothing kept: keys and values, gates and the head remain.
    assert none.macs_executed == 3 * 70 * 2 * 40 * 8 + gates + 2 * 40 * 300
    call = Call(corpus(50, 50, 20, 31).sequences[::2], runtime.spec)
    trace = runtime.forward(
        corpus(50, 50, 20, 31).sequences[::2], ComputePolicy(budget=0.5, mode="calibrated")
    ).trace
    context = call.batch.positions.long() + 1
    attention = trace.kept[:, 0] * (2 * 40 * 40 + 2 * 40 * context)
    work = attention.sum() + trace.kept[:, 1].sum() * 3 * 40 * 52
    fixed = 3 * 70 * 2 * 40 * 8 + gates + 2 * 40 * 300
    assert half.macs_executed == int(work) + fixed
    # The evaluation wants logits of every row that has a next token.
    assert result.rows[0].quality.macs_dense == dense_macs((50, 50, 20, 31), logits=147)


def test_rows_and_what_they_say(result: Report) -> None:
    names = [(row.value, row.mode, row.causal) for row in result.rows]
    assert names == [
        (None, "dense", True),
        *((budget, "calibrated", True) for budget in (1.0, 0.5, 0.0)),
        *((budget, "batch_quantile", False) for budget in (1.0, 0.5, 0.0)),
    ]
    shares = [row.quality.skipped_share for row in result.rows]
    assert shares[0] == shares[1] == shares[4] == 0.0
    assert shares[2] == pytest.approx(0.5, abs=0.1)
    assert shares[5] == pytest.approx(0.5, abs=0.02)
    assert shares[3] == shares[6] == 1.0
    assert all(row.quality.tokens == 147 for row in result.rows)
    assert all(0 < row.prefill.seconds < 10 for row in result.rows)


def test_quality_is_that_of_the_logits(runtime: Runtime) -> None:
    data = corpus(40, 23, 12)
    policy = ComputePolicy(budget=0.6, mode="calibrated")
    found = evaluate(runtime, calls_of(data.sequences, runtime.spec, 30), policy, Ticker(3, None))
    loss, right, count = 0.0, 0, 0
    for sequence in data.sequences:
        logits = runtime.forward([sequence], policy).logits[0]
        targets = torch.tensor(sequence[1:])
        loss -= float(logits[:-1].log_softmax(-1)[torch.arange(len(targets)), targets].sum())
        right += int((logits[:-1].argmax(-1) == targets).sum())
        count += len(targets)
    assert found.tokens == count
    assert found.accuracy == right / count
    assert found.perplexity == pytest.approx(math.exp(loss / count), rel=1e-5)


def test_the_realised_fraction() -> None:
    prefill = Timed(seconds=0.7, dense_seconds=1.0, macs_executed=60, macs_dense=100)
    assert prefill.time_saved == pytest.approx(0.3)
    assert prefill.realised == pytest.approx(0.3 / 0.4)
    assert Timed(1.1, 1.0, 101, 100).realised is None


def test_reports(result: Report) -> None:
    table = report.text(result)
    lines = table.splitlines()
    assert "dense" in table and "batch_quantile*" in table and "not causal" in table
    assert len({len(line) for line in lines[2:11]}) == 1
    data = json.loads(report.to_json(result))
    assert [row["budget"] for row in data["rows"]] == [None, 1.0, 0.5, 0.0, 1.0, 0.5, 0.0]
    assert data["rows"][2]["prefill"]["macs_executed"] == result.rows[2].prefill.macs_executed
    page = report.to_html(result)
    assert page.count("<tr>") == 8 and page.count("<circle") == 12
    assert "http" not in page and "<script" not in page


def test_a_model_without_gates_has_one_budget(tmp_path: Path) -> None:
    runtime = load(ungated(tmp_path))
    rows = sweep(runtime, corpus(20), (1.0,), repeats=1).rows
    assert rows[0].quality == rows[1].quality
    with pytest.raises(InvalidInput, match="needs a model with gates"):
        sweep(runtime, corpus(20), (1.0, 0.5))


def test_refusals_come_before_any_work(runtime: Runtime) -> None:
    for budgets, modes, repeats in (
        ((1.5,), ("calibrated",), 1),
        ((0.5,), ("nonsense",), 1),
        ((), ("calibrated",), 1),
        ((0.5,), ("calibrated",), 0),
    ):
        with pytest.raises(InvalidInput):
            sweep(runtime, corpus(20), budgets, modes, repeats=repeats)
