"""A whole Qwen3-MoE with random weights (701 M parameters): prefill and decode against everybody.

    python -m bench.bench_moe_model [--work DIR] [--rounds N] [--quick]

Prefill of 512 tokens; decode at batch 1 and 8 after 512 tokens each, every sequence being told its
tokens, so that all engines run the same rows through the same experts. transformers makes the
folder and runs where PYRUNTIME_PEER_PYTHON points; vLLM where PYRUNTIME_VLLM_PYTHON does, eagerly
and as torch compiles it by default; llama.cpp where PYRUNTIME_LLAMA_CPP_PYTHON does, and for its
converter PYRUNTIME_LLAMA_CPP_SOURCE names the unpacked source archive of llama-cpp-python.

vLLM's times are of its engine, scheduler and sampler included, and stand against our engine; those
of transformers and llama.cpp are of forward passes, and stand against ours. The rows "where the
time goes" are of a separate pass with a clock around every op.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyruntime
from bench import limits
from bench.bench_gateskip import settled
from bench.gated_model import random_tokens
from bench.harness import ROOT, Arm, Report, Samples, alternate, timed
from bench.peers import VARIABLE, Peer
from bench.peers.moe_model_ours import Forward, Served
from pyruntime.engine.runtime import Runtime
from pyruntime.ops import Weight
from pyruntime.plan import Plan

VLLM, LLAMA_CPP = "PYRUNTIME_VLLM_PYTHON", "PYRUNTIME_LLAMA_CPP_PYTHON"
SOURCES = "PYRUNTIME_LLAMA_CPP_SOURCE"
LENGTH, BATCHES, STEPS = 512, (1, 8), 16
SCRIPTS = ROOT / "bench" / "peers"


# ---- where the time goes ----


@dataclass(slots=True)
class Spent:
    """What the calls of one kind took, read and multiplied."""

    seconds: float = 0.0
    calls: int = 0
    weight_bytes: float = 0.0
    macs: int = 0


@contextlib.contextmanager
def clocks(runtime: Runtime) -> Iterator[dict[str, Spent]]:
    """A clock around every op; segment_matmul is told apart by its weight."""
    spent: dict[str, Spent] = {}
    names = {
        t.data.data_ptr(): re.sub(r"layers\.\d+\.|\.weight$", "", name)
        for name, t in runtime.container.tensors.items()
        if isinstance(t, Weight)
    }
    module = runtime.model.ops
    saved = {n: f for n, f in vars(module).items() if callable(f) and not isinstance(f, type)}

    def clocked(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = run(*args, **options)
            seconds = time.perf_counter() - start
            key = name
            if name == "segment_matmul":
                key = f"{name} {names.get(args[1].data.data_ptr(), 'other')}"
            entry = spent.setdefault(key, Spent())
            entry.seconds, entry.calls = entry.seconds + seconds, entry.calls + 1
            if name == "segment_matmul":
                plan = args[2] if len(args) > 2 else options.get("plan")
                used, rows = _used(args[0], args[1], plan)
                entry.weight_bytes += used * args[1].data.nbytes
                entry.macs += rows * args[1].in_features * args[1].out_features
            return result

        return call

    for name, run in saved.items():
        setattr(module, name, clocked(name, run))
    try:
        yield spent
    finally:
        for name, run in saved.items():
            setattr(module, name, run)


def _used(x: Tensor, weight: Weight, plan: Plan | None) -> tuple[float, int]:
    """Share of a weight's matrices that a call reads, and the rows it multiplies."""
    if plan is None or weight.segments == 1:
        return 1.0, x.shape[0] if plan is None else plan.kept
    sizes = plan.offsets.diff()
    return float((sizes > 0).sum()) / weight.segments, plan.kept


def breakdown(
    report: Report, runtime: Runtime, run: Callable[[], object], args: argparse.Namespace,
    **row: Any,
) -> None:  # fmt: skip
    """A row with the share of every op, and the floor of all multiplications together.

    The fastest of some passes; limits are the best that this run has seen.
    """
    args.read = max(args.read, read_speed(runtime))
    args.limit = args.limit.merge(limits.measure(args.threads, 64))
    read, peak = args.read, 1e9 * args.limit.bf16_gflops
    total, spent = min((_clocked(runtime, run) for _ in range(4)), key=lambda found: found[0])
    ordered = sorted(spent.items(), key=lambda item: -item[1].seconds)
    floors = {n: max(s.weight_bytes / read, 2 * s.macs / peak) for n, s in ordered}
    table = {
        name: {
            "share": round(s.seconds / total, 4), "us": round(s.seconds * 1e6, 1),
            "calls": s.calls, "of_floor": round(floors[name] / s.seconds, 3),
        }
        for name, s in ordered
    }  # fmt: skip
    rest = 1 - sum(s.seconds for s in spent.values()) / total
    report.add(
        **row, what="where the time goes", total_us=total * 1e6, outside_ops=rest, ops=table,
        weight_bytes=sum(s.weight_bytes for s in spent.values()),
        macs=sum(s.macs for s in spent.values()), floor_us=sum(floors.values()) * 1e6,
        share_of_floor=sum(floors.values()) / total, read_gb_per_s=read / 1e9,
        peak_gflops=peak / 1e9,
    )  # fmt: skip


