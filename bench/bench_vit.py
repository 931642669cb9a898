"""Are the dense vision backbones as fast as anybody's? ViT-S/16 and T2T-ViT, no exits anywhere.

    python -m bench.bench_vit [--models ...] [--batches 1 8 32] [--work DIR] [--rounds N] [--quick]

Ours against timm, eager and compiled by inductor, and onnxruntime; for T2T-ViT, which timm does not
have, against the plain torch module of examples/jei_dnn, eager and compiled. Same weights, images
in memory, dtype and threads, in turns, each in its own process. The target is the fastest peer of
the same dtype. timm runs where PYRUNTIME_TIMM_PYTHON points, onnxruntime where
PYRUNTIME_ONNXRUNTIME_PYTHON does; the module of T2T-ViT needs torch alone and takes the former.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

import pyruntime
from bench import limits
from bench.bench_gateskip import settled
from bench.harness import ROOT, Arm, Report, alternate, target, timed
from bench.peers import Peer, vit_case
from pyruntime.models.vision_cost import VisionCost
from pyruntime.models.vit import VisionTransformer

TIMM, ONNXRUNTIME = "PYRUNTIME_TIMM_PYTHON", "PYRUNTIME_ONNXRUNTIME_PYTHON"
MODELS = ("vit_small_patch16_224", "t2t_vit_7", "t2t_vit_14")
DTYPES: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
FEW = 4  # times as many rounds of a single image: it is short


@dataclass(slots=True)
class Bench:
    """One model: ours by dtype, the peers that loaded it, and what the machine can do."""

    name: str
    ours: Mapping[str, VisionTransformer]
    peers: Mapping[str, Peer]
    limit: limits.Limits
    args: argparse.Namespace

    def arms(self, dtype: str) -> list[tuple[str, str]]:
        """Peer and arm of everybody who runs this dtype."""
        return [
            (name, arm)
            for name, peer in self.peers.items()
            for arm, its in peer.versions["arms"].items()
            if its == dtype
        ]

    def check(self, report: Report) -> None:
        """Whether everybody computes the same model; who does not is not compared.

        Raises:
            RuntimeError: an engine's logits are further from our float32 ones than its dtype is.
        """
        wanted = self.ours["float32"].forward(vit_case.images(2))
        errors = {}
        for dtype in DTYPES:
            found = {f"ours {dtype}": self.ours[dtype].forward(vit_case.images(2))}
            for name, arm in self.arms(dtype):
                answer = self.peers[name].ask(do="logits", arm=arm, batch=2)
                found[f"{name} {arm}"] = torch.tensor(answer["logits"])
            for name, logits in found.items():
                error = float((logits - wanted).abs().max() / wanted.abs().max())
                errors[name] = round(error, 6)
                if not error <= vit_case.TOLERANCE[dtype]:
                    raise RuntimeError(f"{self.name}: {name}: error {error:.4f}")
        report.add(op="vit", scenario=self.name, what="largest error over largest logit",
                   errors=errors)  # fmt: skip

    def measure(self, report: Report, dtype: Literal["float32", "bfloat16"], batch: int) -> None:
        """A row for us, one per peer and one for the best of them."""
        model, images = self.ours[dtype], vit_case.images(batch)
        arms: dict[str, Arm] = {"ours": settled(timed(lambda: model.forward(images)))}
        for name, arm in self.arms(dtype):
            ask = partial(_ask, self.peers[name], arm=arm, batch=batch)
            arms[f"{name} {arm}".removesuffix(f" {dtype}")] = settled(ask)
        rounds = self.args.rounds * (FEW if batch == 1 and not self.args.quick else 1)
        samples = alternate(arms, rounds, self.args.seconds)
        self.limit = self.limit.merge(limits.measure(self.args.threads, 64))
        floor = batch * floor_seconds(model.cost, self.limit, dtype)
        macs, seconds = batch * model.cost.dense(), samples.p50("ours")
        row: dict[str, Any] = {
            "op": "vit", "scenario": f"{self.name} batch {batch}", "dtype": dtype,
        }  # fmt: skip
        report.add(
            **row, what="ours", **samples.times("ours"), images_per_s=batch / seconds,
            gflops=2 * macs / seconds / 1e9, limit_name="multiply-adds at the measured peak",
            limit=floor, fraction=floor / seconds, **samples.guard(),
        )  # fmt: skip
        ratios = {name: samples.ratio(name, "ours") for name in arms if name != "ours"}
        for name, ratio in ratios.items():
            report.add(**row, what=f"{name} time / ours", **samples.times(name), ratio=ratio,
                       **samples.guard())  # fmt: skip
        if ratios:
            best = min(ratios, key=ratios.__getitem__)
            report.add(**row, what="best peer time / ours", peer=best, **samples.guard(),
                       **target(ratios[best], 1.0))  # fmt: skip


def floor_seconds(
    cost: VisionCost, limit: limits.Limits, dtype: Literal["float32", "bfloat16"]
) -> float:
    """Of one image, at the peak of each dtype: the stem of a T2T-ViT and the head are float32."""
    precise = cost.head + (cost.stem if cost.spec.stem == "t2t" else 0)
    rest = cost.dense() - precise
    peak = limit.flops(getattr(torch, dtype))
    return 2 * (precise / limit.fp32_gflops + rest / peak) / 1e9


def open_models(folder: Path, name: str) -> dict[str, VisionTransformer]:
    """Ours by dtype, and FOLDER itself, made where they are not there yet."""
    if not folder.exists():
        if name in vit_case.T2T:
            vit_case.make(folder, name)
        else:
            script = str(ROOT / "bench" / "peers" / "vit_case.py")
            subprocess.run([os.environ[TIMM], script, str(folder), name], check=True)
    source = folder / vit_case.CHECKPOINT if name in vit_case.T2T else folder
    found: dict[str, VisionTransformer] = {}
    for dtype in DTYPES:
        converted = folder.with_name(f"{name}-{dtype}")
        if not converted.exists():
            pyruntime.convert(source, converted, dtype=dtype)
        found[dtype] = pyruntime.load_vision(converted, verify=False).model
    return found


def open_peers(
    report: Report, folder: Path, name: str, threads: int, stack: contextlib.ExitStack
) -> dict[str, Peer]:
    """Peers that are installed; the others, and what a peer cannot run, get a row that says so."""
    scripts = {("torch" if name in vit_case.T2T else "timm"): (TIMM, "vit_torch.py")}
    if name not in vit_case.T2T:
        scripts["onnxruntime"] = (ONNXRUNTIME, "vit_onnxruntime.py")
    found = {}
    for peer, (variable, script) in scripts.items():
        row: dict[str, Any] = {"op": "vit", "scenario": name, "what": "peer", "peer": peer}
        python = os.environ.get(variable)
        if python is None:
            report.add(**row, absent=f"no {variable}")
            continue
        found[peer] = stack.enter_context(Peer(python, script, str(folder), str(threads)))
        report.add(**row, **found[peer].versions)
    return found


def _ask(peer: Peer, **request: Any) -> float:
    return float(peer.ask(do="time", **request)["seconds"])


def main() -> None:
    """Every model, dtype and batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--work", type=Path, help="keep models and compiled code here")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=120, help="longest wait for quiet")
    parser.add_argument("--quick", action="store_true", help="batch 1: does it run at all?")
    args = parser.parse_args()
    if args.quick:
        args.batches, args.rounds, args.seconds = [1], 2, 0
    torch.set_num_threads(args.threads)
    report = Report("vit", store=not args.quick)
    with contextlib.ExitStack() as outer, torch.inference_mode():
        work = args.work or Path(outer.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        limit = limits.measure(args.threads)
        for name in args.models:
            if name not in vit_case.T2T and TIMM not in os.environ:
                report.add(op="vit", scenario=name, what="model", absent=f"no {TIMM}")
                continue
            with contextlib.ExitStack() as stack:
                ours = open_models(work / name, name)
                peers = open_peers(report, work / name, name, args.threads, stack)
                bench = Bench(name, ours, peers, limit, args)
                bench.check(report)
                for dtype in DTYPES:
                    for batch in args.batches:
                        bench.measure(report, dtype, batch)
                limit = bench.limit
    raise SystemExit(report.close())


if __name__ == "__main__":
    main()
