"""Is a skipped FLOP time saved? GateSkip on a 284 M Llama, against transformers and ourselves.

    python -m bench.bench_gateskip prefill|decode|vector [--work DIR] [--rounds N] [--quick]

All arms take turns in one run. `rho` is the realised share of what skipping could save at best:
(T_dense - T) / (T_dense - T_ideal), where T_dense is our ungated engine and T_ideal that time
scaled to the multiply-accumulates (prefill) or weight bytes (decode) that were not skipped, gates
and keys and values included. transformers runs where PYRUNTIME_PEER_PYTHON points.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import gated_model, limits
from bench.harness import Arm, Report, Samples, alternate, target
from bench.peers import VARIABLE, Peer, peer_python
from pyruntime.engine.runtime import Runtime, full_batch
from pyruntime.gates.policy import ComputePolicy
from pyruntime.gates.routing import Router
from pyruntime.gates.trace import Trace
from pyruntime.layers.batch import Batch
from pyruntime.layers.kv import BLOCK, PagedKV
from pyruntime.models.decoder import Decoder

SKIPS = (0.25, 0.5, 0.7)
SEQUENCES, LENGTH = 8, 512
STEPS = 32
SETTLE = 0.05  # seconds: threads of the other arm stop spinning before the next one starts


@dataclasses.dataclass(slots=True)
class Prefill:
    """Prompts of one length in one step, logits of their last rows only."""

    prompts: list[list[int]]
    kv: PagedKV
    logits: Tensor | None = None

    def batch(self) -> Batch:
        """The step of all prompts."""
        batch, _ = full_batch(self.prompts)
        ends = torch.arange(1, len(self.prompts) + 1) * len(self.prompts[0]) - 1
        return dataclasses.replace(batch, logit_rows=ends)

    def run(
        self, runtime: Runtime, skip: float, replay: Tensor | None = None
    ) -> tuple[float, Trace]:
        """Seconds from token ids to logits, and what was executed."""
        policies = [ComputePolicy(budget=1.0 - skip)] * len(self.prompts)
        start = time.perf_counter()
        batch = self.batch()
        router = runtime.router(batch, policies, replay)
        self.logits = runtime.model.forward(batch, self.kv, router)
        seconds = time.perf_counter() - start
        return seconds, runtime.trace(router, batch, policies)

    def thresholds(self, runtime: Runtime, skip: float) -> Tensor:
        """Thresholds [L, 2] that skip this share of these very rows, layer after layer."""
        batch = self.batch()
        return quantile_thresholds(runtime, batch, self.kv, skip)


@dataclasses.dataclass(slots=True)
class Decode:
    """One sequence: a cached context, then one step per token."""

    context: list[int]
    tokens: list[int]
    kv: PagedKV
    logits: Tensor | None = None

    def rows(self, first: int, tokens: list[int]) -> Batch:
        """Tokens at positions first, first + 1, ... as one step."""
        positions = torch.arange(first, first + len(tokens), dtype=torch.int32)
        blocks = -(-(first + len(tokens)) // BLOCK)
        return Batch(
            tokens=torch.tensor(tokens),
            positions=positions,
            slots=positions,
            seq_ids=torch.zeros(len(tokens), dtype=torch.int32),
            block_tables=torch.arange(blocks, dtype=torch.int32)[None],
            logit_rows=torch.tensor([len(tokens) - 1]),
        )

    def prepare(self, runtime: Runtime) -> None:
        """Fill the cache with the context."""
        batch = self.rows(0, self.context)
        runtime.model.forward(batch, self.kv, runtime.router(batch, [None]))

    def run(self, runtime: Runtime, skip: float) -> tuple[float, list[Trace]]:
        """Seconds of all steps, and what each executed."""
        policies = [ComputePolicy(budget=1.0 - skip)]
        done: list[tuple[Router, Batch]] = []
        start = time.perf_counter()
        for i, token in enumerate(self.tokens):
            batch = self.rows(len(self.context) + i, [token])
            router = runtime.router(batch, policies)
            self.logits = runtime.model.forward(batch, self.kv, router)
            done.append((router, batch))
        seconds = time.perf_counter() - start
        return seconds, [runtime.trace(router, batch, policies) for router, batch in done]

    def thresholds(self, runtime: Runtime, skip: float) -> Tensor:
        """Thresholds [L, 2] that skip this share of the steps in every branch.

        All steps run as one chunk: a row does not depend on its batch mates, so these are the
        scores that decoding will see.
        """
        batch = self.rows(len(self.context), self.tokens)
        return quantile_thresholds(runtime, batch, self.kv, skip)


def quantile_thresholds(runtime: Runtime, batch: Batch, kv: PagedKV, skip: float) -> Tensor:
    """Thresholds [L, 2]: quantiles of each branch's scores, the branches before it skipping."""
    found = torch.empty(runtime.spec.num_layers, 2)

    def rule(layer: int, branch: int, scores: Tensor) -> Tensor:
        ordered = scores.sort().values
        found[layer, branch] = ordered[max(round(skip * len(ordered)) - 1, 0)]
        return found[layer, branch].clone()

    router = Router(runtime.model.ops, batch.num_rows, rule=rule)
    runtime.model.forward(batch, kv, router)
    return found


