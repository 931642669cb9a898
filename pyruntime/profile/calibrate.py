"""Thresholds for every budget, measured on text while the layers below already cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from pyruntime.engine.runtime import Runtime
from pyruntime.errors import InvalidInput
from pyruntime.gates.policy import ComputePolicy
from pyruntime.profile.data import Corpus
from pyruntime.profile.measure import Progress, Ticker, calls_of, evaluate
from pyruntime.profile.thresholds import thresholds_of

MIN_TOKENS = 64


class Scored(Protocol):
    """What a budget yields."""

    @property
    def accuracy(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A calibration record for `format.load.write_calibration`, and the quality at its budgets."""

    record: dict[str, Any]
    qualities: Sequence[Scored]


def calibrate(
    runtime: Runtime,
    corpus: Corpus,
    *,
    default_budget: float | None = None,
    max_drop: float | None = None,
    call_tokens: int = 8192,
    progress: Progress | None = None,
) -> Calibrated:
    """Thresholds at which the share `budget` of the corpus is kept, for a grid of budgets.

    What is kept are executions of gated branches, or, in a model that has experts and no residual
    gates, experts per token. Each budget has a pass of its own (see `thresholds`); passes over
    calls of about `call_tokens` tokens are averaged. A second pass with the final thresholds
    measures what is kept and how well the model predicts. Nothing is written.

    Args:
        default_budget: of requests that name none; without it 1.0.
        max_drop: instead, the default is the cheapest budget whose next-token accuracy on the
            corpus is at most this much (a share, 0.01 is one point) below that of budget 1.0.

    Raises:
        InvalidInput: nothing to calibrate, too little text, a default below the smallest budget,
            or both ways to choose one.
    """
    found = thresholds_of(runtime)
    if default_budget is not None and max_drop is not None:
        raise InvalidInput("give either a default budget or a maximal drop, not both")
    if max_drop is not None and not max_drop >= 0:
        raise InvalidInput(f"the maximal drop must be 0 or more, got {max_drop}")
    ComputePolicy(budget=default_budget)
    budgets = found.budgets
    if default_budget is not None and default_budget < budgets[-1]:
        raise InvalidInput(
            f"default budget {default_budget}: the smallest of this model is {budgets[-1]:g}"
        )
    calls = calls_of(corpus.sequences, runtime.spec, call_tokens)
    calls = [call for call in calls if bool(call.valid.any())]
    usable = sum(int(call.valid.sum()) for call in calls)
    if usable < MIN_TOKENS:
        raise InvalidInput(f"calibration needs at least {MIN_TOKENS} tokens, the data has {usable}")
    tick = Ticker(2 * len(budgets) * len(calls), progress)

    tables = [found.begin(calls)]
    tick(len(calls))
    for budget in budgets[1:]:
        some = []
        for call in calls:
            some.append(found.find(call, budget))
            tick()
        tables.append(torch.stack(some).mean(0))
    record = {
        "kind": found.kind,
        "budgets": list(budgets),
        "thresholds": [_plain(table.tolist(), found.never) for table in tables],
        "kept": [1.0] * len(budgets),
        "tokens": corpus.tokens,
        "data_sha256": corpus.sha256,
        "default_budget": 1.0,
    }
    trial = Runtime(replace(runtime.container, calibration=record))
    policies = [ComputePolicy(budget=budget, mode="calibrated") for budget in budgets]
    qualities = [evaluate(trial, calls, policy, tick) for policy in policies]
    record["kept"] = [found.kept(quality) for quality in qualities]
    if max_drop is not None:
        default_budget = cheapest_within(max_drop, budgets, qualities)
    if default_budget is not None:
        record["default_budget"] = default_budget
    return Calibrated(record, qualities)


def cheapest_within(
    max_drop: float, budgets: Sequence[float], qualities: Sequence[Scored]
) -> float:
    """The smallest budget whose accuracy is at most `max_drop` below the first one's."""
    floor = qualities[0].accuracy - max_drop
    return min(b for b, q in zip(budgets, qualities, strict=True) if q.accuracy >= floor)


def _plain(table: Any, never: float) -> Any:
    """Nested lists with null for every threshold that never cuts."""
    if isinstance(table, list):
        return [_plain(entry, never) for entry in table]
    return None if table == never else table
