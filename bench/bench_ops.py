"""Is every op near its limit, and is a call cheap?

    python -m bench.bench_ops [--only import calls move patches matmul] [--threads 2] [--quick]

Sections: import time against torch; checked calls and planners in microseconds; gather and combine
against the measured copy bandwidth; patches of images against a copy of as many bytes, and
embed_patches against the arithmetic peak and its two halves in turn; segment_matmul with few rows
per segment against the time to read its weights once, and with many rows against torch's dense
matmul of equal FLOPs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench import limits
from bench.harness import Report, alternate, target, timed
from pyruntime import _cpu, ops
from pyruntime.ops import Pixels, Weight
from pyruntime.plan import Plan

LARGE = 64 << 20  # bytes that are gathered and combined: twice the last-level cache
WEIGHTS = 256 << 20  # bytes of the matrices of a small-segment matmul: eight times the cache
IMPORT = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"
PUBLIC = "import pyruntime; [getattr(pyruntime, name) for name in pyruntime.__all__]"


def bench_import(report: Report, quick: bool) -> None:
    """Import time in fresh processes; every public name resolved, because imports are lazy."""

    def fresh(statement: str) -> Callable[[], float]:
        command = [sys.executable, "-c", IMPORT.format(statement)]
        # Installed packages have their bytecode; the first, discarded round writes ours.
        cached = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        return lambda: float(
            subprocess.run(command, capture_output=True, check=True, env=cached).stdout
        )

    arms = {
        "torch": fresh("import torch"),
        "bare": fresh("import torch, pyruntime"),
        "pyruntime": fresh(PUBLIC),
    }
    samples = alternate(arms, rounds=3 if quick else 11, seconds=0 if quick else 40)
    for arm, what in (("bare", "import pyruntime"), ("pyruntime", "every public name")):
        extra_ms = 1e3 * (samples.p50(arm) - samples.p50("torch"))
        report.add(
            op="import", what=f"{what}, ms beyond import torch",
            torch_ms=samples.p50("torch") * 1e3, **samples.times(arm), **samples.guard(),
            **target(extra_ms, 80, at_most=True),
        )  # fmt: skip


def bench_calls(report: Report, quick: bool) -> None:
    """Cost of a call: checks, allocation, binding and next to no work."""
    random = torch.Generator().manual_seed(0)
    few, everyone = torch.randn(8, 64, generator=random), Plan.all(8)
    scores, tau = torch.rand(256, generator=random), torch.tensor(0.5)
    routed = torch.rand(256, 8, generator=random)
    labels = torch.randint(0, 8, (256,), generator=random, dtype=torch.int32)
    logits = torch.randn(512, 64, generator=random)
    one, best = logits[:1], ops.TopK(2)
    rule = ops.TopK(8, "softmax", normalize=True)
    calls: list[tuple[str, str, Callable[[], Any], float]] = [
        ("gather", "checked call, 8 rows of 64", lambda: ops.gather(few, everyone), 6),
        ("plan_threshold", "N=256", lambda: ops.plan_threshold(scores, tau), 15),
        ("plan_threshold", "N=256, weighted", lambda: ops.plan_threshold(scores, tau, True), 15),
        ("plan_topk", "N=256, E=8, k=2", lambda: ops.plan_topk(routed, best), 15),
        ("plan_topk", "N=1, E=64, k=8, softmax", lambda: ops.plan_topk(one, rule), 12),
        ("plan_topk", "N=512, E=64, k=8, softmax", lambda: ops.plan_topk(logits, rule), 150),
        ("plan_partition", "N=256, S=8", lambda: ops.plan_partition(labels, 8), 15),
    ]
    arms = {f"{op} {what}": timed(call, 200) for op, what, call, _ in calls}
    samples = alternate(arms, rounds=9 if quick else 51, seconds=0 if quick else 20)
    for op, what, _, wanted in calls:
        arm = f"{op} {what}"
        report.add(
            op=op, what=f"{what}, us", **samples.times(arm), **samples.guard(),
            **target(samples.p50(arm) * 1e6, wanted, at_most=True),
        )  # fmt: skip


def bench_move(report: Report, quick: bool, found: limits.Limits) -> None:
    """gather and combine of more bytes than any cache holds; every second row, at random.

    The copy is the best of torch's and our own of as many neighbouring rows, on this memory, in
    turn with the ops (see `bench_small` for why); the row has `share_of_machine_limit` as well.
    """
    width = 1024
    for dtype in (torch.bfloat16, torch.float32):
        rows = LARGE // (width * dtype.itemsize)
        random = torch.Generator().manual_seed(0)
        x = torch.randn(2 * rows, width, generator=random).to(dtype)
        kept = torch.randperm(2 * rows, generator=random)[:rows]
        labels = torch.full((2 * rows,), -1, dtype=torch.int32)
        labels[kept] = 0
        plan = ops.plan_partition(labels, 1)
        packed = ops.gather(x, plan)
        addresses = x.data_ptr(), plan.rows.data_ptr()
        copy = partial(_cpu.gather, *addresses, rows, width * dtype.itemsize, packed.data_ptr())
        tables: list[tuple[str, str, Callable[[], Any], int, bool]] = [
            ("gather", "into existing memory", copy, 2, True),
            ("gather", "fresh result", partial(ops.gather, x, plan), 2, False),
            ("combine", "", partial(ops.combine, packed, plan, x), 3, True),
        ]
        arms = {f"{op} {how}": timed(run) for op, how, run, _, _ in tables}
        first = torch.arange(rows, dtype=torch.int32)
        row_bytes = width * dtype.itemsize
        copies = {
            "copy by torch": partial(packed.copy_, x[:rows]),
            "copy by gather": partial(
                _cpu.gather, x.data_ptr(), first.data_ptr(), rows, row_bytes, packed.data_ptr()
            ),
        }
        arms |= {name: timed(run) for name, run in copies.items()}
        samples = alternate(arms, rounds=5 if quick else 15, seconds=0 if quick else 20)
        for op, how, _, passes, aimed in tables:
            arm = f"{op} {how}"
            moved = passes * rows * width * dtype.itemsize
            speed = moved / samples.p50(arm) / 1e9
            copied = 2 * rows * row_bytes / min(samples.p50(name) for name in copies) / 1e9
            share = speed / copied
            report.add(
                op=op, what=f"{how} share of copy bandwidth".strip(),
                dtype=str(dtype).removeprefix("torch."),
                shapes={"N": 2 * rows, "kept": rows, "H": width}, **samples.times(arm),
                gb_per_s=speed, limit_name="copy bandwidth of this memory GB/s", limit=copied,
                share_of_machine_limit=speed / found.copy_gb_per_s,
                torch_copy_gb_per_s=2 * rows * row_bytes / samples.p50("copy by torch") / 1e9,
                fraction=share, **samples.guard(), **(target(share, 0.80) if aimed else {}),
            )  # fmt: skip


def squares(count: int, coarse: float, size: int, side: int = 224) -> torch.Tensor:
    """Places that tile the images: a share stays squares of 2 * size, the others are quarters."""
    random = torch.Generator().manual_seed(0)
    cells = side // size
    across = (cells + 1) // 2
    rows = []
    for image in range(count):
        stays = torch.rand(across, across, generator=random) < coarse
        big = torch.nonzero(stays) * 2 * size
        fine = ~stays.repeat_interleave(2, 0).repeat_interleave(2, 1)
        small = torch.nonzero(fine[:cells, :cells]) * size
        for corners, ratio in ((big, 2), (small, 1)):
            label = corners.new_tensor([image]).expand(len(corners), 1)
            rows.append(torch.cat([label, corners, torch.full_like(label, ratio)], 1))
    return torch.cat(rows).int()


# Name, pixels a side of a patch, columns of the product, share of coarse squares.
PATCHES = [("fine", 16, 384, 0.0), ("half coarse", 16, 384, 0.5), ("regions", 32, 64, 0.0)]


def bench_patches(report: Report, quick: bool, found: limits.Limits) -> None:
    """Patches of 224-pixel images: gathered, and as the tokens of a ViT-S or of a gate's layer.

    The limit of a gather is a copy of as many bytes, pixels read once and rows written. Every arm
    runs several times in a row, so that all find the caches as they leave them.
    """
    for count in (1, 8, 32):
        images = torch.randn(count, 3, 224, 224)
        pixels = Pixels.of(images)
        for name, size, width, coarse in PATCHES:
            places = squares(count, coarse, size)
            for dtype in (torch.float32, torch.bfloat16):
                gather = partial(ops.gather_patches, pixels, places, size, "area", dtype)
                rows = gather()
                moved = images.nbytes + rows.nbytes
                source, target_of_copy = torch.zeros(2, moved // 8)
                inner = 3 * size * size
                weight = Weight.pack(torch.randn(width, inner).to(dtype) / inner**0.5)
                bias, out = torch.randn(width), torch.empty(len(rows), width, dtype=dtype)
                calls: dict[str, Callable[[], Any]] = {
                    "copy": partial(target_of_copy.copy_, source),
                    "fresh copy": source.clone,
                    "gather": gather,
                    "product": partial(ops.segment_matmul, rows, weight, bias=bias, out=out),
                    "embed": partial(
                        ops.embed_patches, pixels, places, weight, bias, size=size, out=out
                    ),
                    "both": lambda gather=gather, weight=weight, bias=bias, out=out: (
                        ops.segment_matmul(gather(), weight, bias=bias, out=out)
                    ),
                }
                arms = {arm: timed(run, 8) for arm, run in calls.items()}
                samples = alternate(arms, rounds=5 if quick else 15, seconds=0 if quick else 10)
                copied = min(samples.p50("copy"), samples.p50("fresh copy"))
                common = {
                    "dtype": str(dtype).removeprefix("torch."),
                    "shapes": {"B": count, "R": len(rows), "size": size, "D": width},
                    **samples.guard(),
                }
                share = copied / samples.p50("gather")
                report.add(
                    op="gather_patches", what=f"B={count} {name}, share of copy bandwidth",
                    **samples.times("gather"), gb_per_s=moved / samples.p50("gather") / 1e9,
                    limit_name="copy bandwidth of as many bytes GB/s", fraction=share,
                    limit=moved / copied / 1e9, **common, **target(share, 0.70),
                )  # fmt: skip
                flops = 2 * len(rows) * inner * width
                speed = flops / samples.p50("embed") / 1e9
                report.add(
                    op="embed_patches", what=f"B={count} {name}, gather then product / ours",
                    **samples.times("embed"), gflops=speed, limit_name="arithmetic peak GFLOP/s",
                    limit=found.flops(dtype), fraction=speed / found.flops(dtype),
                    product_p50_us=samples.p50("product") * 1e6, **common,
                    **target(samples.ratio("both", "embed"), 0.97),
                )  # fmt: skip


def segments_plan(segments: int, rows: int) -> Plan:
    """Every segment gets `rows` rows, source order mixed over segments."""
    labels = torch.arange(segments, dtype=torch.int32).repeat(rows)
    return ops.plan_partition(labels, segments)


def bench_small(report: Report, quick: bool, found: limits.Limits) -> None:
    """1 to 8 rows per segment: the time to read every weight once is the floor.

    The read is timed on these very weights, in turn with the matmuls: on a virtual machine one loop
    reads 4 KB pages at 30 GB/s and huge pages at 37 to 67, so a limit taken on other memory would
    measure the pages. The fastest pass over the weights counts, our own included: torch's sum is
    not always it. The row has `share_of_machine_limit`, against limits.json, as well.
    """
    for dtype in (torch.bfloat16, torch.float32):
        segments, inner = 8, 2048
        outer = WEIGHTS // (segments * inner * dtype.itemsize)
        random = torch.Generator().manual_seed(0)
        dense = torch.empty(segments, outer, inner).normal_(generator=random).to(dtype)
        weight = Weight.pack(dense)
        del dense
        arms, work = {}, {}
        for rows in (1, 2, 4, 8):
            plan = segments_plan(segments, rows)
            x = torch.randn(segments * rows, inner, generator=random).to(dtype)
            arms[str(rows)] = timed(partial(ops.segment_matmul, x, weight, plan, gather=True))
            moved = weight.data.nbytes + segments * rows * (inner + outer) * dtype.itemsize
            work[rows] = (moved, 2 * segments * rows * inner * outer)
        readers = {
            "read int64": weight.data.flatten().view(torch.int64),
            "read float32": weight.data.flatten().view(torch.float32),
        }
        arms |= {name: timed(words.sum) for name, words in readers.items()}
        samples = alternate(arms, rounds=5 if quick else 15, seconds=0 if quick else 20)
        read = weight.data.nbytes / min(samples.p50(name) for name in arms) / 1e9
        for rows, (moved, flops) in work.items():
            arm = str(rows)
            floor = max(moved / read, flops / found.flops(dtype)) / 1e9
            share = floor / samples.p50(arm)
            report.add(
                op="segment_matmul", what=f"{rows} rows/segment, share of weight-read floor",
                dtype=str(dtype).removeprefix("torch."),
                shapes={"S": segments, "rows": rows, "K": inner, "N": outer},
                **samples.times(arm), gb_per_s=moved / samples.p50(arm) / 1e9,
                gflops=flops / samples.p50(arm) / 1e9,
                limit_name="read bandwidth of these weights GB/s", limit=read, fraction=share,
                share_of_machine_limit=moved / samples.p50(arm) / 1e9 / found.read_gb_per_s,
                **samples.guard(), **target(share, 0.80),
            )  # fmt: skip


def bench_large(report: Report, quick: bool, found: limits.Limits) -> None:
    """128 rows per segment and more, against torch's dense matmul of the same total FLOPs."""
    for dtype in (torch.bfloat16, torch.float32):
        segments, inner, outer = 4, 1024, 2048
        random = torch.Generator().manual_seed(0)
        dense = torch.randn(segments, outer, inner, generator=random).to(dtype)
        weight, single = Weight.pack(dense), dense[0].clone()
        for rows in (128, 512):
            total = segments * rows
            plan = segments_plan(segments, rows)
            x = torch.randn(total, inner, generator=random).to(dtype)
            arms = {
                "torch": timed(partial(torch.nn.functional.linear, x, single)),
                "ours": timed(partial(ops.segment_matmul, x, weight, plan, gather=True)),
            }
            samples = alternate(arms, rounds=5 if quick else 15, seconds=0 if quick else 15)
            speed = 2 * total * inner * outer / samples.p50("ours") / 1e9
            report.add(
                op="segment_matmul", what=f"{rows} rows/segment, torch dense time / ours",
                dtype=str(dtype).removeprefix("torch."),
                shapes={"S": segments, "rows": rows, "K": inner, "N": outer},
                **samples.times("ours"), torch_p50_us=samples.p50("torch") * 1e6, gflops=speed,
                limit_name="arithmetic peak GFLOP/s", limit=found.flops(dtype),
                fraction=speed / found.flops(dtype), **samples.guard(),
                **target(samples.ratio("torch", "ours"), 0.85),
            )  # fmt: skip


def main() -> None:
    """Runs the chosen sections."""
    sections = ("import", "calls", "move", "patches", "matmul")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=sections, default=sections)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few repeats: does it run at all?")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = Report("ops", store=not args.quick)
    if "import" in args.only:
        bench_import(report, args.quick)
    if "calls" in args.only:
        bench_calls(report, args.quick)
    if {"move", "patches", "matmul"} & set(args.only):
        found = limits.measure(args.threads)
        if "move" in args.only:
            bench_move(report, args.quick, found)
        if "patches" in args.only:
            bench_patches(report, args.quick, found)
        if "matmul" in args.only:
            bench_small(report, args.quick, found)
            bench_large(report, args.quick, found)
    raise SystemExit(report.close())


if __name__ == "__main__":
    main()