# ---- ideals ----


def kept_macs(runtime: Runtime, trace: Trace, batch: Batch) -> int:
    """Multiply-accumulates of the kept rows: what a perfect engine must do for this plan."""
    cost, context = runtime.model.cost, batch.positions.long() + 1
    layers = int(cost.executed(trace.kept, context).sum())
    return layers + cost.head * batch.logit_rows.shape[0]


def weight_bytes(model: Decoder, kept: Tensor) -> int:
    """Bytes of weights a step must read; kept bool [L, 2]. Norms, gates, K/V, head always."""
    total = model._head.weight.data.nbytes
    for (attention, mlp), (runs, feeds) in zip(model.layers, kept.tolist(), strict=True):
        total += attention.kv.weight.data.nbytes
        total += runs * (attention.q.weight.data.nbytes + attention.o.weight.data.nbytes)
        total += feeds * (mlp.network.up.weight.data.nbytes + mlp.network.down.weight.data.nbytes)
        for residual in (attention.residual, mlp.residual):
            total += residual.norm.weight.nbytes
            if residual.gate is not None and residual.gate.probe is not None:
                total += residual.gate.probe.nbytes
    return total


def add_rho(
    report: Report, samples: Samples, arm: str, share: float, wanted: float | None, **row: Any
) -> None:
    """The row of a skipping arm; `share` is its ideal time over the dense one."""
    took = samples.ratio(arm, "dense")
    rho = (1 - took) / (1 - share)
    goal = {"rho": rho} if wanted is None else target(rho, wanted)
    report.add(
        **row, **samples.times(arm), dense_p50_us=samples.p50("dense") * 1e6, time_share=took,
        limit_name="ideal share of the dense time", limit=share, fraction=share / took,
        speedup_over_dense=1 / took,
        speedup_over_peer=samples.ratio("peer", arm) if "peer" in samples.seconds else None,
        **samples.guard(), **goal,
    )  # fmt: skip


def agreement(ours: Tensor | None, theirs: list[float]) -> dict[str, Any]:
    """Whether both engines computed the same model, up to bfloat16."""
    assert ours is not None
    other = torch.tensor(theirs)
    return {
        "logits_max_difference": float((ours[-1] - other).abs().max()),
        "logits_std": float(other.std()),
        "same_token": bool(ours[-1].argmax() == other.argmax()),
    }


@contextlib.contextmanager
def transformers(report: Report, work: Path, scenario: str, threads: int) -> Iterator[Peer | None]:
    """The peer, or None, with a row that says so."""
    python = peer_python()
    if python is None:
        report.add(op="gateskip", scenario=scenario, peer="transformers", absent=f"no {VARIABLE}")
        yield None
        return
    with Peer(python, "transformers_llama.py", str(work / "hf"), str(threads)) as peer:
        yield peer


def settled(arm: Arm) -> Arm:
    """An arm that starts when the machine has become quiet."""

    def run() -> float:
        time.sleep(SETTLE)
        return arm()

    return run


# ---- scenarios ----


