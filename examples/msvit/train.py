"""Train the gated model: backbone on mixed masks (A), gate by measured gain (B).

Stage C, the backbone once more under the gate's own masks, is off unless asked for.

Budgets are steps, so that a busy machine makes the same model as an idle one. Each stage leaves its
result in work/ and is skipped when that is there.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.msvit.model import Config, MSViT, load, save
from examples.msvit.views import Pool, held_out

HERE = Path(__file__).resolve().parent
WORK = HERE / "work"
POOL = 20000
BATCH = 64


def log(text: str) -> None:
    print(f"{time.process_time():6.0f} s  {text}", flush=True)


def fine_at(scores: Tensor, count: int) -> Tensor:
    """The `count` regions of the highest score fine, the rest coarse: bool [B, R], True: coarse."""
    coarse = torch.ones_like(scores, dtype=torch.bool)
    return coarse.scatter_(1, scores.topk(count, dim=1).indices, False)


def mixed_active(model: MSViT, images: Tensor, progress: float, rng: np.random.Generator) -> Tensor:
    """Random active tokens for stage A, equally many in every image: bool [B, 1 + R + F].

    In the first half mostly only the busiest one to three regions, and nothing else, fine or
    coarse: the digit is among few tokens, so that learning takes off early. Otherwise a whole
    tiling: all coarse, all fine, or one to four regions fine, by noisy variance or at random.
    """
    c = model.config
    variance = model.regions(images).var(dim=-1)
    if progress < 0.5 and rng.random() < 0.8:
        dropped = fine_at(variance, int(rng.integers(1, 4)))
        active = model.active(dropped)
        fine = rng.random() < 0.75
        active[:, 1 : 1 + c.regions] = ~dropped & (not fine)
        active[:, 1 + c.regions :] &= fine
        return active
    if rng.random() < 0.25:
        scores = torch.rand_like(variance)
    else:
        scores = (variance + 1e-4).log() + 0.5 * torch.randn_like(variance)
    kind = rng.random()
    count = 0 if kind < 0.08 else c.regions if kind < 0.2 else int(rng.integers(1, 5))
    return model.active(fine_at(scores, count))


def noisy_choice(model: MSViT, images: Tensor, step: int) -> Tensor:
    """Choice for stage C: the gate's own, every other time with noise, now and then all fine."""
    with torch.no_grad():
        logits = model.gate_logits(images)
    if step % 8 == 7:
        return torch.zeros_like(logits, dtype=torch.bool)
    return logits + (1.5 * torch.randn_like(logits) if step % 2 else 0) > 0


def cosine(progress: float, step: int) -> float:
    return min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float, step: int) -> float:
    return min(1.0, (step + 1) / 20) * (1 - progress)


