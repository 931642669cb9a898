"""Timing and rows, the same for every benchmark: alternation, medians, drift, limits, targets."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
TOLERANCE = 1.02  # a larger fraction of a limit is a measurement error
DRIFT = 0.10  # medians of the two halves of a run may differ by this much

Arm = Callable[[], float]  # does its work once and returns seconds


@dataclass(frozen=True, slots=True)
class Samples:
    """Times of several arms, measured in turns: sample i of every arm belongs to round i.

    Attributes:
        seconds: by arm, one value a round.
        drift: the largest difference between the medians of a run's halves, over arms.
        discarded: rounds that were measured and thrown away while waiting for a quiet machine.
    """

    seconds: Mapping[str, list[float]]
    drift: float
    discarded: int

    def only(self, *arms: str) -> Samples:
        """Those of some arms."""
        seconds = {arm: self.seconds[arm] for arm in arms}
        return Samples(seconds, max(map(_drift, seconds.values())), self.discarded)

    @property
    def stable(self) -> bool:
        """Whether the run may be trusted; a row of an unstable run says so."""
        return self.drift <= DRIFT

    def p50(self, arm: str) -> float:
        """Median seconds of an arm."""
        return statistics.median(self.seconds[arm])

    def p90(self, arm: str) -> float:
        """90th percentile of an arm's seconds."""
        return quantile(self.seconds[arm], 0.9)

    def ratio(self, arm: str, base: str) -> float:
        """Median over rounds of arm / base: both sides of a round saw the same machine."""
        pairs = zip(self.seconds[arm], self.seconds[base], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def times(self, arm: str) -> dict[str, float]:
        """The fields p50_us and p90_us of a row."""
        return {"p50_us": self.p50(arm) * 1e6, "p90_us": self.p90(arm) * 1e6}

    def guard(self) -> dict[str, Any]:
        """The fields of a row that say how far to trust it."""
        return {
            "stable": self.stable,
            "drift": round(self.drift, 3),
            "rounds": min(map(len, self.seconds.values())),
            "discarded_rounds": self.discarded,
        }


def quantile(values: list[float], q: float) -> float:
    """The value below which a share q of the values lies, interpolated."""
    return float(torch.quantile(torch.tensor(values, dtype=torch.float64), q))


def alternate(arms: Mapping[str, Arm], rounds: int, seconds: float, warmup: int = 1) -> Samples:
    """Run all arms in turns, A B C A B C …, until `rounds` rounds in a row do not drift.

    Keeps the last `rounds` rounds. Stops after `seconds` even if they drift: the samples say so.
    The order of the arms turns around every round, so that none always follows the same one.
    """
    for _ in range(warmup):
        for run in arms.values():
            run()
    taken: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    end = time.perf_counter() + seconds
    count = 0
    while True:
        for name in names if count % 2 == 0 else reversed(names):
            taken[name].append(arms[name]())
        count += 1
        if count < rounds:
            continue
        window = {name: values[-rounds:] for name, values in taken.items()}
        drift = max(map(_drift, window.values()))
        if drift <= DRIFT or time.perf_counter() > end:
            return Samples(window, drift, count - rounds)


def timed(run: Callable[[], object], loops: int = 1) -> Arm:
    """An arm: mean seconds of `loops` calls in a row."""

    def arm() -> float:
        start = time.perf_counter()
        for _ in range(loops):
            run()
        return (time.perf_counter() - start) / loops

    return arm


def target(measured: float, wanted: float, at_most: bool = False) -> dict[str, Any]:
    """The fields of a row that has a target: reached or missed, never left out."""
    reached = measured <= wanted if at_most else measured >= wanted
    sign = "<=" if at_most else ">="
    return {"measured": measured, "target": f"{sign} {wanted:g}", "pass": reached}


class Report:
    """Rows of one benchmark: printed as they come; `store` puts them in bench/results/NAME.json.

    Every row carries the git revision, the machine, the threads and the versions. A row with a
    `limit` gets the `fraction` of it that was reached.
    """

    def __init__(self, name: str, store: bool = True) -> None:
        self._path = RESULTS / f"{name}.json" if store else None
        self._common = environment()  # the threads as they are now: set them first
        self._rows: list[dict[str, Any]] = []

    def add(self, **row: Any) -> None:
        """Add a row."""
        row = {key: _rounded(value) for key, value in row.items()}
        self._rows.append(row)
        print(json.dumps(row), flush=True)

    def close(self) -> int:
        """Write the file, print the misses; exit status 1 if a fraction exceeds its limit."""
        if self._path is not None:
            RESULTS.mkdir(exist_ok=True)
            # The row last: one that measures other thread counts says its own.
            lines = (json.dumps({**self._common, **row}) for row in self._rows)
            self._path.write_text("".join(f"{line}\n" for line in lines))
        wrong = [row for row in self._rows if row.get("fraction", 0) > TOLERANCE]
        for row in self._rows:
            if "pass" in row:
                word = "reached" if row["pass"] else "MISSED"
                trust = "" if row.get("stable", True) else "  (unstable run)"
                measured = f"{row['measured']:g}"
                print(f"{word:8} {_label(row):64} {measured:>8}  target {row['target']}{trust}")
        for row in wrong:
            print(f"ERROR    {_label(row)}: {row['fraction']:g} of {row['limit_name']}: void")
        return 1 if wrong else 0


def environment() -> dict[str, Any]:
    """Git revision, machine and versions."""
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        versions["pyruntime"] = importlib.metadata.version("pyruntime")
    except importlib.metadata.PackageNotFoundError:
        versions["pyruntime"] = "not installed"
    return {
        "git": revision or "unknown",
        "machine": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "versions": versions,
    }


def cpu_model() -> str:
    """The CPU's name, with family and model: virtual machines hide the rest."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    name = fields.get("model name", platform.machine()).strip()
    return f"{name} family{fields.get('cpu family', ' ?')} model{fields.get('model', ' ?')}"


def _drift(values: list[float]) -> float:
    half = len(values) // 2
    if half == 0:
        return 0.0
    first, last = statistics.median(values[:half]), statistics.median(values[-half:])
    return abs(last / first - 1)


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _label(row: Mapping[str, Any]) -> str:
    names = ("op", "scenario", "what", "dtype")
    return " ".join(str(row[name]) for name in names if row.get(name) is not None)