def prefill(report: Report, work: Path, args: argparse.Namespace, gate_type: str) -> None:
    """8 x 512 tokens, bfloat16: dense against transformers, then skipping against dense."""
    models = gated_model.open_models(work, args.shape, gate_type)
    dense, gated = models["dense"], models[gate_type]
    vocabulary = dense.spec.vocab_size
    prompts = [gated_model.random_tokens(LENGTH, i, vocabulary) for i in range(SEQUENCES)]
    case = Prefill(prompts, PagedKV(dense.spec, SEQUENCES * LENGTH // BLOCK))
    gated_model.set_thresholds(gated, {s: case.thresholds(gated, s) for s in SKIPS})
    batch = case.batch()
    traces: dict[str, Trace] = {}
    row: dict[str, Any] = {
        "op": "gateskip", "scenario": f"prefill {SEQUENCES}x{LENGTH}", "dtype": "bfloat16",
        "gates": gate_type, "parameters": gated_model.parameters(dense),
        "packed_below": gated.decisions.packed_below, "accuracy": "none: random weights",
    }  # fmt: skip

    def skipping(name: str, skip: float, replay: Tensor | None = None) -> Arm:
        def run() -> float:
            seconds, traces[name] = case.run(gated, skip, replay)
            return seconds

        return settled(run)

    def add(samples: Samples, name: str, wanted: float | None, **extra: Any) -> None:
        trace = traces[name]
        macs = kept_macs(gated, trace, batch)
        add_rho(
            report, samples, name, macs / trace.macs_dense, wanted, **row, what=name,
            gflops=2 * macs / samples.p50(name) / 1e9, skipped_share=trace.skipped_share,
            paths=trace.paths, **extra,
        )  # fmt: skip

    arms: dict[str, Arm] = {"dense": settled(lambda: case.run(dense, 0.0)[0])}
    for skip in SKIPS:
        name = f"{gate_type} {skip:.0%} calibrated"
        arms[name] = skipping(name, skip)
    main_case = gate_type == "scalar"
    peer_used = transformers(report, work, row["scenario"], args.threads) if main_case else None
    with peer_used or contextlib.nullcontext() as peer:
        answer: dict[str, Any] = {}
        if peer is not None:

            def ask() -> float:
                answer.update(peer.ask(do="prefill", tokens=prompts))
                return float(answer["seconds"])

            arms = {"peer": settled(ask)} | arms
        samples = alternate(arms, args.rounds, args.seconds)
        found = limits.measure(args.threads, 64)
        if peer is not None:
            case.run(dense, 0.0)
            _, dense_trace = case.run(dense, 0.0)
            gflops = 2 * dense_trace.macs_dense / samples.p50("dense") / 1e9
            report.add(
                **row, what="dense, transformers time / ours", peer=peer.versions,
                **samples.times("dense"), peer_p50_us=samples.p50("peer") * 1e6, gflops=gflops,
                limit_name="arithmetic peak GFLOP/s", limit=found.bf16_gflops,
                fraction=gflops / found.bf16_gflops, **agreement(case.logits, answer["logits"]),
                **samples.guard(), **target(samples.ratio("peer", "dense"), 0.95),
            )  # fmt: skip
    wanted = 0.90 if main_case else None
    for skip in SKIPS:
        add(samples, f"{gate_type} {skip:.0%} calibrated", wanted)
    if not main_case:
        return
    random = torch.Generator().manual_seed(3)
    ranks = torch.rand(dense.spec.num_layers, 2, batch.num_rows, generator=random).argsort(-1)
    arms = {"dense": arms["dense"]}
    for skip in SKIPS:
        name, mask = f"scalar {skip:.0%} random rows", ranks >= round(skip * batch.num_rows)
        arms[name] = skipping(name, 0.0, mask)
    samples = alternate(arms, max(args.rounds // 2, 2), args.seconds / 2)
    for skip in SKIPS:
        add(samples, f"scalar {skip:.0%} random rows", None, replayed=True)


def decode(report: Report, work: Path, args: argparse.Namespace) -> None:
    """Batch 1 after 512 tokens: whole branches are skipped, and their weights are not read."""
    models = gated_model.open_models(work, args.shape, "scalar")
    dense, gated = models["dense"], models["scalar"]
    vocabulary = dense.spec.vocab_size
    context = gated_model.random_tokens(LENGTH, 1, vocabulary)
    tokens = gated_model.random_tokens(STEPS, 2, vocabulary)
    case = Decode(context, tokens, PagedKV(dense.spec, (LENGTH + STEPS) // BLOCK + 1))
    case.prepare(dense)
    gated_model.set_thresholds(gated, {s: case.thresholds(gated, s) for s in SKIPS})
    traces: dict[str, list[Trace]] = {}
    everything = torch.ones(dense.spec.num_layers, 2, dtype=torch.bool)
    dense_bytes = weight_bytes(dense.model, everything)
    row: dict[str, Any] = {
        "op": "gateskip", "scenario": f"decode batch 1, context {LENGTH}", "dtype": "bfloat16",
        "gates": "scalar", "parameters": gated_model.parameters(dense), "steps": STEPS,
        "times_are": f"of {STEPS} steps", "accuracy": "none: random weights",
        "kv_bytes_per_step_not_in_floor": 2 * dense.spec.num_layers * dense.spec.num_kv_heads
        * dense.spec.head_dim * 2 * LENGTH,
    }  # fmt: skip

    def skipping(name: str, skip: float) -> Arm:
        def run() -> float:
            seconds, traces[name] = case.run(gated, skip)
            return seconds

        return settled(run)

    arms: dict[str, Arm] = {"dense": settled(lambda: case.run(dense, 0.0)[0])}
    arms |= {f"{s:.0%}": skipping(f"{s:.0%}", s) for s in SKIPS}
    arms["0%, gates on"] = skipping("0%, gates on", 0.0)
    with transformers(report, work, row["scenario"], args.threads) as peer:
        answer: dict[str, Any] = {}
        if peer is not None:
            peer.ask(do="context", tokens=context)

            def ask() -> float:
                answer.update(peer.ask(do="decode", tokens=tokens))
                return float(answer["seconds"])

            arms = {"peer": settled(ask)} | arms
        samples = alternate(arms, 2 * args.rounds, args.seconds)
        found = limits.measure(args.threads)
        case.run(dense, 0.0)
        floor = STEPS * dense_bytes / found.read_gb_per_s / 1e9
        if peer is not None:
            report.add(
                **row, what="dense, transformers time / ours", peer=peer.versions,
                **samples.times("dense"), peer_p50_us=samples.p50("peer") * 1e6,
                **agreement(case.logits, answer["logits"]), **samples.guard(),
                **target(samples.ratio("peer", "dense"), 0.95),
            )  # fmt: skip
    report.add(
        **row, what="dense, share of weight-read floor", **samples.times("dense"),
        gb_per_s=STEPS * dense_bytes / samples.p50("dense") / 1e9,
        limit_name="read bandwidth GB/s", limit=found.read_gb_per_s,
        fraction=floor / samples.p50("dense"), weight_bytes=dense_bytes, **samples.guard(),
    )  # fmt: skip
    report.add(
        **row, what="gates on, nothing skipped, time over dense", **samples.times("0%, gates on"),
        time_share=samples.ratio("0%, gates on", "dense"), **samples.guard(),
    )  # fmt: skip
    for skip in SKIPS:
        name = f"{skip:.0%}"
        read = sum(weight_bytes(gated.model, trace.kept[:, :, 0]) for trace in traces[name])
        skipped = sum(trace.skipped_share for trace in traces[name]) / STEPS
        add_rho(
            report, samples, name, read / (STEPS * dense_bytes), 0.85, **row,
            what=f"scalar {name} calibrated", skipped_share=skipped,
            gb_per_s=read / samples.p50(name) / 1e9,
        )  # fmt: skip


def main() -> None:
    """Runs one scenario."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenario", choices=("prefill", "decode", "vector"))
    parser.add_argument("--work", type=Path, help="keep the model here")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=130, help="longest wait for quiet")
    parser.add_argument("--quick", action="store_true", help="a 2-layer model: does it run at all?")
    args = parser.parse_args()
    args.shape = gated_model.SHAPE | ({"num_layers": 2} if args.quick else {})
    if args.quick:
        args.rounds, args.seconds = 2, 0
    torch.set_num_threads(args.threads)
    report = Report(f"gateskip_{args.scenario}", store=not args.quick)
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if args.scenario == "decode":
            decode(report, work, args)
        else:
            prefill(report, work, args, "scalar" if args.scenario == "prefill" else "vector")
    raise SystemExit(report.close())


if __name__ == "__main__":
    main()
