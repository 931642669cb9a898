"""A policy against the dense model on the clock: measured in turn, on the same input."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

import pyruntime
from pyruntime.profile.measure import Ticker

# Below this share of saved work the denominator of the realised fraction is mostly noise.
LEAST_SAVED = 0.01


@dataclass(frozen=True, slots=True)
class Timed:
    """One policy on a timed input. Seconds are medians of alternating runs.

    Attributes:
        seconds: of the policy.
        dense_seconds: of the dense model, from the runs that alternated with these.
        macs_executed: multiply-accumulates of the timed input, counted from its plans.
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
        return self.time_saved / saved if saved >= LEAST_SAVED else None


@dataclass(frozen=True, slots=True)
class Clock:
    """Times of some arms and, for each, of the dense model right before it: [arms][repeats]."""

    dense: Sequence[Sequence[float]]
    own: Sequence[Sequence[float]]

    @property
    def usual(self) -> float:
        """Median seconds of the dense model."""
        return statistics.median(time for some in self.dense for time in some)

    @property
    def noise(self) -> float:
        """Interquartile range of the dense model's times, over their median."""
        every = [time for some in self.dense for time in some]
        if len(every) < 2:
            return 0.0
        low, _, high = statistics.quantiles(every, n=4)
        return (high - low) / self.usual

    def timed(self, arm: int, executed: int, dense: int) -> Timed:
        """Of one arm, with what it executed and what the dense model does."""
        median = statistics.median
        return Timed(median(self.own[arm]), median(self.dense[arm]), executed, dense)


def alternate(
    dense: Callable[[], float], arms: Sequence[Callable[[], float]], repeats: int, tick: Ticker
) -> Clock:
    """Seconds that calls report: dense, the first arm, dense, the second arm, … and all again."""
    before: list[list[float]] = [[] for _ in arms]
    own: list[list[float]] = [[] for _ in arms]
    dense()
    for _ in range(repeats):
        for i, arm in enumerate(arms):
            before[i].append(dense())
            own[i].append(arm())
            tick()
    return Clock(before, own)


def machine(ops: ModuleType) -> dict[str, str | int]:
    """Where times were measured: plain JSON values."""
    name = ops.__name__.rpartition(".")[2]
    return {
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
