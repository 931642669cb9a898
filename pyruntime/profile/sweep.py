"""Policies against the whole model: accuracy, exact work and measured time, side by side."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import pyruntime
from pyruntime.engine.runtime import Runtime
from pyruntime.errors import InvalidInput
from pyruntime.gates.policy import CAUSAL_MODES, ComputePolicy, ExpertPolicy
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

# What can be swept: the budget, or one limit on the experts of a token.
AXES = ("budget", "experts", "gap", "mass")
# Below this share of saved work the denominator of the realised fraction is mostly noise.
_LEAST_SAVED = 0.01


@dataclass(frozen=True, slots=True)
class Prefill:
    """Timed prefill of the first call. Seconds are medians of alternating runs.

    Attributes:
        seconds: of this row's policy.
        dense_seconds: of the dense model, from the runs that alternated with these.
        macs_executed: multiply-accumulates of the timed call, counted from its plans.
        macs_dense: those of the dense model on it.
    """

    seconds: float
    dense_seconds: float
    macs_executed: int
    macs_dense: int

    @property
    def macs_saved(self) -> float:
        """Share of the dense work that was not executed; negative when gates cost more."""
        return 1.0 - self.macs_executed / self.macs_dense

    @property
    def time_saved(self) -> float:
        """Share of the dense time that was not spent."""
        return 1.0 - self.seconds / self.dense_seconds

    @property
    def realised(self) -> float | None:
        """Time saved over the time that the saved work would be worth; None without savings."""
        saved = self.macs_saved
        return self.time_saved / saved if saved >= _LEAST_SAVED else None


@dataclass(frozen=True, slots=True)
class Row:
    """One policy, by its value on the axis of the sweep; None is the dense model.

    `causal`: later tokens change nothing.
    """

    value: float | None
    mode: str
    causal: bool
    quality: Quality
    prefill: Prefill


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
    dense_times, times = _alternate(runtime, whole, calls[0], policies, repeats, tick)

    median = statistics.median
    every = [time for some in dense_times for time in some]
    usual = median(every)
    low, _, high = statistics.quantiles(every, n=4) if len(every) > 1 else (usual,) * 3
    executed = _executed(whole, calls[0], everything)
    rows = [Row(None, "dense", True, dense_quality, Prefill(usual, usual, *executed))]
    swept = [value for _ in modes for value in values]
    for policy, value, quality, dense, own in zip(
        policies, swept, qualities, dense_times, times, strict=True
    ):
        prefill = Prefill(median(own), median(dense), *_executed(runtime, calls[0], policy))
        mode, _ = runtime.resolve(policy)
        rows.append(Row(value, mode, mode in CAUSAL_MODES, quality, prefill))
    return Report(axis, rows, _setting(runtime, corpus, calls, repeats), (high - low) / usual)


def _policy(axis: str, value: float, mode: str) -> ComputePolicy:
    if axis not in AXES:
        raise InvalidInput(f"a sweep varies one of {', '.join(AXES)}, not {axis!r}")
    if axis == "budget":
        return ComputePolicy(budget=value, mode=mode)
    limit = {"slots" if axis == "experts" else axis: value}
    return ComputePolicy(budget=1.0, mode=mode, experts=ExpertPolicy.of(limit))


def _alternate(
    runtime: Runtime,
    whole: Runtime,
    call: Call,
    policies: Sequence[ComputePolicy],
    repeats: int,
    tick: Ticker,
) -> tuple[list[list[float]], list[list[float]]]:
    """Seconds of the dense model and of each policy: [policies][repeats], measured in turn."""
    cache, everything = call.cache(), ComputePolicy()
    dense: list[list[float]] = [[] for _ in policies]
    own: list[list[float]] = [[] for _ in policies]
    time_prefill(whole, call, everything, cache)
    for _ in range(repeats):
        for i, policy in enumerate(policies):
            dense[i].append(time_prefill(whole, call, everything, cache))
            own[i].append(time_prefill(runtime, call, policy, cache))
            tick()
    return dense, own


def _executed(runtime: Runtime, call: Call, policy: ComputePolicy) -> tuple[int, int]:
    batch = call.prefill()
    _, router = run(runtime, call, batch, policy, call.cache())
    trace = trace_of(runtime, call, batch, policy, router)
    return trace.macs_executed, trace.macs_dense


def _setting(
    runtime: Runtime, corpus: Corpus, calls: Sequence[Call], repeats: int
) -> dict[str, str | int | float]:
    ops = runtime.model.ops
    name = ops.__name__.rpartition(".")[2]
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
        "backend": f"{name} ({ops.isa()})" if name == "native" else name,
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "pyruntime": pyruntime.__version__,
        "torch": str(torch.__version__),
    }


def processor() -> str:
    """The processor's name as Linux tells it, else as Python does."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
