"""Everything CUDA on one machine with a GPU: build, test, measure. No network, no installation.

    python bench/cuda_suite.py [--out bench/results] [--skip-tests] [--only plan,vision]

Builds pyruntime._cuda (plain C++ compiler) and the fat binaries (nvcc) into the package, runs the
CUDA tests, then writes one JSON line a row to OUT/cuda-{limits,plan,move,matmul,vision}.json. A row
has the time of one call inside a CUDA graph (p50, p90) and from the host (call_us), the physical
limit of its bytes and operations as measured on the same machine a minute earlier, and the fraction
reached; a fraction above 1.02 is a measurement error and fails the run.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.cuda_harness import (  # noqa: E402
    Call,
    Report,
    copies_for,
    machine,
    measure,
    measure_limits,
)
from bench.cuda_vision import bench_vision  # noqa: E402
from pyruntime.ops import TopK, Weight, cuda  # noqa: E402
from pyruntime.ops.cuda import matmul as cuda_matmul  # noqa: E402

BF16 = torch.bfloat16


# ---- build and test ----


def build() -> None:
    """Binding and fat binaries into the package, as CMake would put them."""
    import pybind11

    package, source = ROOT / "pyruntime", ROOT / "csrc"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    includes = [source, pybind11.get_include(), sysconfig.get_path("include")]
    flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden"]
    files = [source / "bind" / "cuda.cc", source / "cuda" / "launch.cc"]
    output = package / f"_cuda{suffix}"
    run("g++", *flags, *(f"-I{path}" for path in includes), *files, "-ldl", "-o", output)
    kernels = package / "_kernels"
    kernels.mkdir(exist_ok=True)
    for path in (source / "cuda").glob("*.cu*"):
        (kernels / path.name).write_text(path.read_text())
    targets = ("80,code=sm_80", "90a,code=sm_90a", "80,code=compute_80")
    arch = [part for target in targets for part in ("-gencode", f"arch=compute_{target}")]
    for path in kernels.glob("*.cu"):
        run("nvcc", "-fatbin", "-std=c++17", *arch, path, "-o", path.with_suffix(".fatbin"))


def run(*command: object) -> None:
    words = [str(word) for word in command]
    print("+", " ".join(words), flush=True)
    subprocess.run(words, check=True, cwd=ROOT)


def test() -> None:
    for package in ("pytest", "hypothesis"):
        if importlib.util.find_spec(package) is None:
            raise SystemExit(f"the tests need {package}; --skip-tests measures without them")
    tests = sorted((ROOT / "tests" / "ops").glob("test_cuda*.py"))
    run(sys.executable, "-m", "pytest", "-q", "-rs", *tests)


# ---- what is measured ----


def sort_plan(ids: Tensor, segments: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a plan costs without a planner: sort, search, scatter (no host synchronisation)."""
    labels, order = torch.sort(ids.flatten(), stable=True)
    offsets = torch.searchsorted(labels, torch.arange(segments + 1, device=ids.device))
    inverse = torch.empty_like(order).scatter_(
        0, order, torch.arange(order.numel(), device=ids.device)
    )
    return order // ids.shape[1], offsets, inverse


def bench_plan(report: Report) -> None:
    for count in (64, 4096, 8192, 65_536, 1 << 20):
        threshold_case(report, count)
    for shape in (
        (1, 8, 2),
        (64, 8, 2),
        (64, 256, 8),
        (256, 256, 8),
        (1024, 64, 2),
        (8192, 8, 2),
        (8192, 256, 8),
        (131_072, 64, 4),
    ):
        topk_case(report, *shape)


def threshold_case(report: Report, count: int) -> None:
    scores, tau = torch.rand(count, device="cuda"), torch.tensor(0.5, device="cuda")
    candidates: dict[str, Call] = {
        "cuda": lambda i: cuda.plan_threshold(scores, tau),
        "torch": lambda i: sort_plan((scores <= tau).int()[:, None], 1),
    }
    report.add("plan_threshold", {"N": count}, 12 * count, 0, measure(candidates, 1))


def topk_case(report: Report, count: int, experts: int, k: int) -> None:
    scores = torch.rand(count, experts, device="cuda")
    candidates: dict[str, Call] = {
        "cuda": lambda i: cuda.plan_topk(scores, TopK(k)),
        "torch": lambda i: sort_plan(scores.topk(k).indices, experts),
    }
    nbytes = 4 * count * experts + 12 * count * k
    shape = {"N": count, "E": experts, "k": k}
    report.add("plan_topk", shape, nbytes, 0, measure(candidates, 1))


def bench_move(report: Report) -> None:
    for count, width in ((64, 4096), (4096, 4096), (65_536, 4096), (65_536, 384)):
        for kept in (1.0, 0.5):
            skip_case(report, count, width, kept)
        choices_case(report, count, width, 2)


