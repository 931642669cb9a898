"""Train a plain ViT on scenes resized once and for all: what the gated model has to beat.

Same blocks, same scenes, same curriculum, and a budget of CPU seconds: give it what train.py took.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.msvit.model import Config, MSViT, save
from examples.msvit.train import BATCH, POOL, WORK, cosine, descend, log
from examples.msvit.views import GRID, Pool, held_out


def resize(images: Tensor, side: int) -> Tensor:
    """Antialiased, [B, 3, 64, 64] -> [B, 3, side, side]; by the mean where it divides."""
    if images.shape[-1] % side == 0:
        return F.avg_pool2d(images, images.shape[-1] // side)
    size = (side, side)
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)


def busiest(images: Tensor, grid: int, share: float) -> Tensor:
    """The `share` of places whose surroundings (12 px) vary most: bool [B, grid²].

    train.py keeps whole regions; a grid that regions do not divide needs a score per place.
    """
    blurred = [
        F.avg_pool2d(F.avg_pool2d(x, 4), 3, stride=1, padding=1, count_include_pad=False)
        for x in (images, images.square())
    ]
    variance = (blurred[1] - blurred[0].square()).mean(dim=1)
    scores = F.adaptive_avg_pool2d(variance, grid).flatten(1)
    count = max(2, round(share * grid**2))
    kept = torch.zeros_like(scores, dtype=torch.bool)
    return kept.scatter_(1, scores.topk(count, dim=1).indices, True)


def cut_side(progress: float, side: int) -> int:
    """Cuts of `side` px, as they are, at first; they grow to whole scenes, and shrink to `side`."""
    return min(64, GRID * round((side + (64 - side) * 2 * progress) / GRID))


def train(model: MSViT, pool: Pool, seconds: float, curriculum: str) -> int:
    """What is easier in the first half is the curriculum's.

    "busiest", as in train.py: four of five steps see only the busiest 8 to 25 % of the places.
    "zoom": cuts around the digit, by its box, that grow to whole scenes.
    """
    side, grid = model.config.side, model.config.grid

    def loss_at(progress: float, step: int) -> Tensor:
        if curriculum == "zoom":
            images, labels = pool.draw(BATCH, cut_side(progress, side))
            return F.cross_entropy(model(resize(images, side)), labels)
        scenes, labels = pool.draw(BATCH)
        images = resize(scenes, side)
        if progress < 0.5 and pool.rng.random() < 0.8:
            kept = busiest(scenes, grid, pool.rng.uniform(0.08, 0.25))
            active = torch.cat([torch.ones_like(kept[:, :1]), kept], dim=1)
            logits = model.logits(images, active)
        else:
            logits = model(images)
        return F.cross_entropy(logits, labels)

    start = time.process_time()
    return descend(
        model.parameters(),
        loss_at,
        lambda step: (time.process_time() - start) / seconds,
        rate=2e-3,
        schedule=cosine,
    )


@torch.no_grad()
def accuracy(model: MSViT, images: Tensor, labels: Tensor) -> float:
    """Of scenes at their full 64 px; the model's side is made here."""
    answers = [model(resize(part, model.config.side)).argmax(-1) for part in images.split(100)]
    return float((torch.cat(answers) == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, required=True, help="pixels, a multiple of --patch")
    parser.add_argument("--patch", type=int, default=4)
    parser.add_argument("--cpu-seconds", type=float, required=True)
    parser.add_argument("--curriculum", choices=("busiest", "zoom"), default="busiest")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--pool", type=int, default=POOL)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    pool = Pool(args.pool, args.seed)
    torch.manual_seed(args.seed)
    model = MSViT(Config(side=args.side, patch=args.patch, ratio=1))
    log(f"{args.side} px, patches of {args.patch}, {1 + model.config.grid**2} tokens")
    steps = train(model, pool, args.cpu_seconds, args.curriculum)
    right = accuracy(model, *held_out("calibration", 1000, seed=7))
    log(f"{steps} steps; calibration scenes: {right:.1%} right")
    name = f"static_{args.side}_{args.patch}_{args.curriculum}.safetensors"
    save(model, args.out or WORK / name)


if __name__ == "__main__":
    main()