def descend(
    parameters: Iterable[nn.Parameter],
    loss_at: Callable[[float, int], Tensor],
    progress_at: Callable[[int], float],
    *,
    rate: float,
    schedule: Callable[[float, int], float],
    weight_decay: float = 0.05,
    report: int = 200,
) -> int:
    """AdamW on `loss_at(progress, step)` until the progress reaches 1; returns the steps taken."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(
        parameters, rate, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True
    )
    step, running = 0, 0.0
    while (progress := progress_at(step)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule(progress, step) + 1e-5
        loss = loss_at(progress, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        running = 0.98 * running + 0.02 * loss.item()
        if step % report == 0:
            log(f"step {step} loss {running / (1 - 0.98**step):.3f}")
    return step


def train_backbone(model: MSViT, pool: Pool, steps: int) -> None:
    """Stage A."""

    def loss_at(progress: float, step: int) -> Tensor:
        images, labels = pool.draw(BATCH)
        active = mixed_active(model, images, progress, pool.rng)
        return F.cross_entropy(model.logits(images, active), labels)

    descend(model.backbone(), loss_at, lambda step: step / steps, rate=2e-3, schedule=cosine)


@torch.no_grad()
def gains(model: MSViT, images: Tensor, labels: Tensor) -> Tensor:
    """How much the loss falls when only that region becomes fine, [B, R]."""
    tokens = model.tokens(images)

    def losses(coarse: Tensor) -> Tensor:
        rows, valid, _ = model.trim(tokens, model.active(coarse))
        logits = model.head(model.run(rows, valid)[:, 0])
        return F.cross_entropy(logits, labels, reduction="none")

    coarse = torch.ones(len(images), model.config.regions, dtype=torch.bool)
    before = losses(coarse)
    columns = []
    for region in range(model.config.regions):
        one_fine = coarse.clone()
        one_fine[:, region] = False
        columns.append(before - losses(one_fine))
    return torch.stack(columns, dim=1)


def worth_refining(gain: Tensor) -> Tensor:
    """Labels of the gate, bool [B, R]: a clear gain, or the best one if it is a gain at all."""
    best = gain >= gain.amax(dim=1, keepdim=True)
    return (gain > 0.5) | ((gain > 0.15) & best)


def train_gate(model: MSViT, pool: Pool, scenes: int, steps: int) -> None:
    """Stage B: the backbone stands still and is asked what each region is worth."""
    views, wanted = [], []
    for _ in range(scenes // 128):
        images, labels = pool.draw(128)
        wanted.append(worth_refining(gains(model, images, labels)))
        views.append(model.regions(images).bfloat16())
    regions, fine = torch.cat(views), torch.cat(wanted).float()
    log(f"{len(fine)} scenes labelled, {fine.sum(1).mean():.2f} regions of each worth refining")
    model.gate.start()

    def loss_at(progress: float, step: int) -> Tensor:
        chosen = torch.from_numpy(pool.rng.integers(0, len(fine), 128))
        pixels = regions[chosen].float()
        logits = model.gate(pixels + 0.02 * torch.randn_like(pixels))
        weight = torch.tensor(2.0)
        return F.binary_cross_entropy_with_logits(-logits, fine[chosen], pos_weight=weight)

    descend(
        model.gate.parameters(),
        loss_at,
        lambda step: step / steps,
        rate=2e-3,
        schedule=linear,
        weight_decay=0.01,
        report=500,
    )


def tune_under_gate(model: MSViT, pool: Pool, steps: int) -> None:
    """Stage C: the backbone meets the masks that it will be given.

    Worth it where stage A was short; after 3000 steps of that it is not (README).
    """

    def loss_at(progress: float, step: int) -> Tensor:
        images, labels = pool.draw(BATCH)
        return F.cross_entropy(model(images, noisy_choice(model, images, step)), labels)

    descend(
        model.backbone(),
        loss_at,
        lambda step: step / steps,
        rate=5e-4,
        schedule=linear,
        report=100,
    )


@torch.no_grad()
def check(model: MSViT, gated: bool) -> None:
    """Log the accuracy on 1000 calibration scenes."""
    images, labels = held_out("calibration", 1000, seed=7)
    parts = []
    for part in images.split(100):
        logits = model.gate_logits(part)
        coarse = logits > 0 if gated else torch.zeros_like(logits, dtype=torch.bool)
        fine = (~coarse).sum(1).float().mean()
        parts.append((model(part, coarse).argmax(-1), fine))
    right = (torch.cat([answer for answer, _ in parts]) == labels).float().mean()
    fine = torch.stack([f for _, f in parts]).mean()
    log(f"calibration scenes: {right:.1%} right, {fine:.2f} fine regions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=WORK / "msvit.safetensors")
    parser.add_argument("--backbone-steps", type=int, default=3000)
    parser.add_argument("--gate-scenes", type=int, default=8192)
    parser.add_argument("--gate-steps", type=int, default=4000)
    parser.add_argument("--tune-steps", type=int, default=0, help="stage C; 400 gained nothing")
    parser.add_argument("--pool", type=int, default=POOL)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    pool = Pool(args.pool, args.seed)
    log(f"{args.pool} scenes made")
    stages: list[tuple[str, bool, Callable[[MSViT], None]]] = [
        ("backbone", False, lambda m: train_backbone(m, pool, args.backbone_steps)),
        ("gate", True, lambda m: train_gate(m, pool, args.gate_scenes, args.gate_steps)),
    ]
    if args.tune_steps:
        stages.append(("tuned", True, lambda m: tune_under_gate(m, pool, args.tune_steps)))
    torch.manual_seed(args.seed)
    model = MSViT(Config())
    for number, (name, gated, stage) in enumerate(stages):
        path = args.out.with_name(f"{args.out.stem}_{name}.safetensors")
        if path.exists():
            model = load(path)
            continue
        # Each stage has its own streams, so that a resumed run is the run without a break.
        torch.manual_seed(args.seed + number)
        pool.rng = np.random.default_rng([args.seed, number])
        log(f"stage {name}")
        stage(model)
        save(model, path)
        for rule in (False, True)[: 1 + gated]:
            check(model, rule)
    save(model, args.out)
    log(f"wrote {args.out}")


if __name__ == "__main__":
    main()