def skip_case(report: Report, count: int, width: int, kept: float) -> None:
    """One segment, a fraction of the rows: gather, combine and compact."""
    tau = torch.tensor(1.0 - kept, device="cuda")
    plan = cuda.plan_threshold(torch.rand(count, device="cuda"), tau)
    rows = plan.rows[: plan.kept].long()
    moved = 2 * rows.numel() * width
    copies = copies_for(2 * moved)
    xs = [torch.randn(count, width, device="cuda").to(BF16) for _ in range(copies)]
    packed = [cuda.gather(x, plan) for x in xs]
    exact = [rows_of[: plan.kept] for rows_of in packed]
    shape = {"N": count, "H": width, "kept": kept, "dtype": "bf16"}
    candidates: dict[str, Call] = {
        "cuda": lambda i: cuda.gather(xs[i], plan),
        "torch": lambda i: xs[i].index_select(0, rows),
    }
    report.add("gather", shape, 2 * moved, 0, measure(candidates, copies))
    candidates = {
        "cuda": lambda i: cuda.combine(packed[i], plan, xs[i]),
        "torch": lambda i: xs[i].index_add_(0, rows, exact[i]),
    }
    report.add("combine", shape, 3 * moved, 0, measure(candidates, copies))
    if kept < 1.0:
        # Repeats move the same rows again: the values change, the traffic does not.
        candidates = {"cuda": lambda i: cuda.compact(xs[i], plan)}
        report.add("compact", shape, 2 * moved, 0, measure(candidates, copies))


def choices_case(report: Report, count: int, width: int, k: int) -> None:
    """k weighted choices of every row come back."""
    plan = cuda.plan_topk(torch.rand(count, 8, device="cuda"), TopK(k))
    nbytes = (k + 2) * 2 * count * width
    copies = copies_for(nbytes)
    xs = [torch.randn(count, width, device="cuda").to(BF16) for _ in range(copies)]
    packed = [torch.randn(count * k, width, device="cuda").to(BF16) for _ in range(copies)]
    candidates: dict[str, Call] = {"cuda": lambda i: cuda.combine(packed[i], plan, xs[i])}
    shape = {"N": count, "H": width, "k": k, "dtype": "bf16"}
    report.add("combine", shape, nbytes, 0, measure(candidates, copies))


def bench_matmul(report: Report) -> None:
    """Forms of segment_matmul against each other: the bounds of choose_kernel come from here."""
    for name, segments, width, depth, epilogue in (
        ("moe gate_up", 8, 28_672, 4096, "silu_mul"),
        ("moe down", 8, 4096, 14_336, "none"),
        ("fine moe up", 64, 1536, 2048, "none"),
        ("one segment", 1, 4096, 4096, "none"),
    ):
        pair = epilogue == "silu_mul"
        nbytes = 2 * segments * width * depth
        weights = []
        for _ in range(min(8, copies_for(nbytes))):
            data = torch.randn(segments, width, depth, device="cuda", dtype=BF16)
            weights.append(Weight(data.div_(depth**0.5), width, depth, "dense", pair))
        for rows in (1, 4, 8, 16, 32, 64, 128, 256, 1024):
            matmul_case(report, name, weights, rows, epilogue)
        del weights
        torch.cuda.empty_cache()


def matmul_case(report: Report, name: str, weights: list[Weight], rows: int, epilogue: str) -> None:
    """Every form that makes sense for ``rows`` rows in every segment."""
    first = weights[0]
    total = rows * first.segments
    labels = torch.arange(first.segments, device="cuda").repeat_interleave(rows).int()
    plan = cuda.plan_partition(labels, first.segments)
    x = torch.randn(total, first.in_features, device="cuda").to(BF16)
    forms = ["small_16", "small_32"] if rows <= 64 else []
    forms += ["tile_64", "tile_128", "grouped"] + (["linear"] if first.segments == 1 else [])
    shape = {
        "case": name,
        "S": first.segments,
        "N": first.out_features,
        "K": first.in_features,
        "rows": rows,
        "epilogue": epilogue,
        "chosen": cuda.choose_kernel(x, first, total, planned=True),
    }
    forced = {"form": ""}

    def call(i: int, form: str) -> Tensor:
        forced["form"] = form
        return cuda.segment_matmul(x, weights[i], plan, epilogue=epilogue)

    columns = first.out_features // (2 if first.interleaved else 1)
    nbytes = first.data.nbytes + 2 * total * (first.in_features + columns)
    flops = 2.0 * total * first.out_features * first.in_features
    with mock.patch.object(cuda_matmul, "choose_kernel", lambda *_, **__: forced["form"]):
        candidates: dict[str, Call] = {form: functools.partial(call, form=form) for form in forms}
        times = measure(candidates, len(weights))
    report.add("segment_matmul", shape, nbytes, flops, times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--skip-build", action="store_true")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--only", default="plan,move,matmul,vision")
    options = parser.parse_args()
    if not options.skip_build:
        build()
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device: nothing to test or measure")
    if not options.skip_tests:
        test()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    limits = measure_limits()
    text = json.dumps({"op": "limits", **vars(limits), **machine()})
    (options.out / "cuda-limits.json").write_text(text + "\n")
    print(text, flush=True)
    benches = {
        "plan": bench_plan, "move": bench_move, "matmul": bench_matmul, "vision": bench_vision,
    }  # fmt: skip
    impossible: list[str] = []
    for name in options.only.split(","):
        path = options.out / f"cuda-{name}.json"
        path.unlink(missing_ok=True)
        report = Report(path, limits)
        benches[name](report)
        impossible += report.impossible
    if impossible:
        raise SystemExit("faster than the limit, so measured wrongly:\n" + "\n".join(impossible))


if __name__ == "__main__":
    main()
