"""Stage 1: the backbone, by cross-entropy within a wall-clock budget."""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.digit_scenes import Batch, Ints, large_scenes
from examples.jei_dnn.model import TOKEN_PX, Config, T2TViT, normalise

WORK = Path(__file__).resolve().parent / "work"
GRID = 4


def training_pool(count: int = 20000, path: Path = WORK / "pool.npz") -> Batch:
    """Scenes of the split "fit"; kept on disk, and then `count` is not looked at."""
    if not path.exists():
        scenes = large_scenes("fit", 1).batch(count)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, images=scenes.images, labels=scenes.labels, boxes=scenes.boxes)
    stored = np.load(path)
    return Batch(stored["images"], stored["labels"], stored["boxes"])


def views(pool: Batch, indices: Ints, side: int, rng: np.random.Generator) -> Tensor:
    """Scenes shifted cyclically, then cut to `side`, float32 [B, 3, side, side].

    The shift puts the digit, whole, at a new random place of the cut.
    """
    images = np.empty((len(indices), side, side, 3), np.uint8)
    for image, index in zip(images, indices, strict=True):
        y, x, digit = pool.boxes[index]
        new_y, new_x = rng.integers(0, (side - digit) // GRID + 1, 2) * GRID
        rolled = np.roll(pool.images[index], (new_y - y, new_x - x), axis=(0, 1))
        image[:] = rolled[:side, :side]
    return normalise(torch.from_numpy(images))


def crop_side(progress: float, rng: np.random.Generator) -> int:
    """Half-size crops first: a quarter of the cost, and the digit fills four times as much."""
    if progress < 0.2:
        return 48
    if progress < 0.45:
        return 64 if rng.random() < 0.7 else 96
    return 96


def early_weight(progress: float) -> float:
    """What the early heads' mean loss counts.

    At first it makes the early class rows readable. Kept on, it made every head as good as the last
    one: the network had learnt to do without its depth.
    """
    return 0.5 if progress < 0.12 else 0.1 if progress < 0.28 else 0.0


def learning_rate(progress: float, step: int) -> float:
    """Linear warm-up over 150 steps, then a cosine over the budget down to 1 % of the peak."""
    rate = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return rate * min(1.0, (step + 1) / 150)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() == 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() != 2], "weight_decay": 0.0},
    ]


def save_state(path: Path, state: dict[str, object]) -> None:
    """Write beside and rename, so that a kill in between leaves the old file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, default=WORK / "backbone.pt", help="to resume")
    parser.add_argument("--minutes", type=float, default=50.0, help="wall-clock budget, all runs")
    parser.add_argument("--max-steps", type=int, help="stop early (smoke test)")
    parser.add_argument("--pool", type=int, default=20000, help="scenes to draw from")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fp32", action="store_true", help="no bf16 autocast")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    pool = training_pool(args.pool)
    labels = torch.from_numpy(pool.labels)
    model = T2TViT(Config())
    optimizer = torch.optim.AdamW(
        parameter_groups(model, 0.05), lr=args.lr, betas=(0.9, 0.98), fused=True
    )
    step, spent, running = 0, 0.0, math.log(model.config.classes)
    if args.state.exists():
        state = torch.load(args.state, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent, running = state["step"], state["spent"], state["running"]
    rng = np.random.default_rng(step)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.3f} M parameters", flush=True)

    def save() -> None:
        whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save_state(args.state, {**whole, "step": step, "spent": spent, "running": running})

    budget, start, first = args.minutes * 60, time.time() - spent, step
    saved, right = spent, 0.1
    while spent < budget and (args.max_steps is None or step < first + args.max_steps):
        progress = spent / budget
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate(progress, step)
        side = crop_side(progress, rng)
        indices = rng.integers(0, len(labels), args.batch)
        targets = labels[indices]
        room = model.config.grid - side // TOKEN_PX + 1
        corner = (int(rng.integers(room)), int(rng.integers(room)))
        with torch.autocast("cpu", torch.bfloat16, enabled=not args.fp32):
            logits = model.logits(model.class_rows(views(pool, indices, side, rng), corner))
        losses = torch.stack([F.cross_entropy(z.float(), targets) for z in logits])
        optimizer.zero_grad(set_to_none=True)
        (losses[-1] + early_weight(progress) * losses[:-1].mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running = 0.97 * running + 0.03 * losses[-1].item()
        right = 0.97 * right + 0.03 * (logits[-1].argmax(-1) == targets).float().mean().item()
        step, spent = step + 1, time.time() - start
        if step % 25 == 0:
            early = " ".join(f"{v:.2f}" for v in losses.tolist())
            print(
                f"step {step} side {side} loss {running:.3f} right {right:.3f} "
                f"heads {early}  {spent:.0f} s",
                flush=True,
            )
        if spent - saved > 120:
            saved = spent
            save()
    save()
    print(f"{step} steps of {args.batch}, {spent:.0f} s", flush=True)


if __name__ == "__main__":
    main()