def _clocked(runtime: Runtime, run: Callable[[], object]) -> tuple[float, dict[str, Spent]]:
    with clocks(runtime) as spent:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start, spent


def read_speed(runtime: Runtime) -> float:
    """Bytes per second of the fastest of some passes over this model's own weights."""
    weights = [t.data for t in runtime.container.tensors.values() if isinstance(t, Weight)]
    best = 0.0
    for dtype in (torch.int64, torch.float32):
        words = [w.flatten().view(dtype) for w in weights if w.nbytes % 8 == 0]
        seconds = min(timed(partial(_read, words))() for _ in range(4))
        best = max(best, sum(part.nbytes for part in words) / seconds)
    return best


def _read(words: list[Tensor]) -> None:
    for part in words:
        part.sum()


# ---- models and peers ----


def make(work: Path, quick: bool) -> None:
    """work/hf, and what ours and llama.cpp make of it, unless they are there."""
    python, llama_cpp = os.environ.get(VARIABLE), os.environ.get(LLAMA_CPP)
    if not (work / "hf").exists():
        if python is None:
            raise SystemExit(f"transformers writes the model: set {VARIABLE}")
        command = [python, str(SCRIPTS / "moe_model_make.py"), str(work / "hf")]
        subprocess.run(command + (["2"] if quick else []), check=True, stdout=subprocess.DEVNULL)
    if not (work / "bfloat16").exists():
        pyruntime.convert(work / "hf", work / "bfloat16")
    if not (work / "int8").exists():
        pyruntime.convert(work / "hf", work / "int8", quantize="int8")
    if llama_cpp is None or SOURCES not in os.environ:
        return
    for kind in ("bf16", "q8_0"):
        if not (work / f"{kind}.gguf").exists():
            script = str(SCRIPTS / "llama_cpp_convert.py")
            places = [os.environ[SOURCES], str(work / "hf"), str(work / f"{kind}.gguf")]
            subprocess.run([llama_cpp, script, *places, kind], check=True, capture_output=True)


def open_peers(
    report: Report, work: Path, threads: int, stack: contextlib.ExitStack
) -> dict[str, Peer]:
    """Peers that are installed; the others get a row that says so."""
    ggufs = [f"{kind}={work / kind}.gguf" for kind in ("bf16", "q8_0")]
    peers = {
        "transformers": (VARIABLE, "moe_model_transformers.py", [str(work / "hf"), str(threads)]),
        "vllm": (VLLM, "vllm_model.py", [str(work / "hf"), str(threads)]),
        "vllm default": (VLLM, "vllm_model.py", [str(work / "hf"), str(threads), "compiled"]),
        "llama.cpp": (LLAMA_CPP, "llama_cpp_model.py", [str(threads), *ggufs]),
    }
    found = {}
    for name, (variable, script, arguments) in peers.items():
        python = os.environ.get(variable)
        missing = name == "llama.cpp" and not (work / "q8_0.gguf").exists()
        if python is None or missing:
            why = f"no {variable if python is None else SOURCES}"
            report.add(op="moe_model", scenario="peers", peer=name, absent=why)
            continue
        peer = stack.enter_context(Peer(python, script, *arguments))
        report.add(op="moe_model", scenario="peers", peer=name, **peer.versions)
        found[name] = peer
    return found


def check(report: Report, models: dict[str, Forward], peers: dict[str, Peer]) -> None:
    """Whether all engines compute the same model: log-probabilities after one prompt."""
    tokens = random_tokens(LENGTH, 1, models["bfloat16"].runtime.spec.vocab_size)
    wanted = models["bfloat16"].logits(tokens).log_softmax(0)
    found = {"ours int8": models["int8"].logits(tokens)}
    for name, peer in peers.items():
        for arm in peer.versions["arms"]:
            answer = peer.ask(do="logits", arm=arm, tokens=tokens)
            found[f"{name} {arm}"] = torch.tensor(answer["logits"])
    report.add(
        op="moe_model", scenario="check", what="log-probabilities against our bfloat16",
        largest_difference={
            name: round(float((other.log_softmax(0) - wanted).abs().max()), 4)
            for name, other in found.items()
        },
        same_token={name: bool(o.argmax() == wanted.argmax()) for name, o in found.items()},
        spread=float(wanted.std()),
    )  # fmt: skip


