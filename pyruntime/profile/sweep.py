"""Policies against the whole model: accuracy, exact work and measured time, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pyruntime.engine.runtime import Runtime
from pyruntime.errors import InvalidInput
from pyruntime.gates.policy import CAUSAL_MODES, ComputePolicy, ExpertPolicy
from pyruntime.profile import sweep_page
from pyruntime.profile.data import Corpus
from pyruntime.profile.measure import (
    Call,
    Progress,
    Quality,
    Ticker,
    calls_of,
    evaluate,
    run,
    time_prefill,
    trace_of,
)
from pyruntime.profile.page import Page
from pyruntime.profile.timing import Timed, alternate, machine

# What can be swept: the budget, or one limit on the experts of a token.
AXES = ("budget", "experts", "gap", "mass")


@dataclass(frozen=True, slots=True)
class Row:
    """One policy, by its value on the axis of the sweep; None is the dense model.

    `causal`: later tokens change nothing. `prefill` is that of the first call.
    """

    value: float | None
    mode: str
    causal: bool
    quality: Quality
    prefill: Timed


@dataclass(frozen=True, slots=True)
class Report:
    """A sweep.

    Attributes:
        axis: what was varied, one of AXES.
        rows: the dense model first, then every mode with its values.
        setting: what was measured on what, plain JSON values.
        noise: interquartile range of the dense model's own times, over their median.
    """

    axis: str
    rows: list[Row]
    setting: dict[str, str | int | float]
    noise: float

    def page(self) -> Page:
        """See `Reported`."""
        return sweep_page.page(self)

    def plain(self) -> dict[str, Any]:
        """See `Reported`."""
        return sweep_page.plain(self)


def sweep(
    runtime: Runtime,
    corpus: Corpus,
    values: Sequence[float],
    modes: Sequence[str] = ("calibrated",),
    *,
    axis: str = "budget",
    call_tokens: int = 2048,
    repeats: int = 7,
    progress: Progress | None = None,
) -> Report:
    """Every mode at every value, on the corpus in calls of about `call_tokens` tokens.

    The baseline of time is the dense model: the same tensors without residual gates and with all k
    experts of a token, run by the same code in turn with each policy (A B A B …). Budget 1.0 is a
    row of its own and shows what gates cost.

    Args:
        values: budgets, numbers of experts, gaps or masses, as `axis` says; see `ExpertPolicy`.

    Raises:
        InvalidInput: a policy the model cannot honour, before anything runs.
    """
    if not values or not modes:
        raise InvalidInput(f"a sweep needs at least one {axis} and one mode")
    if repeats < 1:
        raise InvalidInput(f"repeats must be at least 1, got {repeats}")
    policies = [_policy(axis, value, mode) for mode in modes for value in values]
    for policy in policies:
        runtime.resolve(policy)
    whole = Runtime(replace(runtime.container, gates=None, calibration=None))
    calls = calls_of(corpus.sequences, runtime.spec, call_tokens)
    tick = Ticker((len(policies) + 1) * len(calls) + repeats * len(policies), progress)

    everything = ComputePolicy()
    dense_quality = evaluate(whole, calls, everything, tick)
    qualities = [evaluate(runtime, calls, policy, tick) for policy in policies]
    first, cache = calls[0], calls[0].cache()
    clock = alternate(
        lambda: time_prefill(whole, first, everything, cache),
        [partial(time_prefill, runtime, first, policy, cache) for policy in policies],
        repeats,
        tick,
    )
    dense = Timed(clock.usual, clock.usual, *_executed(whole, first, everything))
    rows = [Row(None, "dense", True, dense_quality, dense)]
    swept = [value for _ in modes for value in values]
    for i, (policy, value, quality) in enumerate(zip(policies, swept, qualities, strict=True)):
        mode, _ = runtime.resolve(policy)
        prefill = clock.timed(i, *_executed(runtime, first, policy))
        rows.append(Row(value, mode, mode in CAUSAL_MODES, quality, prefill))
    return Report(axis, rows, _setting(runtime, corpus, calls, repeats), clock.noise)


def _policy(axis: str, value: float, mode: str) -> ComputePolicy:
    if axis not in AXES:
        raise InvalidInput(f"a sweep varies one of {', '.join(AXES)}, not {axis!r}")
    if axis == "budget":
        return ComputePolicy(budget=value, mode=mode)
    limit = {"slots" if axis == "experts" else axis: value}
    return ComputePolicy(budget=1.0, mode=mode, experts=ExpertPolicy.of(limit))


def _executed(runtime: Runtime, call: Call, policy: ComputePolicy) -> tuple[int, int]:
    batch = call.prefill()
    _, router = run(runtime, call, batch, policy, call.cache())
    trace = trace_of(runtime, call, batch, policy, router)
    return trace.macs_executed, trace.macs_dense


def _setting(
    runtime: Runtime, corpus: Corpus, calls: Sequence[Call], repeats: int
) -> dict[str, str | int | float]:
    return {
        "model": str(runtime.container.path),
        "dtype": runtime.spec.dtype,
        "gated": runtime.gates is not None,
        "tokens": corpus.tokens,
        "data_sha256": corpus.sha256,
        "timed_sequences": calls[0].num_sequences,
        "timed_tokens": calls[0].batch.num_rows,
        "repeats": repeats,
        "packed_below": runtime.decisions.packed_below,
        **machine(runtime.model.ops),
    }
