"""Runtime-wide: specification R1 to R3, and what a runtime accepts and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.engine.llm import LLM
from pyruntime.engine.request import SamplingParams
from pyruntime.errors import InvalidInput
from pyruntime.format.convert import convert
from pyruntime.format.load import write_calibration
from pyruntime.gates.policy import ComputePolicy
from tests.checkpoints import write_gateskip_pt
from tests.models.session import (
    TOKENS,
    calibration,
    every_gate,
    gated,
    logits_of,
    opened,
    oracle_of,
    plain,
    skip,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_r01_gates_that_only_rank_are_the_plain_model(tmp_path: Path, dtype: torch.dtype) -> None:
    """Routing off: the same bits, and the same branches executed with nothing packed."""
    base = opened(plain(tmp_path, dtype=dtype))
    write_gateskip_pt(tmp_path / "gated.pt", tmp_path / "hf", actually_gate=False, dtype=dtype)
    convert(tmp_path / "gated.pt", tmp_path / "ranked")
    for policy in (None, ComputePolicy(budget=1.0), skip(0.0)):
        expected, actual = (r.forward(TOKENS, policy) for r in (base, opened(tmp_path / "ranked")))
        assert torch.equal(logits_of(actual), logits_of(expected))
        assert actual.trace.paths == expected.trace.paths
        assert actual.trace.paths["all"] == 6
    assert base.forward(TOKENS).trace.macs_executed == base.forward(TOKENS).trace.macs_dense


def test_r02_the_record_names_the_rule_the_budget_and_the_cache(tmp_path: Path) -> None:
    path, _ = gated(tmp_path)
    write_calibration(path, calibration(opened(path)))
    runtime = opened(path)
    policy = ComputePolicy(budget=0.75, mode="exact_k", kv_mode="copy")
    trace = runtime.forward(TOKENS, policy).trace
    assert (trace.mode, trace.kv_mode) == ("exact_k", "copy")
    assert trace.budgets.unique().tolist() == [0.75]
    mixed = [ComputePolicy(budget=0.5), ComputePolicy()]
    trace = runtime.forward(TOKENS, mixed).trace
    assert (trace.mode, trace.kv_mode) == ("calibrated", "dense")
    assert trace.budgets.tolist() == [0.5] * 37 + [1.0] * 37
    greedy = SamplingParams(temperature=0, max_tokens=2)
    (output,) = LLM(runtime).generate([[5, 6, 7]], greedy, policy)
    assert (output.policy.mode, output.policy.budget, output.policy.kv_mode) == (
        "exact_k", 0.75, "copy",
    )  # fmt: skip


@every_gate
def test_r03_decisions_replay_on_any_backend(tmp_path: Path, gates: dict[str, Any]) -> None:
    path, _ = gated(tmp_path, **gates)
    runtime, reference = opened(path), opened(path, "reference")
    recorded = runtime.forward(TOKENS, skip(0.4))
    replayed = runtime.forward(TOKENS, replay=recorded.trace.kept)
    assert torch.equal(logits_of(replayed), logits_of(recorded))
    assert torch.equal(replayed.trace.kept, recorded.trace.kept)
    assert torch.equal(replayed.trace.macs_per_row, recorded.trace.macs_per_row)
    forced = reference.forward(TOKENS, replay=recorded.trace.kept)
    torch.testing.assert_close(forced.logits, recorded.logits, atol=1e-5, rtol=1e-4)
    assert float((logits_of(runtime.forward(TOKENS)) - logits_of(recorded)).abs().max()) > 1e-2


def test_r03_a_replay_of_the_wrong_shape_is_refused(tmp_path: Path) -> None:
    path, _ = gated(tmp_path)
    runtime = opened(path)
    good = torch.ones(3, 2, 74, dtype=torch.bool)
    for bad in (good[:2], good[..., 1:], good.int()):
        with pytest.raises(InvalidInput, match=r"replay: expected bool \[3, 2, 74\], got"):
            runtime.forward(TOKENS, replay=bad)


def test_models_without_gates_refuse_budgets(tmp_path: Path) -> None:
    runtime = opened(plain(tmp_path))
    with pytest.raises(InvalidInput, match=r"budget 0\.5 needs a model with gates"):
        runtime.forward(TOKENS, ComputePolicy(budget=0.5))


def test_calibrated_budgets_need_a_calibration(tmp_path: Path) -> None:
    path, _ = gated(tmp_path)
    with pytest.raises(InvalidInput, match="needs calibrated thresholds"):
        opened(path).forward(TOKENS, ComputePolicy(budget=0.5))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[]], "a sequence is empty"),
        ([[5, 300]], "token id 300 is outside the vocabulary of 300"),
        ([[-1]], "token id -1 is outside"),
        ([[5] * 257], "has 257 tokens, the context holds 256"),
        (torch.zeros(2, 2), r"token_ids: expected integers .*float32 \[2, 2\]"),
    ],
)
def test_inputs_that_are_refused(tmp_path: Path, tokens: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        opened(plain(tmp_path)).forward(tokens)


def test_inputs_that_are_accepted(tmp_path: Path) -> None:
    runtime = opened(plain(tmp_path))
    expected = logits_of(runtime.forward(TOKENS))
    assert torch.equal(logits_of(runtime.forward(TOKENS.numpy())), expected)
    assert torch.equal(logits_of(runtime.forward(TOKENS.tolist())), expected)
    assert torch.equal(logits_of(runtime.forward(TOKENS[0])), expected[:1])
    ragged = runtime.forward([TOKENS[0].tolist(), TOKENS[1, :9].tolist()]).logits
    assert isinstance(ragged, list)
    assert torch.equal(ragged[0], expected[0]) and torch.equal(ragged[1], expected[1, :9])


def test_a_stored_quantile_rule_runs_only_when_it_is_named(tmp_path: Path) -> None:
    path, oracle = gated(tmp_path, sidecar={"rule": "batch_quantile", "skip_ratio": 0.25})
    silent = opened(path).forward(TOKENS).trace
    assert silent.mode == "calibrated" and bool(silent.kept.all())
    trace = opened(path).forward(TOKENS, ComputePolicy(mode="batch_quantile")).trace
    assert trace.mode == "batch_quantile"
    assert torch.equal(trace.kept, oracle.forward(TOKENS, 0.25).kept.flatten(2))
    assert json.loads((path / "runtime.json").read_text())["gates"]["skip_ratio"] == 0.25
    assert oracle_of(tmp_path / "hf", oracle.state).actually_gate
