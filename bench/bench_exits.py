"""Is an early exit time saved? Forced exit patterns against the ideal of measured block times.

    python -m bench.bench_exits [--models ...] [--batches 8 32 128] [--dtypes ...] [--quick]

Every image is told where to leave, so that the pattern is exact; every gate and head still runs.
`rho` is (T_dense - T) / (T_dense - T_ideal). T_dense is the same backbone without exits, in turn
with the others. T_ideal is T_dense less the measured time of the blocks that need not run, a block
of n images taking t(n), plus the measured time of heads, gates and moves. `rho_macs` takes the
multiply-accumulates that were not executed instead, which no head or gate can reach.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import limits, vision_model
from bench.harness import Report, alternate, target, timed
from pyruntime.engine.vision import VisionRuntime
from pyruntime.gates.exit import ExitState, own_limits
from pyruntime.gates.policy import ComputePolicy, ExitPolicy
from pyruntime.layers.packed import Packed
from pyruntime.plan import Plan

DISTRIBUTIONS = ("none", *vision_model.DISTRIBUTIONS)
SETTLE = 0.02  # seconds before every arm


@dataclass(slots=True)
class Times:
    """Seconds of the parts of a model, for n images; measured when first asked for."""

    runtime: VisionRuntime
    images: Tensor
    known: dict[tuple[str, int], float]

    def stage(self, stage: int, count: int) -> float:
        """One stage: a block of all rows, or the last one."""
        last = stage == len(self.runtime.model.stages) - 1
        return self._of("last" if last else "block", stage, count)

    def gate(self, count: int) -> float:
        """Head, gate, decision and move, of which about as many images stay as leave."""
        return self._of("gate", 0, count)

    def _of(self, part: str, stage: int, count: int) -> float:
        if count == 0:
            return 0.0
        if (part, count) not in self.known:
            self.known[part, count] = self._measure(part, stage, count)
        return self.known[part, count]

    def _measure(self, part: str, stage: int, count: int) -> float:
        model = self.runtime.model
        fresh = model.embed(self.images[:count])
        spec = model.spec
        kept = torch.arange(0, count, 2, dtype=torch.int32)
        inverse = torch.full((count, 1), -1, dtype=torch.int32)
        inverse[kept.long(), 0] = torch.arange(len(kept), dtype=torch.int32)
        half = Plan(
            kept, torch.tensor([0, len(kept)], dtype=torch.int32), None, inverse, count, len(kept)
        )
        rows = own_limits(spec.exits)[:1].expand(count, 2).contiguous()

        def once() -> float:
            packed = Packed(fresh.x.clone(), fresh.cu_seqlens)
            state = ExitState.start(count, spec.num_classes, spec.exits)
            start = time.perf_counter()
            if part == "gate":
                model.exit(0, packed, state, rows)
                packed.select(model.ops, half)
            else:
                model.run_stage(packed, stage)
            return time.perf_counter() - start

        once()
        repeats = 5 if count >= 16 else 9
        return statistics.median(once() for _ in range(repeats))


def measure(
    report: Report, name: str, dtype: str, batch: int, rounds: int, seconds: float, peak: float
) -> None:
    """Rows of one model at one batch size."""
    whole = VisionRuntime(vision_model.container(name, dtype, exits=False))  # type: ignore[arg-type]
    exits = VisionRuntime(vision_model.container(name, dtype))  # type: ignore[arg-type]
    images = vision_model.images(batch)
    count = len(exits.spec.exits)
    patterns = {d: vision_model.levels(d, batch, count) for d in DISTRIBUTIONS}

    def policies(pattern: Sequence[int]) -> list[ComputePolicy]:
        leave = [ExitPolicy(level=level) for level in range(count)] + [ExitPolicy(never=True)]
        return [ComputePolicy(exit=leave[level]) for level in pattern]

    arms = {"dense": timed(lambda: whole.model.forward(images))}
    for distribution, pattern in patterns.items():
        given = policies(pattern)
        arms[distribution] = timed(lambda given=given: exits.forward(images, given))
    arms = {key: _settled(arm) for key, arm in arms.items()}
    samples = alternate(arms, rounds, seconds)

    times = Times(exits, images, {})
    dense = samples.p50("dense")
    common = {"op": "early exit", "model": name, "dtype": dtype, "batch": batch}
    for distribution, pattern in patterns.items():
        output = exits.forward(images, policies(pattern))
        reached = output.levels.tolist()
        if reached != pattern:
            raise SystemExit(f"{name}: images left at {reached}, told to leave at {pattern}")
        alive = vision_model.survivors(pattern, count)
        blocks = sum(times.stage(s, batch) - times.stage(s, n) for s, n in enumerate(alive))
        gates = sum(times.gate(n) for n in alive[:-1])
        ideal = dense - blocks + gates
        measured = dense * samples.ratio(distribution, "dense")
        row = {
            **common, "scenario": f"{name} {dtype} B={batch}", "what": distribution,
            **samples.times(distribution), "dense_p50_us": dense * 1e6,
            "time_share": measured / dense, "ideal_share": ideal / dense,
            "macs_share": output.trace.macs_executed / output.trace.macs_dense,
            "mean_level": statistics.mean(pattern), "accuracy": "none: random weights",
            "gflops": 2e-9 * output.trace.macs_executed / measured,
            "limit_name": "arithmetic peak GFLOP/s", "limit": peak,
            "fraction": 2e-9 * output.trace.macs_executed / measured / peak,
            "heads_and_gates_share": gates / dense, **samples.guard(),
        }  # fmt: skip
        if distribution == "none":
            report.add(**row, **target(measured / dense - 1, 0.02, at_most=True))
            continue
        rho = (dense - measured) / (dense - ideal)
        saved = 1 - output.trace.macs_executed / output.trace.macs_dense
        report.add(
            **row, rho=rho, rho_macs=(dense - measured) / (dense * saved),
            rho_free_gates=(dense - measured) / blocks,
            **target(rho, 0.9 if batch >= 32 else 0.8),
        )  # fmt: skip


def _settled(arm):  # type: ignore[no-untyped-def]
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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="only show that it works")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = Report("exits", store=not args.quick)
    machine = limits.measure(args.threads)
    for name in args.models:
        for dtype in args.dtypes:
            for batch in [2] if args.quick else args.batches:
                rounds = 1 if args.quick else args.rounds
                seconds = 0.0 if args.quick else 4 * args.rounds
                peak = machine.flops(getattr(torch, dtype))
                measure(report, name, dtype, batch, rounds, seconds, peak)
    return report.close()


if __name__ == "__main__":
    raise SystemExit(main())
