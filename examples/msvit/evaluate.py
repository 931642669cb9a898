"""Accuracy, tokens and MACs of the gated model, of other rules on its weights, of static models.

Independent of the runtime, hence an oracle for it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from examples.digit_scenes import SPLITS, Batch, Scenes
from examples.msvit.model import Config, MSViT, load, normalise
from examples.msvit.train import WORK, fine_at
from examples.msvit.train_static import resize

CHECKPOINT = Path(__file__).resolve().parent / "checkpoint" / "msvit.safetensors"
BATCH = 100
THRESHOLDS = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0)


@dataclass(frozen=True)
class Row:
    """One line of the table: `right` bool [n], `tokens` int64 [n] with the class token."""

    name: str
    right: Tensor
    tokens: Tensor
    macs: float


def macs(c: Config, tokens: Tensor, gated: bool) -> float:
    """Mean multiply-accumulates of an image: embedding, blocks, head, and the gate where it runs.

    Norms, softmax, activations, additions and the mean over a region's pixels are not counted.
    """
    n, width = tokens.double(), c.width
    linears = (4 + 2 * c.mlp_ratio) * width**2 * n
    blocks = c.depth * (linears + 2 * n**2 * width)
    embedding = (n - 1) * 3 * c.patch**2 * width
    total = float((blocks + embedding).mean()) + width * c.classes
    if gated:
        widths = (3 * c.region_px**2, *c.gate_widths, 1)
        total += c.regions * sum(a * b for a, b in pairwise(widths))
    return total


def batches(images: Tensor) -> Iterator[Tensor]:
    """uint8 [n, 64, 64, 3] in normalised parts."""
    for part in images.split(BATCH):
        yield normalise(part)


@torch.no_grad()
def classify(model: MSViT, images: Tensor, coarse: Tensor) -> Tensor:
    """Logits [n, classes] of uint8 [n, 64, 64, 3] under the choices [n, R]."""
    parts = zip(batches(images), coarse.split(BATCH), strict=True)
    return torch.cat([model(part, choice) for part, choice in parts])


@torch.no_grad()
def per_batch(images: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([function(part) for part in batches(images)])


def holds_digit(c: Config, boxes: Tensor) -> Tensor:
    """Which regions the digit's box (y, x, side) touches, bool [n, R]; no gate can know it."""
    first = torch.arange(c.side // c.region_px) * c.region_px
    low, high = boxes[:, :2, None], boxes[:, :2, None] + boxes[:, 2:, None]
    touched = (first < high) & (first + c.region_px > low)
    return (touched[:, 0, :, None] & touched[:, 1, None, :]).flatten(1)


def choices(
    model: MSViT, images: Tensor, boxes: Tensor, gate: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Name and choice [n, R] of every rule that is compared."""
    whole = torch.zeros_like(gate, dtype=torch.bool)
    yield "all fine", whole
    for threshold in THRESHOLDS:
        yield f"gate, θ = {threshold:+.0f}" if threshold else "**gate, θ = 0**", gate > threshold
    variance = per_batch(images, lambda x: model.regions(x).var(dim=-1))
    for count in (1, 2, 3):
        yield f"variance, {count} of {gate.shape[1]} fine", fine_at(variance, count)
    random = torch.rand(gate.shape, generator=torch.Generator().manual_seed(0))
    for count in (1, 2):
        yield f"random, {count} of {gate.shape[1]} fine", fine_at(random, count)
    yield "all coarse", ~whole
    yield "the digit's own regions (oracle)", ~holds_digit(model.config, boxes)


def gated_rows(model: MSViT, scenes: Batch, gate: Tensor) -> Iterator[Row]:
    images, labels = torch.from_numpy(scenes.images), torch.from_numpy(scenes.labels)
    for name, coarse in choices(model, images, torch.from_numpy(scenes.boxes), gate):
        right = classify(model, images, coarse).argmax(-1) == labels
        tokens = model.active(coarse).sum(dim=1)
        yield Row(name, right, tokens, macs(model.config, tokens, gated="θ" in name))


def static_row(path: Path, scenes: Batch) -> Row:
    model = load(path)
    c = model.config
    answers = per_batch(
        torch.from_numpy(scenes.images), lambda x: model(resize(x, c.side)).argmax(-1)
    )
    right = answers == torch.from_numpy(scenes.labels)
    tokens = torch.tensor([1 + c.grid**2])
    name = f"*static* {c.side} px, patch {c.patch}"
    return Row(name, right, tokens, macs(c, tokens, gated=False))


def print_table(rows: list[Row], digits: int) -> None:
    """The scenes show few distinct digits: errors are those of as many independent scenes."""
    whole = next(row for row in rows if row.name == "all fine")
    gate = next(row for row in rows if row.name == "**gate, θ = 0**")
    print("| | accuracy, % | against the gate, points | tokens | MMACs | share |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        right = row.right.double()
        effective = min(digits, len(right)) ** 0.5
        difference = right - gate.right.double()
        against = f"{100 * difference.mean():+.1f} ± {100 * difference.std() / effective:.1f}"
        print(
            f"| {row.name} | {100 * right.mean():.1f} ± {100 * right.std() / effective:.1f} "
            f"| {'–' if row is gate else against} | {row.tokens.double().mean():.1f} "
            f"| {row.macs / 1e6:.1f} | {row.macs / whole.macs:.1%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--static", type=Path, nargs="*", help="default: work/static_*")
    parser.add_argument("--count", type=int, default=2000, help="scenes to make")
    parser.add_argument("--split", choices=("test", "calibration"), default="test")
    parser.add_argument("--seed", type=int, default=99)
    parser.add_argument("--golden", type=Path, help="write images and outputs to this .npz")
    parser.add_argument("--golden-count", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    scenes = Scenes(args.split, args.seed).batch(args.count)
    model = load(args.checkpoint)
    images = torch.from_numpy(scenes.images)
    gate = per_batch(images, model.gate_logits)
    static = sorted(WORK.glob("static_*.safetensors")) if args.static is None else args.static
    rows = [*gated_rows(model, scenes, gate), *(static_row(path, scenes) for path in static)]
    first, last = SPLITS[args.split]
    print_table(rows, last - first)
    refined = torch.bincount((gate <= 0).sum(1))
    print(f"\nfine regions of a scene: {dict(enumerate(refined.tolist()))}")
    print(f"nearest to a tie: |gate logit| = {gate.abs().min():.1e}; {args.count} scenes")
    if args.golden:
        first_images, first_gate = images[: args.golden_count], gate[: args.golden_count]
        np.savez_compressed(
            args.golden,
            images=first_images.numpy(),
            labels=scenes.labels[: args.golden_count],
            gate_logits=first_gate.numpy(),
            logits=classify(model, first_images, first_gate > 0).numpy(),
            logits_all_fine=classify(model, first_images, first_gate > torch.inf).numpy(),
        )


if __name__ == "__main__":
    main()