# ---- scenarios ----


def compare(report: Report, samples: Samples, peers: list[str], row: dict[str, Any]) -> None:
    """A row per peer: its time over that of ours which does the same work."""
    for name in ("forward", "engine", "int8"):
        report.add(**row, what=f"ours, {name}", **samples.times(name), **samples.guard())
    for peer in peers:
        ours = "engine" if peer.startswith("vllm") else "forward"
        ours = "int8" if peer.endswith("q8_0") else ours
        report.add(
            **row, what=f"{peer} time / ours ({ours})", **samples.times(peer),
            ours_p50_us=samples.p50(ours) * 1e6, ratio=samples.ratio(peer, ours),
            **samples.guard(),
        )  # fmt: skip


def prefill(
    report: Report, models: dict[str, Forward], peers: dict[str, Peer], args: argparse.Namespace
) -> None:
    """One prompt of 512 tokens."""
    plain, small = models["bfloat16"], models["int8"]
    tokens = random_tokens(LENGTH, 1, plain.runtime.spec.vocab_size)
    arms: dict[str, Arm] = {
        "forward": timed(lambda: plain.logits(tokens)),
        "engine": lambda: Served(plain.runtime).prefill(tokens),
        "int8": timed(lambda: small.logits(tokens)),
    }
    names = []
    for name, peer in peers.items():
        for arm in peer.versions["arms"]:
            names.append(f"{name} {arm}")
            arms[names[-1]] = partial(_ask, peer, do="prefill", arm=arm, tokens=tokens)
    row = {"op": "moe_model", "scenario": f"prefill {LENGTH}"}
    compare(report, measured(arms, args), names, row)
    run = partial(plain.logits, tokens)
    breakdown(report, plain.runtime, run, args, **row, dtype="bfloat16")


def decode(
    report: Report, models: dict[str, Forward], peers: dict[str, Peer], args: argparse.Namespace,
    batch: int,
) -> None:  # fmt: skip
    """Some steps of sequences that hold 512 tokens each."""
    plain, small = models["bfloat16"], models["int8"]
    vocabulary, steps = plain.runtime.spec.vocab_size, 2 if args.quick else STEPS
    contexts = [random_tokens(LENGTH, i, vocabulary) for i in range(batch)]
    tokens = random_tokens(batch, 99, vocabulary)
    for model in models.values():
        model.context(contexts, steps)
    arms: dict[str, Arm] = {
        "forward": lambda: plain.decode(tokens, steps),
        "engine": lambda: Served(plain.runtime).decode(contexts, tokens, steps),
        "int8": lambda: small.decode(tokens, steps),
    }
    names = []
    for name, peer in peers.items():
        for arm in peer.versions["arms"]:
            peer.ask(do="context", arm=arm, tokens=contexts)
            names.append(f"{name} {arm}")
            request = {"do": "decode", "arm": arm, "tokens": tokens, "steps": steps}
            arms[names[-1]] = partial(_ask, peer, **request)
    row = {
        "op": "moe_model", "scenario": f"decode batch {batch}, context {LENGTH}", "steps": steps,
        "times_are": f"of {steps} steps",
    }  # fmt: skip
    compare(report, measured(arms, args), names, row)
    for dtype, model in models.items():
        run = partial(model.decode, tokens, steps)
        breakdown(report, model.runtime, run, args, **row, dtype=dtype)


def measured(arms: dict[str, Arm], args: argparse.Namespace) -> Samples:
    """The arms in turns."""
    return alternate({n: settled(arm) for n, arm in arms.items()}, args.rounds, args.seconds)


def _ask(peer: Peer, **request: Any) -> float:
    return float(peer.ask(**request)["seconds"])


def main() -> None:
    """Makes the model, then prefill and decode."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="keep the models here")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=240, help="longest wait for quiet")
    parser.add_argument("--quick", action="store_true", help="a 2-layer model: does it run at all?")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds = 2, 0
    torch.set_num_threads(args.threads)
    report = Report("moe_model", store=not args.quick)
    with contextlib.ExitStack() as stack, torch.inference_mode():
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work = args.work or temporary
        work.mkdir(parents=True, exist_ok=True)
        make(work, args.quick)
        models = {d: Forward(pyruntime.load(work / d, verify=False)) for d in ("bfloat16", "int8")}
        runtime = models["bfloat16"].runtime
        args.read = read_speed(runtime)
        args.limit = limits.measure(args.threads)
        config = json.loads((work / "hf" / "config.json").read_text())
        report.add(op="moe_model", scenario="model", config=config)
        peers = open_peers(report, work, args.threads, stack)
        check(report, models, peers)
        prefill(report, models, peers, args)
        for batch in BATCHES:
            decode(report, models, peers, args, batch)
    raise SystemExit(report.close())


if __name__ == "__main__":
    main()
