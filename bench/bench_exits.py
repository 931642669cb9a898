"""Is an early exit time saved? Forced exit patterns against the ideal of measured block times.

    python -m bench.bench_exits [--models ...] [--batches 8 32 128] [--dtypes ...] [--quick]

Every image is told where to leave, so that the pattern is exact; every gate and head still runs.
`rho` is (T_dense - T) / (T_dense - T_ideal). T_dense is the same backbone without exits. T_ideal is
T_dense less the time of the blocks that need not run, a block of n images taking t(n), plus that of
heads, gates and moves; all parts are measured in turn with the whole passes. `rho_free_gates` takes
heads, gates and moves for nothing, `rho_macs` scales by multiply-accumulates, as if all of them
took the same time.
"""

from __future__ import annotations

import argparse
import bisect
import statistics
import time

import torch
from torch import Tensor

from bench import limits, vision_model
from bench.harness import Arm, Report, alternate, target, timed
from pyruntime.engine.vision import VisionRuntime
from pyruntime.gates.exit import ExitState, own_limits
from pyruntime.gates.policy import ComputePolicy, ExitPolicy
from pyruntime.layers.packed import Packed

DISTRIBUTIONS = ("none", *vision_model.DISTRIBUTIONS)
SETTLE = 0.02  # seconds before every arm
FEW = 32  # every needed number of images up to this one is measured, above it the multiples


class Parts:
    """The parts of a model for n images, as arms that take turns with whole passes."""

    def __init__(self, runtime: VisionRuntime, images: Tensor) -> None:
        self._model = runtime.model
        self._fresh = runtime.model.embed(images)
        spec = runtime.spec
        self._spec = spec
        self._limits = own_limits(spec.exits)[:1].expand(len(images), 2).contiguous()

    def stage(self, stage: int, count: int) -> Arm:
        """The blocks of one stage."""

        def arm() -> float:
            packed = self._copy(count)
            start = time.perf_counter()
            self._model.run_stage(packed, stage)
            return time.perf_counter() - start

        return arm

    def exit(self, count: int) -> Arm:
        """Head, gate and decision, and the move of every second image."""
        half = self._model.ops.plan_partition(
            (torch.arange(count, dtype=torch.int32) % 2) - 1, 1
        )  # 0 stays, -1 leaves

        def once() -> float:
            packed = self._copy(count)
            state = ExitState.start(count, self._spec.num_classes, self._spec.exits)
            limits = self._limits[:count].clone()
            start = time.perf_counter()
            self._model.exit(0, packed, state, limits)
            packed.select(self._model.ops, half)
            return time.perf_counter() - start

        return lambda: statistics.median(once() for _ in range(5))

    def _copy(self, count: int) -> Packed:
        part = self._fresh.slice(0, count)
        return Packed(part.x.clone(), part.cu_seqlens)


def measure(
    report: Report, name: str, dtype: str, batch: int, rounds: int, seconds: float, peak: float
) -> None:
    """Rows of one model at one batch size."""
    whole = VisionRuntime(vision_model.container(name, dtype, exits=False))  # type: ignore[arg-type]
    exits = VisionRuntime(vision_model.container(name, dtype))  # type: ignore[arg-type]
    exits.times.measure()
    images = vision_model.images(batch)
    count = len(exits.spec.exits)
    patterns = {d: vision_model.levels(d, batch, count) for d in DISTRIBUTIONS}
    leave = [ComputePolicy(exit=ExitPolicy(level=level)) for level in range(count)]
    leave.append(ComputePolicy(exit="never"))
    given = {d: [leave[level] for level in pattern] for d, pattern in patterns.items()}

    arms = {"dense": timed(lambda: whole.model.forward(images))}
    for distribution, policies in given.items():
        arms[distribution] = timed(lambda policies=policies: exits.forward(images, policies))
    parts = Parts(exits, images)
    alive = {d: vision_model.survivors(pattern, count) for d, pattern in patterns.items()}
    wanted = {n for some in alive.values() for n in (*some, batch)}
    counts = [0, *sorted({n for n in wanted if 0 < n <= FEW} | {*range(FEW, batch, FEW), batch})]
    for n in counts[1:]:
        arms[f"block {n}"] = parts.stage(0, n)
        arms[f"last {n}"] = parts.stage(count, n)
        arms[f"exit {n}"] = parts.exit(n)
    samples = alternate({key: settled(arm) for key, arm in arms.items()}, rounds, seconds)

    def share(part: str, n: int) -> float:
        """Of the dense time; between the numbers that were measured, on a straight line."""
        right = bisect.bisect_left(counts, n)
        low, high = counts[max(right - 1, 0)], counts[right]
        first, last = (samples.ratio(f"{part} {m}", "dense") if m else 0.0 for m in (low, high))
        return first + (last - first) * (n - low) / (high - low) if high > low else last

    dense = samples.p50("dense")
    guard = samples.only("dense", *patterns).guard()
    common = {"op": "early exit", "model": name, "dtype": dtype, "batch": batch}
    for distribution, policies in given.items():
        output = exits.forward(images, policies)
        if output.levels.tolist() != patterns[distribution]:
            raise SystemExit(f"{name}: images left at {output.levels.tolist()}")
        stages = [("last" if s == count else "block", n) for s, n in enumerate(alive[distribution])]
        blocks = sum(share(part, batch) - share(part, n) for part, n in stages)
        gates = sum(share("exit", n) for n in alive[distribution][:-1])
        ideal = 1 - blocks + gates
        measured = samples.ratio(distribution, "dense")
        macs = output.trace.macs_executed
        row = {
            **common, "scenario": f"{name} B={batch}", "what": distribution,
            **samples.times(distribution), "dense_p50_us": dense * 1e6,
            "time_share": measured, "ideal_share": ideal,
            "macs_share": macs / output.trace.macs_dense,
            "mean_level": statistics.mean(patterns[distribution]),
            "paths": output.trace.paths, "accuracy": "none: random weights",
            "limit_name": "arithmetic peak GFLOP/s", "limit": peak,
            "fraction": 2e-9 * macs / samples.p50(distribution) / peak,
            "heads_and_gates_share": gates, **guard,
        }  # fmt: skip
        if distribution == "none":
            report.add(**row, **target(measured - 1, 0.02, at_most=True))
            continue
        rho = (1 - measured) / (1 - ideal)
        saved = 1 - macs / output.trace.macs_dense
        report.add(
            **row, rho=rho, rho_macs=(1 - measured) / saved, rho_free_gates=(1 - measured) / blocks,
            **target(rho, 0.9 if batch >= 32 else 0.8),
        )  # fmt: skip


def settled(arm: Arm) -> Arm:
    def run() -> float:
        time.sleep(SETTLE)
        return arm()

    return run


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(vision_model.SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32, 128])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="11 at batch 8, 5 at 32, 3 at 128")
    parser.add_argument("--quick", action="store_true", help="only show that it works")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = Report("exits", store=not args.quick)
    machine = limits.measure(args.threads)
    for name in args.models:
        for dtype in args.dtypes:
            for batch in [2] if args.quick else args.batches:
                rounds = 1 if args.quick else args.rounds or {8: 11, 32: 5}.get(batch, 3)
                seconds = 0.0 if args.quick else 10.0
                peak = machine.flops(getattr(torch, dtype))
                measure(report, name, dtype, batch, rounds, seconds, peak)
    return report.close()


if __name__ == "__main__":
    raise SystemExit(main())
