"""Timing and rows of the CUDA benchmarks: calls inside CUDA graphs, limits, fractions."""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
BF16 = torch.bfloat16
L2_BYTES = 64 << 20  # of an H200, rounded up: what must be streamed to be cold
Call = Callable[[int], object]  # one call on copy i of its data


# ---- timing ----


@dataclass
class Timing:
    """Microseconds of one call: inside a graph, and as the host pays for it."""

    graph: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    def row(self) -> dict[str, float]:
        graph = sorted(self.graph)
        return {
            "p50_us": round(statistics.median(graph), 3),
            "p90_us": round(graph[int(0.9 * (len(graph) - 1))], 3),
            "call_us": round(statistics.median(self.host), 3),
        }


def measure(candidates: dict[str, Call], copies: int, rounds: int = 11) -> dict[str, Timing]:
    """Time every candidate, in turn (A B A B): call i of a graph works on copy i % copies."""
    calls = max(20, 2 * copies)
    graphs: dict[str, Any] = {}
    timings = {name: Timing() for name in candidates}
    for name, call in candidates.items():
        for i in range(3):
            call(i % copies)  # loads kernels, fills caches of handles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(calls):
                call(i % copies)
        graphs[name] = graph
    for _ in range(rounds):
        for name, call in candidates.items():
            graphs[name].replay()
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            graphs[name].replay()
            end.record()
            torch.cuda.synchronize()
            timings[name].graph.append(start.elapsed_time(end) * 1000 / calls)
            begin = time.perf_counter()
            for i in range(20):
                call(i % copies)
            timings[name].host.append((time.perf_counter() - begin) * 1e6 / 20)
            torch.cuda.synchronize()
    return timings


def copies_for(nbytes: int) -> int:
    """Copies of the data of a call that together do not fit L2, so that every call is cold."""
    return max(1, min(64, -(-2 * L2_BYTES // max(nbytes, 1))))


# ---- limits ----


@dataclass(frozen=True)
class Limits:
    """Of this machine, measured: bytes/s of HBM, FLOP/s of bfloat16, microseconds of a launch."""

    hbm: float
    flops: float
    launch_us: float

    def microseconds(self, nbytes: float, flops: float = 0.0) -> tuple[str, float]:
        """Name and value of the limit that binds."""
        candidates = {
            "hbm": nbytes / self.hbm * 1e6,
            "bf16": flops / self.flops * 1e6,
            "launch": self.launch_us,
        }
        name = max(candidates, key=lambda key: candidates[key])
        return name, candidates[name]


def measure_limits() -> Limits:
    """Copy and sum for bandwidth, 8192^3 after 2 s of load for FLOPs, one element to launch."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=BF16) for _ in range(2))
    one = torch.zeros(1, device="cuda")
    warm = time.perf_counter()
    while time.perf_counter() - warm < 2.0:
        left @ right
        torch.cuda.synchronize()

    def best(call: Call) -> float:
        return min(measure({"x": call}, 1)["x"].graph)

    read = best(lambda i: torch.sum(a.view(torch.int64)))
    copy = best(lambda i: b.copy_(a))
    hbm = max(2 * a.numel() / copy, a.numel() / read) * 1e6
    flops = 2 * 8192**3 / best(lambda i: left @ right) * 1e6
    return Limits(hbm, flops, best(lambda i: one.add_(1)))


# ---- rows ----


@functools.cache
def machine() -> dict[str, str]:
    state = ""
    query = ["nvidia-smi", "--query-gpu=name,clocks.sm,power.draw,driver_version", "--format=csv"]
    with contextlib.suppress(OSError):
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        state = "".join(done.stdout.splitlines()[-1:])
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    return {
        "machine": torch.cuda.get_device_name(),
        "state": state,
        "torch": torch.__version__,
        "git": git.stdout.strip() or "unknown",
    }


@dataclass
class Report:
    """Rows of one file; remembers fractions that cannot be."""

    path: Path
    limits: Limits
    impossible: list[str] = field(default_factory=list)

    def add(
        self,
        op: str,
        shape: Mapping[str, object],
        nbytes: float,
        flops: float,
        times: dict[str, Timing],
    ) -> None:
        name, limit = self.limits.microseconds(nbytes, flops)
        with self.path.open("a") as file:
            for backend, timing in times.items():
                row: dict[str, Any] = {"op": op, **shape, "backend": backend, **timing.row()}
                fraction = limit / row["p50_us"]
                row |= {
                    "gb_s": round(nbytes / row["p50_us"] / 1e3, 1),
                    "tflop_s": round(flops / row["p50_us"] / 1e6, 2),
                    "limit": name,
                    "limit_us": round(limit, 3),
                    "fraction": round(fraction, 4),
                    **machine(),
                }
                text = json.dumps(row)
                file.write(text + "\n")
                print(
                    f"{op:16} {backend:10} {shape} p50 {row['p50_us']} us, "
                    f"call {row['call_us']} us, {row['fraction']:.2f} of {name}",
                    flush=True,
                )
                # A launch is no physical limit: another kernel's may be a little shorter.
                if fraction > 1.02 and name != "launch":
                    self.impossible.append(text)
