"""Is a MoE layer near its limit, and faster than everybody else's? One layer, weights in memory.

    python -m bench.bench_moe [--only layer adaptive] [--shapes 64x8x2048x768 ...] [--quick]

Ours and every peer compute the same Qwen3-MoE layer (router, softmax, top-k, renormalise, SwiGLU
experts, weighted sum) on the same weights and inputs, in turns, each in its own process; see
peers/moe_case.py. Before every timed call the caches are emptied and a tiny layer brings the code
back. A peer runs where its variable points: PYRUNTIME_PEER_PYTHON (transformers),
PYRUNTIME_VLLM_PYTHON, PYRUNTIME_LLAMA_CPP_PYTHON, PYRUNTIME_ONNXRUNTIME_PYTHON. Peers of bfloat16
count for the target; Q8_0, float32 and float16 stand beside them for information.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import limits
from bench.harness import Arm, Report, Samples, alternate, target, timed
from bench.peers import VARIABLE, Peer
from bench.peers import moe_case as moe
from bench.peers.moe_case import Call, Flush, Shape, Weights
from bench.peers.moe_ours import Ours
from pyruntime import ops
from pyruntime.plan import Plan

PEERS = {
    "transformers": (VARIABLE, "moe_transformers.py"),
    "vllm": ("PYRUNTIME_VLLM_PYTHON", "moe_vllm.py"),
    "llama.cpp": ("PYRUNTIME_LLAMA_CPP_PYTHON", "moe_llama_cpp.py"),
    "onnxruntime": ("PYRUNTIME_ONNXRUNTIME_PYTHON", "moe_onnxruntime.py"),
}
TOKENS = (1, 8, 64, 512)
CALLS = {1: 8, 8: 6, 64: 3, 512: 1}  # of one sample, each with another input
SETTLE = 0.05  # seconds: threads of the other arm stop spinning before the next one starts


@dataclass(slots=True)
class Bench:
    """One shape: our layer, the peers that loaded it, and what the machine can do."""

    shape: Shape
    ours: Ours
    tiny: Ours
    flush: Flush
    peers: dict[str, Peer]
    limit: limits.Limits
    quick: bool

    def our_arm(self, arm: str, part: str, examples: list[Tensor]) -> Arm:
        """Mean seconds of one call per example."""
        small = moe.inputs(self.shape.tiny(), len(examples[0]), "uniform")
        warm = self.tiny.prepare(arm, part, small)
        prepare = partial(self.ours.prepare, arm, part)
        return settled(lambda: statistics.mean(moe.time_calls(prepare, examples, self.flush, warm)))

    def peer_arm(self, peer: str, **request: Any) -> Arm:
        """Mean seconds of a peer's calls."""
        ask = partial(self.peers[peer].ask, do="time", **request)
        return settled(lambda: statistics.mean(ask()["seconds"]))

    def readers(self) -> dict[str, Arm]:
        """Passes over all our bfloat16 weights: the read bandwidth of this very memory.

        By torch's sum, and by our own matmul with one row per expert: the faster one is the bar.
        """
        up, down = self.ours.experts["bfloat16"]
        experts = torch.arange(self.shape.experts, dtype=torch.int32)
        plan = ops.plan_partition(experts, self.shape.experts)
        x = torch.ones(self.shape.experts, self.shape.hidden, dtype=torch.bfloat16)
        words = [weight.data.flatten().view(torch.int64) for weight in (up, down)]

        def multiply() -> None:
            inner = ops.segment_matmul(x, up, plan, gather=True, epilogue="silu_mul")
            ops.segment_matmul(inner, down, plan)

        return {
            "read by sum": cold(self.flush, lambda: [part.sum() for part in words]),
            "read by matmul": cold(self.flush, multiply),
        }

    def check(self, report: Report, weights: Weights, tokens: Iterable[int]) -> None:
        """Whether everybody computes this layer; who does not is not compared."""
        errors: dict[str, float] = {}
        for count in tokens:
            for routing in ("uniform", "zipf"):
                x = moe.inputs(self.shape, count, routing)
                wanted = moe.reference(self.shape, weights, x)
                for arm in self.ours.experts:
                    found = self.ours.prepare(arm, "layer", x)()
                    assert isinstance(found, Tensor)
                    name = f"ours {arm}"
                    errors[name] = max(errors.get(name, 0.0), moe.error(found, wanted))
                    tolerate(name, errors[name], moe.TOLERANCE[arm])
        cases = [(count, routing) for count in tokens for routing in ("uniform", "zipf")]
        for name, peer in self.peers.items():
            for arm in peer.versions["arms"]:
                answer = peer.ask(do="check", arm=arm, cases=cases)
                errors[f"{name} {arm}"] = answer["error"]
                tolerate(f"{name} {arm}", answer["error"], answer["tolerance"])
        report.add(
            op="moe_layer", scenario=str(self.shape), what="largest error over largest output",
            errors={name: round(value, 5) for name, value in errors.items()},
        )  # fmt: skip


