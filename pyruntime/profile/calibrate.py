"""Thresholds for every budget, measured on text while the layers below already skip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyruntime.engine.runtime import Runtime
from pyruntime.errors import InvalidInput
from pyruntime.gates.budget import NEVER
from pyruntime.gates.policy import ComputePolicy
from pyruntime.profile.data import Corpus
from pyruntime.profile.measure import Call, Progress, Quality, Ticker, calls_of, evaluate, run

BUDGETS = tuple(round(1 - step / 20, 2) for step in range(21))
MIN_TOKENS = 64
_EVERYTHING = ComputePolicy(budget=1.0, mode="calibrated")


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A calibration record for `format.load.write_calibration`, and the quality at its budgets."""

    record: dict[str, Any]
    qualities: list[Quality]


def calibrate(
    runtime: Runtime,
    corpus: Corpus,
    *,
    default_budget: float | None = None,
    max_drop: float | None = None,
    call_tokens: int = 8192,
    progress: Progress | None = None,
) -> Calibrated:
    """Thresholds at which a share of 1 - budget of the corpus is skipped, for 21 budgets.

    A threshold found on a dense pass is wrong once earlier layers skip, because they change what
    later gates see. So each budget has a pass of its own in which every branch, as it is reached,
    skips at the quantile of its own scores in that pass. Passes over calls of about `call_tokens`
    tokens are averaged; a second pass with the final thresholds measures what is kept and how well
    the model predicts. Nothing is written.

    Args:
        default_budget: of requests that name none; without it 1.0.
        max_drop: instead, the default is the cheapest budget whose next-token accuracy on the
            corpus is at most this much (a share, 0.01 is one point) below that of budget 1.0.

    Raises:
        InvalidInput: no gates, too little text, or both ways to choose a default.
    """
    if runtime.gates is None:
        raise InvalidInput("this model has no gates: there is nothing to calibrate")
    if default_budget is not None and max_drop is not None:
        raise InvalidInput("give either a default budget or a maximal drop, not both")
    if max_drop is not None and not max_drop >= 0:
        raise InvalidInput(f"the maximal drop must be 0 or more, got {max_drop}")
    ComputePolicy(budget=default_budget)
    calls = calls_of(corpus.sequences, runtime.spec, call_tokens)
    calls = [call for call in calls if bool(call.valid.any())]
    usable = sum(int(call.valid.sum()) for call in calls)
    if usable < MIN_TOKENS:
        raise InvalidInput(f"calibration needs at least {MIN_TOKENS} tokens, the data has {usable}")
    tick = Ticker(2 * len(BUDGETS) * len(calls), progress)

    lowest = torch.stack([_pass(runtime, call, 0.0, None, tick) for call in calls]).amin(0)
    tables = [lowest.masked_fill(lowest >= 1.0, -torch.inf)]
    for budget in BUDGETS[1:]:
        found = [_pass(runtime, call, 1.0 - budget, tables[0], tick) for call in calls]
        tables.append(torch.stack(found).mean(0))
    record = {
        "kind": runtime.gates.kind,
        "budgets": list(BUDGETS),
        "thresholds": [[[_number(tau) for tau in layer] for layer in t.tolist()] for t in tables],
        "kept": [1.0] * len(BUDGETS),
        "tokens": corpus.tokens,
        "data_sha256": corpus.sha256,
        "default_budget": 1.0,
    }
    trial = Runtime(replace(runtime.container, calibration=record))
    policies = [ComputePolicy(budget=budget, mode="calibrated") for budget in BUDGETS]
    qualities = [evaluate(trial, calls, policy, tick) for policy in policies]
    record["kept"] = [1.0 - quality.skipped_share for quality in qualities]
    if max_drop is not None:
        default_budget = cheapest_within(max_drop, qualities)
    if default_budget is not None:
        record["default_budget"] = default_budget
    return Calibrated(record, qualities)


def cheapest_within(max_drop: float, qualities: Sequence[Quality]) -> float:
    """The smallest of BUDGETS whose accuracy is at most `max_drop` below the first one's."""
    floor = qualities[0].accuracy - max_drop
    return min(b for b, q in zip(BUDGETS, qualities, strict=True) if q.accuracy >= floor)


def _pass(runtime: Runtime, call: Call, skip: float, lowest: Tensor | None, tick: Ticker) -> Tensor:
    """Thresholds float32 [L, 2] of one pass that skips by them; -inf where nothing may skip.

    Args:
        lowest: smallest scores found before, -inf for branches that never skip: those without a
            gate, and those whose gate is saturated, which the official code leaves alone too.
    """
    found = torch.full((runtime.spec.num_layers, 2), -torch.inf)

    def rule(layer: int, branch: int, scores: Tensor) -> Tensor:
        if lowest is not None and lowest[layer, branch] == -torch.inf:
            return NEVER
        tau = runtime.model.ops.quantile(scores[call.valid], skip)
        found[layer, branch] = tau
        return torch.where(call.valid, tau, NEVER) if skip > 0 else NEVER

    run(runtime, call, call.silent(), _EVERYTHING, call.cache(), rule)
    tick()
    return found


def _number(tau: float) -> float | None:
    return None if tau == -torch.inf else tau
