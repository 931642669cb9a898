"""Held-out perplexity and accuracy against the mean number of experts used, in plain torch.

Thresholds are calibrated on training windows, one for all layers, and then held fixed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from data import CHECKPOINT, load_corpus
from model import Config, Cut, Mixtral, Routing
from rules import always_one, gap_cut, gaps, random_cut, share_cut, shares

Value = Callable[[Tensor], Tensor]

MEANS = (1.9, 1.8, 1.7, 1.6, 1.5, 1.4, 1.3, 1.2, 1.1)
LENGTH, BATCH = 512, 16


@dataclass
class Result:
    """`experts` [layers] mean number used, `load` [layers, E] share of the expert runs."""

    perplexity: float
    accuracy: float
    experts: Tensor
    load: Tensor

    def __str__(self) -> str:
        return f"{self.perplexity:.2f} / {self.accuracy:.1%} ({self.experts.mean():.3f})"


@dataclass
class Counts:
    """Sums over batches, per layer."""

    tokens: int = 0
    single: list[int] = field(default_factory=list)
    runs: list[Tensor] = field(default_factory=list)

    def add(self, routings: list[Routing]) -> None:
        if not self.single:
            self.single = [0] * len(routings)
            self.runs = [torch.zeros(r.probs.shape[1]) for r in routings]
        self.tokens += len(routings[0].single)
        for i, r in enumerate(routings):
            self.single[i] += int(r.single.sum())
            used = torch.cat([r.experts[:, 0], r.experts[~r.single, 1]])
            self.runs[i] += torch.bincount(used, minlength=r.probs.shape[1])


def windows_of(documents: list[Tensor], limit: int | None = None) -> Tensor:
    """Consecutive windows over the concatenated documents, [count, LENGTH + 1]."""
    stream = torch.cat(documents)
    count = (len(stream) - 1) // LENGTH
    starts = torch.arange(count) * LENGTH
    if limit is not None:
        starts = starts[torch.linspace(0, count - 1, limit).long()]
    return stream[starts[:, None] + torch.arange(LENGTH + 1)]


def score(model: Mixtral, windows: Tensor, cut: Cut | None) -> Result:
    counts, loss, correct = Counts(), 0.0, 0
    for batch in windows.split(BATCH):
        logits, routings = model(batch[:, :-1], cut)
        logits, targets = logits.float().flatten(0, 1), batch[:, 1:].flatten()
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        correct += int((logits.argmax(-1) == targets).sum())
        counts.add(routings)
    runs = torch.stack(counts.runs)
    return Result(
        math.exp(loss / counts.tokens),
        correct / counts.tokens,
        2 - torch.tensor(counts.single) / counts.tokens,
        runs / runs.sum(-1, keepdim=True),
    )


def pooled(model: Mixtral, windows: Tensor, cut: Cut | None, value: Value) -> Tensor:
    """value(top-2 probabilities) of every token in every layer, as one vector."""
    parts = []
    for batch in windows.split(BATCH):
        parts += [value(r.top()) for r in model(batch[:, :-1], cut)[1]]
    return torch.cat(parts)


def calibrate(
    model: Mixtral, windows: Tensor, rule: Callable[[float], Cut], value: Value, mean: float
) -> float:
    """The threshold at which `mean` experts are used on average.

    Leaving experts out changes what the layers above see, so the quantile is taken again with the
    threshold of the pass before in force. The second pass moves it by little, a third by nothing.
    """
    cut: Cut | None = None
    for _ in range(3):
        values = pooled(model, windows, cut, value)
        # kthvalue, because torch.quantile refuses more than 16 M elements.
        threshold = values.kthvalue(max(1, round((mean - 1) * len(values)))).values.item()
        cut = rule(threshold)
    return threshold


def print_table(model: Mixtral, windows: Tensor, calibration: Tensor) -> float:
    """The table; returns the share threshold for 1.5 experts."""
    middle = 1.0
    print(
        "\nperplexity / accuracy (mean experts used)\n\n"
        "| target | share ≥ τ | gap > θ | random | τ | θ |\n|---|---|---|---|---|---|"
    )
    print(f"| 2 | {score(model, windows, None)} | – | – | – | – |", flush=True)
    for mean in MEANS:
        tau = calibrate(model, calibration, share_cut, shares, mean)
        theta = calibrate(model, calibration, gap_cut, gaps, mean)
        middle = tau if mean == 1.5 else middle
        cuts = (share_cut(tau), gap_cut(theta), random_cut(2 - mean))
        cells = " | ".join(str(score(model, windows, cut)) for cut in cuts)
        print(f"| {mean:g} | {cells} | {tau:.4f} | {theta:.4f} |", flush=True)
    print(f"| 1 (k = 1) | {score(model, windows, always_one)} | – | – | – | – |", flush=True)
    return middle


def print_load(model: Mixtral, windows: Tensor, cut: Cut | None, title: str) -> None:
    """Per layer: each expert's share of the runs, in per cent, and how far it is from even."""
    result = score(model, windows, cut)
    count = result.load.shape[1]
    print(f"\n{title}\n\n| layer | mean experts | share of runs, % | largest / even |")
    print("|---|---|---|---|")
    for i, load in enumerate(result.load):
        cells = " ".join(f"{100 * v:.1f}" for v in load.tolist())
        print(f"| {i} | {result.experts[i]:.3f} | {cells} | {load.max() * count:.2f} |", flush=True)


def run(args: argparse.Namespace) -> None:
    model = Mixtral(Config.load(args.checkpoint / "config.json"))
    model.load_state_dict(
        {k: v.float() for k, v in load_file(str(args.checkpoint / "model.safetensors")).items()}
    )
    model.eval()
    train, held_out = load_corpus(args.checkpoint)
    windows, calibration = windows_of(held_out, args.limit), windows_of(train, 48)
    print(
        f"{windows.shape[0] * LENGTH} held-out tokens; on the {calibration.shape[0]} training "
        f"windows of the calibration: {score(model, calibration, None)}",
        flush=True,
    )
    tau = print_table(model, windows, calibration)
    print_load(model, windows, None, "Load, two experts")
    print_load(model, windows, share_cut(tau), "Load, share cut at 1.5")
    values = pooled(model, windows, None, shares).view(-1)
    levels = torch.tensor([0.01, 0.25, 0.5, 0.75, 0.99])
    quantiles = torch.quantile(values, levels).tolist()
    print("\nshare, p1 p25 p50 p75 p99: " + " ".join(f"{v:.4f}" for v in quantiles))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, help="use this many held-out windows only")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast (faster)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
        run(args)


if __name__ == "__main__":
    main()