def tolerate(name: str, found: float, allowed: float) -> None:
    """Stop if an engine computes something else."""
    if not found <= allowed:
        raise RuntimeError(f"{name}: error {found:.4f} against float32, allowed {allowed}")


def settled(arm: Arm) -> Arm:
    """An arm that starts when the machine has become quiet."""

    def run() -> float:
        time.sleep(SETTLE)
        return arm()

    return run


def cold(flush: Flush, call: Call) -> Arm:
    """An arm that finds the caches empty."""

    def run() -> float:
        flush()
        return timed(call)()

    return settled(run)


def bench_layer(report: Report, bench: Bench, tokens: int, routing: str) -> None:
    """Ours, int8 and the peers on one number of tokens and one distribution over experts."""
    calls = 1 if bench.quick else CALLS[tokens]
    examples = [moe.inputs(bench.shape, tokens, routing, seed) for seed in range(calls)]
    arms: dict[str, Arm] = {
        "bfloat16": bench.our_arm("bfloat16", "layer", examples),
        "int8": bench.our_arm("int8", "layer", examples),
        "router": bench.our_arm("bfloat16", "router", examples),
    }
    request = {"tokens": tokens, "routing": routing, "calls": calls}
    same: list[str] = []
    other: list[str] = []
    for name, peer in bench.peers.items():
        for arm, dtype in peer.versions["arms"].items():
            label = f"{name} {arm}"
            arms[label] = bench.peer_arm(name, arm=arm, part="layer", **request)
            (same if dtype == "bfloat16" else other).append(label)
        if "router" in peer.versions["parts"]:
            arms[f"{name} router"] = bench.peer_arm(name, arm=arm, part="router", **request)
    arms |= bench.readers()
    samples = alternate(arms, 2 if bench.quick else 7, 0 if bench.quick else 60)
    load = moe.touched(bench.shape, tokens, routing, calls)
    rows = Rows(report, bench, samples, tokens, routing, load)
    rows.against_peers("bfloat16", same, 1.15)
    rows.against_peers("int8", [name for name in other if "q8_0" in name], None)
    rows.beside(other)
    rows.floor("bfloat16", 0.80 if tokens <= 8 else 0.75)
    rows.floor("int8", None)
    rows.int8(1.6 if tokens <= 8 else None)
    warm = timed(bench.ours.prepare("bfloat16", "router", examples[0]), 20 if bench.quick else 200)
    rows.router(statistics.median(warm() for _ in range(5)))


