"""What can this machine do at best? Memory bandwidth, arithmetic peak, cache sizes.

    python -m bench.limits [--threads 1 2]

Each limit is the best of several loops: plain C++ (limits.cc, built on the fly for this very CPU)
and what torch reaches. A limit that another benchmark beats by more than 2 % was not a limit, and
fails that benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("limits.cc")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-Wno-psabi")


@dataclass(frozen=True, slots=True)
class Limits:
    """Ceilings of one thread count. A copy counts the bytes read and the bytes written."""

    threads: int
    read_gb_per_s: float
    copy_gb_per_s: float
    fp32_gflops: float
    bf16_gflops: float
    method: str

    def flops(self, dtype: torch.dtype) -> float:
        """Arithmetic peak of a dtype, GFLOP/s."""
        return self.bf16_gflops if dtype == torch.bfloat16 else self.fp32_gflops

    def merge(self, other: Limits) -> Limits:
        """The higher of both, limit by limit: a ceiling is the best ever seen."""
        names = ("read_gb_per_s", "copy_gb_per_s", "fp32_gflops", "bf16_gflops")
        return replace(self, **{n: max(getattr(self, n), getattr(other, n)) for n in names})


def measure(threads: int, megabytes: int = 256) -> Limits:
    """Limits with `threads` threads on arrays of `megabytes`; takes about three seconds."""
    by_torch = _torch_limits(threads, megabytes)
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return by_torch
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "limits")
        subprocess.run([compiler, *_FLAGS, str(_SOURCE), "-o", program], check=True)
        run = [program, str(threads), str(megabytes)]
        found = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    found["bf16_gflops"] = found["bf16_gflops"] or found["fp32_gflops"]
    return Limits(threads, **found, method="compiled loops and torch").merge(by_torch)


def cache_sizes() -> dict[str, str]:
    """Size of each cache of the first core, as the kernel reports it; empty where it does not."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (
            (index / name).read_text().strip() for name in ("level", "type", "size")
        )
        found[f"L{level} {kind.lower()}"] = size
    return found


def _torch_limits(threads: int, megabytes: int) -> Limits:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    count = megabytes * 262144
    x, y = torch.zeros(count), torch.zeros(count)
    read = 4 * count / _best(lambda: torch.sum(x), 3)
    copy = 8 * count / _best(lambda: y.copy_(x), 3)
    peaks = []
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
        peaks.append(2 * 1024**3 / _best(partial(torch.mm, a, b), 3) / 1e9)
    torch.set_num_threads(before)
    return Limits(threads, read / 1e9, copy / 1e9, peaks[0], peaks[1], method="torch")


def _best(run: Callable[[], object], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Prints and stores one row per thread count."""
    from bench.harness import Report

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    report = Report("limits")
    for threads in parser.parse_args().threads:
        report.add(op="limits", caches=cache_sizes(), **asdict(measure(threads)))
    raise SystemExit(report.close())


if __name__ == "__main__":
    main()
