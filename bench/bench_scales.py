"""Is a coarse patch time saved? ViT-S/16 on fewer tokens against the same model on all of them.

    python -m bench.bench_scales [--batches 1 8 32] [--dtypes ...] [--work DIR] [--quick]

A learned gate (MSViT's, 0.21 M parameters, float32) looks at every 32-pixel region, in every arm
but `dense`; its threshold is chosen so that the mean image keeps 100, 75, 50 or 30 % of the 197
rows, and images differ in contrast, so that they keep different numbers. `rho` is
(T_dense - T) / (T_dense - T_ideal), where T_dense is the plain ViT on all patches and T_ideal is
T_dense scaled to the multiply-accumulates that were executed, gate included. `one fine among
coarse` is a batch whose first image keeps all patches and whose others keep none of the fine ones:
padding would pay for B times the longest. Peers run the dense model, in turns with ours; see
bench_vit.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import limits, vision_model
from bench.bench_exits import settled
from bench.bench_vit import MODELS, TIMM, open_models, open_peers
from bench.harness import Arm, Report, alternate, target, timed
from bench.peers import Peer
from pyruntime.engine.vision import VisionRuntime
from pyruntime.format.spec import ScaleGateSpec, ScaleSpec
from pyruntime.gates.policy import ComputePolicy, ScalePolicy
from pyruntime.models.vision_cost import region_macs
from pyruntime.models.vit import VisionTransformer

NAME = "ViT-S/16"
Dtype = Literal["float32", "bfloat16"]
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
SHARES = (1.0, 0.75, 0.5, 0.3)
SCALES = ScaleSpec(ratios=(2,), gate=ScaleGateSpec((64, 64, 32), positions=True))
ONE = "one fine among coarse"
EVERYTHING = 1e30  # a threshold above every logit


def pictures(count: int) -> Tensor:
    """Noise of a different contrast in every image, float32 [B, 3, 224, 224]."""
    contrast = torch.linspace(0.3, 1.7, count) if count > 1 else torch.ones(1)
    return vision_model.images(count) * contrast[:, None, None, None]


def rule_for(runtime: VisionRuntime, images: Tensor, share: float) -> ScalePolicy:
    """The threshold at which the mean image keeps this share of the rows."""
    if share == 1.0:
        return ScalePolicy(source="learned", threshold=EVERYTHING)
    logits = runtime.model.scale_logits(images).flatten().sort().values
    rows = share * runtime.spec.tokens
    coarse = len(logits) / len(images)
    fine = (rows - runtime.spec.prefix_tokens - coarse) / 3 * len(images)
    return ScalePolicy(source="learned", threshold=float(logits[max(round(fine) - 1, 0)]))


def measure(
    report: Report, dtype: Dtype, batch: int, rounds: int, seconds: float,
    machine: limits.Limits, peers: dict[str, Peer],
) -> None:  # fmt: skip
    """Rows of one dtype and batch size."""
    plain = VisionRuntime(vision_model.container(NAME, dtype, exits=False)).model
    mixed = VisionRuntime(vision_model.container(NAME, dtype, exits=False, scales=SCALES))
    images, peak = pictures(batch), machine.flops(getattr(torch, dtype))
    given: dict[str, ComputePolicy | list[ComputePolicy]] = {
        f"{share:.0%} of tokens": ComputePolicy(scales=rule_for(mixed, images, share))
        for share in SHARES
    }
    if batch > 1:
        one = [ComputePolicy(scales="all_fine")]
        given[ONE] = one + [ComputePolicy(scales="all_coarse")] * (batch - 1)
    arms: dict[str, Arm] = {"dense": timed(partial(plain.forward, images))}
    for name, policy in given.items():
        arms[name] = timed(partial(mixed.forward, images, policy))
    arms |= parts(mixed, images, given["50% of tokens"])
    for peer, its in peers.items():
        for arm, of in its.versions["arms"].items():
            if of == dtype:
                arms[f"{peer} {arm}"] = partial(_ask, its, arm, batch)
    samples = alternate({key: settled(arm) for key, arm in arms.items()}, rounds, seconds)

    common = {"op": "mixed scale", "scenario": f"{NAME} B={batch}", "dtype": dtype}
    dense = samples.p50("dense")
    others = [name for name in arms if name.split(" ")[0] in peers]
    ratios = {name: samples.ratio(name, "dense") for name in others}
    best = min(ratios, key=ratios.__getitem__) if ratios else None
    if best is not None:
        report.add(**common, what="best peer's dense time / ours", peer=best,
                   **target(ratios[best], 1.0), **samples.only("dense", best).guard())  # fmt: skip
    for name, policy in given.items():
        trace = mixed.forward(images, policy).trace
        share = trace.macs_executed / trace.macs_dense
        measured = samples.ratio(name, "dense")
        row: dict[str, Any] = {
            **common, "what": name, **samples.times(name), "dense_p50_us": dense * 1e6,
            "time_share": measured, "macs_share": share,
            "tokens": [int(trace.tokens.min()), float(trace.tokens.float().mean()),
                       int(trace.tokens.max())],
            "accuracy": "none: random weights",
            "limit_name": "arithmetic peak GFLOP/s", "limit": peak,
            "fraction": 2e-9 * trace.macs_executed / samples.p50(name) / peak,
            **samples.only("dense", name).guard(),
        }  # fmt: skip
        if best is not None:
            row["speedup_over_peer"] = ratios[best] / measured
        if name == "100% of tokens":
            report.add(**row, **target(measured - 1, 0.03, at_most=True))
            continue
        rho = (1 - measured) / (1 - share)
        if name == ONE:
            padded = batch * trace.tokens.max() / trace.tokens.sum()
            row["padded_tokens_over_packed"] = float(padded)
        report.add(**row, rho=rho, **target(rho, 0.9 if batch >= 8 else 0.8))
    spec, whole = mixed.spec, samples.p50("50% of tokens")
    choice = mixed.forward(images, given["50% of tokens"]).trace.choice
    rows = choice.cu_seqlens(spec.prefix_tokens).diff().long()
    # The plan has no arithmetic to speak of: its row has a target instead of a limit.
    work = {
        "gate": (len(choice.stops) * region_macs(spec), machine.fp32_gflops),
        "embed": (int(mixed.model.embed_macs(choice).sum()), peak),
        "attention": (2 * spec.hidden_size * int((rows * rows).sum()), peak),
    }

    def limit(part: str) -> dict[str, Any]:
        if part not in work:
            return {}
        macs, gflops = work[part]
        return {"limit_name": "arithmetic peak GFLOP/s", "limit": gflops,
                "fraction": 2e-9 * macs / samples.p50(part) / gflops}  # fmt: skip

    for part, most in (("gate", None), ("plan", 0.02), ("embed", None)):
        share = samples.ratio(part, "50% of tokens")
        row = {
            **common, "what": f"{part} / forward at 50% of tokens", **samples.times(part),
            "forward_p50_us": whole * 1e6, **limit(part),
            **samples.only(part, "50% of tokens").guard(),
        }  # fmt: skip
        goal = {"measured": share} if most is None else target(share, most, at_most=True)
        report.add(**row, **goal)
    ratio = samples.ratio("SDPA loop", "attention")
    report.add(
        **common, what="attention at 50% of tokens: a loop of SDPA / ours",
        **samples.times("attention"), **limit("attention"),
        **samples.only("SDPA loop", "attention").guard(),
        **target(ratio, 1.2) if dtype == "bfloat16" else {"ratio": ratio},
    )  # fmt: skip


def parts(runtime: VisionRuntime, images: Tensor, policy: Any) -> dict[str, Arm]:
    """Gate, plan and embedding by themselves."""
    model: VisionTransformer = runtime.model
    stops = torch.cat(runtime.forward(images, policy).trace.stops or ())
    choice = model.choose(images, stops=stops)
    ours, loop = attentions(runtime, choice.cu_seqlens(runtime.spec.prefix_tokens))
    return {
        "attention": timed(ours, 3),
        "SDPA loop": timed(loop, 3),
        "gate": timed(lambda: runtime.model.scale_logits(images)),
        "plan": timed(lambda: model.choose(images, stops=stops), 10),
        "embed": timed(lambda: model.embed(images, choice)),
    }


def attentions(
    runtime: VisionRuntime, ends: Tensor
) -> tuple[Callable[[], object], Callable[[], object]]:
    """One layer's attention of images of these lengths: ours, and torch's image by image."""
    spec = runtime.spec
    random = torch.Generator().manual_seed(4)
    qkv = torch.randn(int(ends[-1]), 3 * spec.hidden_size, generator=random)
    qkv = qkv.to(getattr(torch, spec.dtype))
    q, k, v = qkv.chunk(3, 1)
    scale, heads = spec.head_dim**-0.5, spec.num_heads
    cuts = list(itertools.pairwise(ends.tolist()))
    by_head = [t.unflatten(1, (heads, -1)).transpose(0, 1)[None] for t in (q, k, v)]

    def loop() -> None:
        for a, b in cuts:
            F.scaled_dot_product_attention(*(t[:, :, a:b] for t in by_head))

    return lambda: runtime.model.ops.attention_varlen(q, k, v, ends, ends, heads, scale), loop


def _ask(peer: Peer, arm: str, batch: int) -> float:
    return float(peer.ask(do="time", arm=arm, batch=batch)["seconds"])


def main() -> int:
    """Every dtype and batch size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="31 at batch 1, 11 at 8, 7 at 32")
    parser.add_argument("--work", type=Path, help="keep the peers' model and compiled code here")
    parser.add_argument("--quick", action="store_true", help="only show that it works")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = Report("scales", store=not args.quick)
    machine = limits.measure(args.threads)
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        peers: dict[str, Peer] = {}
        if not args.quick:
            peers = _peers(report, work, args.threads, stack)
        for dtype in args.dtypes:
            for batch in [2] if args.quick else args.batches:
                rounds = 1 if args.quick else args.rounds or {1: 31, 8: 11}.get(batch, 7)
                seconds = 0.0 if args.quick else 15.0
                measure(report, dtype, batch, rounds, seconds, machine, peers)
    return report.close()


def _peers(
    report: Report, work: Path, threads: int, stack: contextlib.ExitStack
) -> dict[str, Peer]:
    if TIMM not in os.environ:
        report.add(op="mixed scale", scenario=NAME, what="peers", absent=f"no {TIMM}")
        return {}
    name = MODELS[0]
    work.mkdir(parents=True, exist_ok=True)
    open_models(work / name, name)
    return open_peers(report, work / name, name, threads, stack)


if __name__ == "__main__":
    raise SystemExit(main())
