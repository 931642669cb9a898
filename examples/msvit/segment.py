"""Dense outputs of mixed scales: a linear probe that says of every fine cell which digit it shows.

The backbone stays as it is. Its outputs lie on the fine grid, a coarse token's repeated over the
cells that it stands for, and one linear layer reads them: background or one of ten digits. A probe
of its own for every policy, trained on scenes of "fit" and judged on "test".
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyruntime
from examples.digit_scenes import Batch, Scenes
from examples.msvit.evaluate import CHECKPOINT, batches
from examples.msvit.model import load
from examples.msvit.train import cosine, descend

CELL = 4
CELLS = 4096
# One cell in 64 shows a digit: with equal weights a probe rarely says so. Calibration scenes.
BACKGROUND = 0.1
POLICIES = ("all_fine", "learned", "all_coarse")
# Normalised images float32 [B, 3, 64, 64] and a policy -> [B, rows, columns, D].
Features = Callable[[Tensor, str], Tensor]


@dataclass(frozen=True)
class Cells:
    """`features` [n, D] of every cell of every scene; `labels` int64 [n]: 0, or digit + 1."""

    features: Tensor
    labels: Tensor


def torch_features(path: Path) -> Features:
    """Of the plain model, the oracle."""
    model = load(path)
    thresholds = {"all_fine": torch.inf, "learned": 0.0, "all_coarse": -torch.inf}

    @torch.no_grad()
    def features(images: Tensor, policy: str) -> Tensor:
        return model.features(images, model.gate_logits(images) > thresholds[policy])

    return features


def runtime_features(path: Path) -> Features:
    """By the runtime, of the container converted for it."""
    with TemporaryDirectory() as folder:
        pyruntime.convert(path, Path(folder) / "model")
        runtime = pyruntime.load_vision(Path(folder) / "model")

    def features(images: Tensor, policy: str) -> Tensor:
        scales = pyruntime.ScalePolicy(source=policy)
        return torch.stack(runtime.features(images, pyruntime.ComputePolicy(scales=scales)))

    return features


def cell_labels(scenes: Batch) -> Tensor:
    """0: background, digit + 1 where the digit's box touches the cell; int64 [n, rows · columns].

    Boxes start at multiples of a cell and are 6 or 8 px wide: always two by two cells.
    """
    grid = scenes.images.shape[1] // CELL
    labels = np.zeros((len(scenes.labels), grid, grid), np.int64)
    for image, digit, (y, x, side) in zip(labels, scenes.labels, scenes.boxes, strict=True):
        cells = (slice(at // CELL, (at + side - 1) // CELL + 1) for at in (y, x))
        image[tuple(cells)] = digit + 1
    return torch.from_numpy(labels).flatten(1)


def cells_of(features: Features, policy: str, scenes: Batch) -> Cells:
    images = torch.from_numpy(scenes.images)
    maps = torch.cat([features(part, policy) for part in batches(images)])
    return Cells(maps.flatten(0, 2), cell_labels(scenes).flatten())


def train_probe(cells: Cells, steps: int) -> nn.Module:
    """Logistic regression on standardised features."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    weights = torch.ones(11)
    weights[0] = BACKGROUND
    probe = nn.Sequential(nn.BatchNorm1d(cells.features.shape[1], affine=False), nn.Linear(96, 11))

    def loss_at(progress: float, step: int) -> Tensor:
        chosen = torch.from_numpy(rng.integers(0, len(cells.labels), CELLS))
        return F.cross_entropy(probe(cells.features[chosen]), cells.labels[chosen], weights)

    descend(
        probe.parameters(),
        loss_at,
        lambda step: step / steps,
        rate=1e-2,
        schedule=cosine,
        weight_decay=0.0,
        report=steps,
    )
    return probe.eval()


def overlap(found: Tensor, true: Tensor) -> float:
    """Intersection over union of two masks."""
    return float((found & true).sum() / (found | true).sum())


@torch.no_grad()
def report(policy: str, probe: nn.Module, cells: Cells) -> None:
    answers = torch.cat([probe(part).argmax(-1) for part in cells.features.split(65536)])
    labels = cells.labels
    classes = [overlap(answers == k, labels == k) for k in range(11)]
    digit = labels > 0
    print(
        f"| {policy} | {(answers == labels).float().mean():.2%} "
        f"| {overlap(answers > 0, digit):.1%} | {np.mean(classes):.1%} "
        f"| {(answers == labels)[digit].float().mean():.1%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--plain", action="store_true", help="features by model.py, an oracle")
    parser.add_argument("--fit-scenes", type=int, default=1000)
    parser.add_argument("--count", type=int, default=1000, help="scenes to judge on")
    parser.add_argument("--split", choices=("test", "calibration"), default="test")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    features = (torch_features if args.plain else runtime_features)(args.checkpoint)
    fit, judged = Scenes("fit", 11).batch(args.fit_scenes), Scenes(args.split, 12).batch(args.count)
    print("| policy | cells right | IoU of any digit | mean IoU, 11 classes | digit cells right |")
    print("|---|---|---|---|---|")
    for policy in POLICIES:
        probe = train_probe(cells_of(features, policy, fit), args.steps)
        report(policy, probe, cells_of(features, policy, judged))


if __name__ == "__main__":
    main()