@dataclass(slots=True)
class Rows:
    """The rows of one case."""

    report: Report
    bench: Bench
    samples: Samples
    tokens: int
    routing: str
    load: dict[str, float]

    def add(self, arm: str, what: str, dtype: str, goal: dict[str, Any], **row: Any) -> None:
        """A row about one of our arms."""
        shape, calls = self.bench.shape, 1 if self.bench.quick else CALLS[self.tokens]
        self.report.add(
            op="moe_layer", scenario=f"{shape} T={self.tokens} {self.routing}", what=what,
            dtype=dtype,
            shapes={"E": shape.experts, "k": shape.top_k, "H": shape.hidden, "I": shape.inner},
            tokens=self.tokens, routing=self.routing, experts_touched=self.load["experts"],
            imbalance=self.load["imbalance"], calls_per_sample=calls,
            **self.samples.times(arm), **row, **self.samples.guard(), **goal,
        )  # fmt: skip

    def microseconds(self, arms: Iterable[str]) -> dict[str, float]:
        """Medians of some arms."""
        return {arm: round(self.samples.p50(arm) * 1e6, 1) for arm in arms}

    def bytes(self, arm: str) -> float:
        """Weight bytes that a call must read."""
        router = 2 * self.bench.shape.router_values
        return self.load["experts"] * self.bench.ours.expert_bytes(arm) + router

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a call."""
        return self.bench.shape.macs(self.tokens * self.bench.shape.top_k, self.tokens)

    def against_peers(self, arm: str, peers: list[str], wanted: float | None) -> None:
        """Time of the fastest of these peers over ours."""
        if not peers:
            return
        fastest = min(peers, key=self.samples.p50)
        ratio = self.samples.ratio(fastest, arm)
        self.add(
            arm, "fastest peer's time / ours", arm,
            {"ratio": ratio} if wanted is None else target(ratio, wanted),
            fastest=fastest, peer_p50_us=self.microseconds(peers),
        )  # fmt: skip

    def beside(self, peers: list[str]) -> None:
        """Peers of other dtypes: said, not compared."""
        for peer in peers:
            ratio = self.samples.ratio(peer, "bfloat16")
            self.add(peer, f"{peer}, other dtype, its time / our bfloat16", "", {"ratio": ratio})

    def floor(self, arm: str, wanted: float | None) -> None:
        """Share of the time that reading the weights, or computing, takes at least.

        The bandwidth is that of the fastest pass over this memory in this run, our own included.
        """
        limit, took, moved = self.bench.limit, self.samples.p50(arm), self.bytes(arm)
        passes = [n for n in self.samples.seconds if n.startswith("read ")]
        whole = sum(weight.data.nbytes for weight in self.bench.ours.experts["bfloat16"])
        speeds = [whole / self.samples.p50(name) for name in passes]
        read = max(speeds + [self.bytes(a) / self.samples.p50(a) for a in ("bfloat16", "int8")])
        reading, computing = moved / read, 2 * self.macs / limit.bf16_gflops / 1e9
        # Products of int8 weights are bfloat16's at best; its arithmetic peak is not measured here.
        floor = max(reading, computing) if arm == "bfloat16" else reading
        self.add(
            arm, "share of max(weight read, arithmetic)", arm,
            {} if wanted is None else target(floor / took, wanted),
            weight_bytes=moved, macs=self.macs, read_gb_per_s=read / 1e9,
            gb_per_s=moved / took / 1e9, gflops=2 * self.macs / took / 1e9,
            machine_read_gb_per_s=limit.read_gb_per_s, peak_gflops=limit.bf16_gflops,
            floor_us=floor * 1e6, floor_is="reading" if floor == reading else "computing",
            limit_name="floor / time", limit=1.0, fraction=floor / took,
        )  # fmt: skip

    def int8(self, wanted: float | None) -> None:
        """What halving the bytes is worth."""
        ratio = self.samples.ratio("bfloat16", "int8")
        goal = {"ratio": ratio} if wanted is None else target(ratio, wanted)
        self.add("int8", "our bfloat16 time / int8", "int8", goal)

    def router(self, warm: float) -> None:
        """Scores, top-k and plan: microseconds of one token, share of the layer of many."""
        took = self.samples.p50("router")
        share = self.samples.ratio("router", "bfloat16")
        goal: dict[str, Any] = {}
        if self.tokens == 1:
            what, goal = "routing and planning, us", target(took * 1e6, 20, at_most=True)
        elif self.tokens >= 64:
            what, goal = "routing and planning, share of the layer", target(share, 0.05, True)
        else:
            what = "routing and planning"
        peers = [name for name in self.samples.seconds if name.endswith(" router")]
        self.add(
            "router", what, "bfloat16", goal, share_of_layer=share, in_cache_us=warm * 1e6,
            peer_p50_us=self.microseconds(peers),
        )  # fmt: skip


def bench_adaptive(report: Report, args: argparse.Namespace, flush: Flush) -> None:
    """A cut that leaves 1.3 of 2 experts per token: how much of their time is saved?"""
    shape, tokens, average = Shape(8, 2, 2048, 4096), 256 if args.quick else 4096, 1.3
    weights = Weights.random(shape)
    ours, x = Ours(shape, weights), moe.inputs(shape, tokens, "uniform")
    _, shares = moe.route(shape, weights.router, x)
    # The first expert is enough where its share reaches the mass: for 1 - 0.3 of the tokens.
    mass = float(torch.quantile(shares[:, 0], average - 1))
    limit = torch.tensor([[shape.top_k, torch.inf, mass]]).repeat(tokens, 1)
    kept = torch.stack([torch.ones(tokens), shares[:, 0] < mass], dim=1).bool()
    del weights
    layer = ours.prepare("bfloat16", "layer", x)
    cut = ours.prepare("bfloat16", "layer", x, limit)
    plan = ours.prepare("bfloat16", "router", x, limit)()
    assert isinstance(plan, Plan)
    # Shares are rounded differently here: a token that lies on the cut may fall to either side.
    if abs(plan.kept - int(kept.sum())) > tokens // 1000 + 1:
        raise RuntimeError(f"the cut keeps {plan.kept} choices, {int(kept.sum())} were expected")

    samples = alternate(
        {"dense": cold(flush, layer), "cut": cold(flush, cut)},
        2 if args.quick else 7,
        0 if args.quick else 60,
    )
    dense = shape.macs(tokens * shape.top_k, tokens)
    ideal = shape.macs(plan.kept, tokens) / dense
    took = samples.ratio("cut", "dense")
    report.add(
        op="moe_layer", scenario=f"{shape} T={tokens} adaptive", what="rho of an adaptive k",
        dtype="bfloat16", tokens=tokens, experts_per_token=plan.kept / tokens,
        **samples.times("cut"), dense_p50_us=samples.p50("dense") * 1e6, time_share=took,
        macs=shape.macs(plan.kept, tokens), limit_name="share of the multiply-accumulates",
        limit=ideal, fraction=ideal / took, **samples.guard(),
        **target((1 - took) / (1 - ideal), 0.85),
    )  # fmt: skip


def open_peers(report: Report, threads: int, stack: contextlib.ExitStack) -> dict[str, Peer]:
    """Peers that are installed; the others get a row that says so."""
    found = {}
    for name, (variable, script) in PEERS.items():
        python = os.environ.get(variable)
        if python is None:
            report.add(op="moe_layer", scenario="peers", peer=name, absent=f"no {variable}")
            continue
        peer = stack.enter_context(Peer(python, script, str(threads)))
        report.add(op="moe_layer", scenario="peers", peer=name, **peer.versions)
        found[name] = peer
    return found


def main() -> None:
    """Runs the chosen sections."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, default=moe.SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, choices=TOKENS, default=TOKENS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few repeats: does it run at all?")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = Report("moe_layer", store=not args.quick)
    flush = Flush()
    with torch.inference_mode():
        for section in args.only:
            SECTIONS[section](report, args, flush)
    raise SystemExit(report.close())


def bench_layers(report: Report, args: argparse.Namespace, flush: Flush) -> None:
    """Every shape, number of tokens and distribution."""
    limit = limits.measure(args.threads)
    with contextlib.ExitStack() as stack:
        peers = open_peers(report, args.threads, stack)
        for shape in args.shapes:
            weights, tiny = Weights.random(shape), Weights.random(shape.tiny())
            ours = Ours(shape, weights)
            for peer in peers.values():
                peer.ask(do="load", shape=str(shape))
            bench = Bench(shape, ours, Ours(shape.tiny(), tiny), flush, peers, limit, args.quick)
            bench.check(report, weights, args.tokens)
            del weights
            for tokens in args.tokens:
                for routing in ("uniform", "zipf"):
                    bench_layer(report, bench, tokens, routing)
            for peer in peers.values():
                peer.ask(do="unload")
            del ours, bench


SECTIONS: dict[str, Callable[[Report, argparse.Namespace, Flush], None]] = {
    "layer": bench_layers,
    "adaptive": bench_adaptive,
}

if __name__ == "__main__":
    main()
