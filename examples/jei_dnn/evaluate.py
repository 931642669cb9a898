"""Accuracy per exit and of the gated model, where images leave, and what that costs.

Every block and head runs for every image and the exit is chosen afterwards, by masks, as the
paper's repository does: slow, simple, and independent of the runtime, hence an oracle for it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from examples.digit_scenes import large_scenes
from examples.jei_dnn.cost import repository_costs, shares, true_costs
from examples.jei_dnn.model import T2TViT, load, normalise
from examples.jei_dnn.rules import leave

CHECKPOINT = Path(__file__).resolve().parent / "checkpoint"
BATCH = 100


@dataclass(frozen=True)
class Outputs:
    """`logits` [G + 1, n, C], `gates` [G, n] after the sigmoid, `levels` int64 [n]."""

    logits: Tensor
    gates: Tensor
    levels: Tensor

    def answers(self) -> Tensor:
        """[n]: the class named by the head that each image leaves at."""
        return self.logits.argmax(-1).gather(0, self.levels[None])[0]


def batches(images: Tensor) -> Iterator[Tensor]:
    """uint8 [n, 96, 96, 3] in normalised parts."""
    for part in images.split(BATCH):
        yield normalise(part)


@torch.no_grad()
def run(model: T2TViT, images: Tensor) -> Outputs:
    logits = torch.cat([model.logits(model.class_rows(x)) for x in batches(images)], dim=1)
    gates = model.gate_logits(logits).sigmoid()
    return Outputs(logits, gates, leave(gates))


def by_confidence(outputs: Outputs, costs: Tensor, budget: float) -> tuple[float, Outputs]:
    """The usual rule, p_max ≥ θ, with the θ in steps of 0.001 that comes nearest to `budget`."""
    sure = outputs.logits[:-1].softmax(-1).amax(-1)

    def levels_at(threshold: float) -> Tensor:
        left = torch.cat([sure >= threshold, torch.ones_like(sure[:1]).bool()])
        return left.float().argmax(0)

    found = min(
        (float(v) for v in torch.linspace(0, 1, 1001)),
        key=lambda v: abs(costs[levels_at(v)].mean().item() - budget),
    )
    return found, Outputs(outputs.logits, outputs.gates, levels_at(found))


def print_report(model: T2TViT, outputs: Outputs, labels: Tensor) -> None:
    count, exits = len(labels), len(outputs.logits)
    paper, macs = (shares(cost(model.config)) for cost in (repository_costs, true_costs))
    left = torch.bincount(outputs.levels, minlength=exits)
    correct = outputs.logits.argmax(-1) == labels
    print("| exit | accuracy, all images | leave here | accuracy of those | cost | true MACs |")
    print("|---|---|---|---|---|---|")
    for level in range(exits):
        here = outputs.levels == level
        own = f"{correct[level][here].float().mean():.1%}" if here.any() else "–"
        name = "final" if level == exits - 1 else f"{level}"
        print(
            f"| {name} | {correct[level].float().mean():.1%} | {left[level] / count:.1%} | {own} "
            f"| {paper[level]:.3f} | {macs[level]:.3f} |"
        )
    gated = (outputs.answers() == labels).float().mean()
    costs = [float(torch.tensor(c)[outputs.levels].mean()) for c in (paper, macs)]
    print(
        f"\ngated: {gated:.2%} at {costs[0]:.3f} of the repository's cost and {costs[1]:.3f} of "
        f"the MACs; final head for everyone: {correct[-1].float().mean():.2%}; {count} scenes"
    )
    threshold, rival = by_confidence(outputs, torch.tensor(paper), costs[0])
    right = (rival.answers() == labels).float().mean()
    counts = torch.bincount(rival.levels, minlength=exits).tolist()
    print(f"p_max ≥ {threshold:.3f} instead, at the same cost: {right:.2%}, exits {counts}")
    mass = outputs.gates.cumsum(0) - outputs.gates
    nearest = (mass + 2 * outputs.gates - 1).abs().min()
    print(f"nearest to a tie: |S + 2g − 1| = {nearest:.1e}")


def only_checkpoint() -> Path:
    found = sorted(CHECKPOINT.glob("*.pth"))
    if len(found) != 1:
        raise FileNotFoundError(f"one .pth file expected in {CHECKPOINT}, found {len(found)}")
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="default: the one in checkpoint/")
    parser.add_argument("--scenes", type=Path, help=".npz of digit_scenes; default: made here")
    parser.add_argument("--count", type=int, default=2000, help="scenes to make")
    parser.add_argument("--split", choices=("test", "calibration"), default="test")
    parser.add_argument("--seed", type=int, default=99)
    parser.add_argument("--golden", type=Path, help="write images and outputs to this .npz")
    parser.add_argument("--golden-count", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    model = load(args.checkpoint or only_checkpoint())
    if args.scenes:
        stored = np.load(args.scenes)
        images, labels = stored["images"], stored["labels"]
    else:
        scenes = large_scenes(args.split, args.seed).batch(args.count)
        images, labels = scenes.images, scenes.labels
    outputs = run(model, torch.from_numpy(images))
    print_report(model, outputs, torch.from_numpy(labels))
    if args.golden:
        count = args.golden_count
        np.savez_compressed(
            args.golden,
            images=images[:count],
            labels=labels[:count],
            logits=outputs.logits[:, :count].numpy(),
            gates=outputs.gates[:, :count].numpy(),
            levels=outputs.levels[:count].numpy(),
        )


if __name__ == "__main__":
    main()
