"""Shares of experts: kept as the budget says, by thresholds found while lower layers cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pyruntime.engine.runtime import Runtime
from pyruntime.errors import InvalidInput
from pyruntime.format.manifest import calibration_problems
from pyruntime.format.spec import RouterSpec
from pyruntime.gates.policy import ComputePolicy, ExpertPolicy
from pyruntime.profile.calibrate import calibrate
from pyruntime.profile.data import Corpus
from pyruntime.profile.measure import Ticker, calls_of, evaluate
from tests.models.expert_models import experts, runtime_of, spec_of
from tests.profile.test_calibrate import calibrated, corpus

pytestmark = pytest.mark.usefixtures("one_thread")
SILENT = Ticker(1, None)
ROUTERS = {
    "softmax, 2 of 5": experts(),
    "softmax as it is, 3 of 7": experts(num_experts=7, experts_per_token=3, router=RouterSpec()),
    "sigmoid in groups, 4 of 8": experts(
        num_experts=8,
        experts_per_token=4,
        router=RouterSpec(
            score="sigmoid", normalize=True, scale=2.5, selection_bias=True, groups=4,
            top_groups=2, group_score="sum2", epsilon=1e-20,
        ),
    ),
    "softmax of the chosen, 4 of 6": experts(
        num_experts=6, experts_per_token=4, router=RouterSpec(over_chosen=True)
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def moe() -> Runtime:
    return runtime_of(spec_of(num_layers=4, experts=experts(layers=(0, 1, 2, 3))))


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("call_tokens", [10_000, 400])
def test_kept_is_the_budget(name: str, call_tokens: int) -> None:
    runtime = runtime_of(spec_of(experts=ROUTERS[name]))
    k = ROUTERS[name].experts_per_token
    record = calibrate(runtime, corpus(0), call_tokens=call_tokens).record
    budgets, kept = record["budgets"], record["kept"]
    assert budgets[0] == kept[0] == 1.0 and budgets[-1] == kept[-1] == 1 / k
    assert budgets == sorted(budgets, reverse=True) and len(budgets) >= 11
    assert max(abs(x - b) for x, b in zip(kept, budgets, strict=True)) <= 0.03
    assert calibration_problems(record, runtime.spec, None) == []
    # Other text of the same kind, and budgets between those of the grid.
    other = calls_of(corpus(1).sequences, runtime.spec, 1000)
    again = calibrated(runtime, record)
    for budget in (0.93, 0.77, 0.56):
        quality = evaluate(again, other, ComputePolicy(budget=budget), SILENT)
        assert quality.experts_per_token == pytest.approx(budget * k, abs=0.06 * k)
        assert quality.skipped_share == 0.0


def test_equal_shares_are_cut_together() -> None:
    """SparseMixer weighs both experts of most tokens alike: less is kept than asked, never more."""
    mixer = experts(router=RouterSpec(kind="sparse_mixer", epsilon=0.01))
    record = calibrate(runtime_of(spec_of(experts=mixer)), corpus(0)).record
    pairs = list(zip(record["kept"], record["budgets"], strict=True))
    assert all(kept <= budget + 0.01 for kept, budget in pairs)
    assert any(kept < budget - 0.1 for kept, budget in pairs)
    assert record["kept"][0] == 1.0 and record["kept"][-1] == 0.5


def test_one_mass_for_all_layers_that_keeps_the_budget(moe: Runtime) -> None:
    data = corpus(0)
    record = calibrate(moe, data, call_tokens=10_000).record
    masses = [table[0] for table in record["thresholds"]]
    assert all(set(table) == {table[0]} for table in record["thresholds"])
    assert masses == sorted(masses, reverse=True) and 0.5 <= masses[-1] < masses[0] <= 1
    error = [abs(kept - b) for kept, b in zip(record["kept"], record["budgets"], strict=True)]
    assert max(error) < 0.005
    # What a layer keeps is what its own shares say, when a trace records them uncut.
    trace = moe.forward(data.sequences).trace
    assert trace.expert_weights is not None
    first = (trace.expert_weights[0, :, 0] / trace.expert_weights[0].sum(-1)) < masses[5]
    limited = calibrated(moe, record).forward(data.sequences, ComputePolicy(budget=0.75)).trace
    assert limited.experts is not None
    assert torch.equal(limited.experts[0, :, 1] >= 0, first)


def test_protected_rows_are_left_out() -> None:
    runtime = runtime_of(spec_of(eos_token_ids=(2,)))
    data = corpus(0)
    clean = calibrate(runtime, data).record
    # End tokens after the text change nothing before them, and must not enter the quantiles.
    padded = Corpus([[*sequence, *[2] * 50] for sequence in data.sequences])
    record = calibrate(runtime, padded).record
    ours, theirs = torch.tensor(record["thresholds"]), torch.tensor(clean["thresholds"])
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)
    assert record["kept"] == pytest.approx(clean["kept"], abs=1e-3)
    assert record["data_sha256"] != clean["data_sha256"]


def test_limits_and_a_budget_together_take_the_fewest(moe: Runtime) -> None:
    data = corpus(0)
    runtime = calibrated(moe, calibrate(moe, data).record)

    def used(policy: ComputePolicy) -> Tensor:
        chosen = runtime.forward(data.sequences, policy).trace.experts
        assert chosen is not None
        return (chosen >= 0).sum(-1)[0]  # of the first layer, whose input nothing changes

    gap = ExpertPolicy(gap=0.3)
    both = used(ComputePolicy(budget=0.75, experts=gap))
    alone = used(ComputePolicy(budget=0.75)), used(ComputePolicy(experts=gap))
    assert torch.equal(both, torch.minimum(*alone))
    assert not torch.equal(both, alone[0]) and not torch.equal(both, alone[1])


def test_the_stored_default_is_for_requests_that_ask_for_nothing(moe: Runtime) -> None:
    data = corpus(0)
    runtime = calibrated(moe, calibrate(moe, data, default_budget=0.6).record)
    assert runtime.resolve(None) == ("calibrated", 0.6)
    assert runtime.resolve(ComputePolicy(experts=2)) == ("calibrated", 1.0)
    trace = runtime.forward(data.sequences).trace
    assert trace.experts_per_token == pytest.approx(1.2, abs=0.02)
    assert runtime.forward(data.sequences, ComputePolicy(experts=2)).trace.experts_per_token == 2


def test_max_drop_becomes_the_default(moe: Runtime) -> None:
    found = calibrate(moe, corpus(0, sequences=3), max_drop=0.01)
    floor = found.qualities[0].accuracy - 0.01
    budgets = found.record["budgets"]
    cheap = [b for b, q in zip(budgets, found.qualities, strict=True) if q.accuracy >= floor]
    assert found.record["default_budget"] == min(cheap)


def test_refusals(moe: Runtime) -> None:
    one = runtime_of(spec_of(experts=experts(experts_per_token=1)))
    with pytest.raises(InvalidInput, match="runs 1 expert per token: there is nothing"):
        calibrate(one, corpus(0))
    with pytest.raises(InvalidInput, match=r"default budget 0\.4: the smallest .* is 0\.5"):
        calibrate(moe, corpus(0), default_budget=0.4)
    with pytest.raises(InvalidInput, match="run `pyruntime calibrate` first"):
        moe.resolve(ComputePolicy(budget=0.75))
    runtime = calibrated(moe, calibrate(moe, corpus(0)).record)
    with pytest.raises(InvalidInput, match=r"budget 0\.4: the smallest .* is 0\.5"):
        runtime.resolve(ComputePolicy(budget=0.4))
    with pytest.raises(InvalidInput, match=r"3 per token .* at most 2"):
        moe.resolve(ComputePolicy(experts=3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "gateskip"}, "kind is 'gateskip', expected 'experts'"),
        ({"thresholds": [[[0.5], [0.5]]] * 2}, r"of shape \[2, 2\]"),
        ({"thresholds": [[0.5, None], [0.5, "1"]]}, r"of shape \[2, 2\]"),
        ({"budgets": [1.0, 0.6]}, r"the last budget must be 0\.5, one expert, is 0\.6"),
        ({"default_budget": 0.4}, r"default_budget must be in \[0\.5, 1\], is 0\.4"),
    ],
)
def test_records_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    record = {
        "kind": "experts", "budgets": [1.0, 0.5], "thresholds": [[1.0, None], [0.5, None]],
        "kept": [1.0, 0.5], "tokens": 9, "data_sha256": "", "default_budget": 1.0,
    }  # fmt: skip
    spec = spec_of()
    assert calibration_problems(record, spec, None) == []
    (problem,) = calibration_problems(record | changes, spec, None)
    with pytest.raises(InvalidInput, match=message):
        raise InvalidInput(problem)
    assert calibration_problems(record, replace(spec, experts=None), None) == [
        "calibration: the model has no gates and no experts"
    ]
