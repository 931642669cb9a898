"""Stages 2 and 3: intermediate heads and gates on a frozen backbone, one checkpoint per λ.

The backbone never changes here, so its class rows are computed once and the rest takes seconds. The
rules are those of networkslab/dynn: warm-up of the heads, then heads and gates in turns.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.digit_scenes import large_scenes
from examples.jei_dnn.cost import repository_costs, shares
from examples.jei_dnn.model import Config, T2TViT, normalise, save
from examples.jei_dnn.rules import exit_masses, leave
from examples.jei_dnn.train_backbone import WORK, save_state, training_pool, views

TURN = 200
BATCH = 128
# Both differ from the original (5 and 1): with those, every image left at the first two exits.
MAX_POSITIVE_WEIGHT = 1.0
GATE_RATE = 100


@dataclass(frozen=True)
class Rows:
    """`rows` [depth, n, D], the normalised class row after every block; `labels` [n]."""

    rows: Tensor
    labels: Tensor

    def sample(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(self.labels), (BATCH,), generator=generator)
        return self.rows[:, chosen], self.labels[chosen]


@torch.no_grad()
def training_rows(model: T2TViT, count: int) -> Rows:
    """Scenes of the pool, each with its digit at a new place."""
    pool, rng = training_pool(), np.random.default_rng(2)
    side = model.config.image_px
    parts = [
        model.class_rows(views(pool, np.arange(at, min(at + 100, count)), side, rng))
        for at in range(0, count, 100)
    ]
    return Rows(torch.cat(parts, dim=1), torch.from_numpy(pool.labels)[:count])


@torch.no_grad()
def scene_rows(model: T2TViT, split: str, count: int, seed: int) -> Rows:
    """Fresh scenes of a split."""
    scenes = large_scenes(split, seed).batch(count)
    images = torch.from_numpy(scenes.images)
    parts = [model.class_rows(normalise(part)) for part in images.split(100)]
    return Rows(torch.cat(parts, dim=1), torch.from_numpy(scenes.labels))


def all_rows(model: T2TViT, step: int, count: int, calibration: int) -> tuple[Rows, Rows]:
    """Training and calibration rows; kept on disk, since a further λ needs nothing else."""
    path = WORK / f"rows_{step}_{count}_{calibration}.pt"
    if not path.exists():
        made = training_rows(model, count), scene_rows(model, "calibration", calibration, 5)
        save_state(path, {"rows": [(part.rows, part.labels) for part in made]})
    data, validation = (Rows(*part) for part in torch.load(path, weights_only=True)["rows"])
    return data, validation


def losses_per_exit(logits: Tensor, labels: Tensor) -> Tensor:
    """[exits, B, C] and [B] -> cross-entropies [B, exits]."""
    return torch.stack([F.cross_entropy(z, labels, reduction="none") for z in logits], dim=1)


def best_exits(logits: Tensor, labels: Tensor, costs: Tensor, tradeoff: float) -> Tensor:
    """[B]: the exit with the least cross-entropy + λ · cost; the final head is one of them."""
    return (losses_per_exit(logits, labels) + tradeoff * costs).argmin(1)


def gate_loss(gate_logits: Tensor, best: Tensor, weight: Tensor) -> Tensor:
    """Binary cross-entropy to "leave" at the best exit *and at every later gate*.

    gate_logits [gates, B]; `weight` [gates] is what a positive counts.
    """
    gates = torch.arange(len(gate_logits))
    target = (gates[:, None] >= best).float()
    multiplier = torch.where(target > 0, weight[:, None], 1.0)
    return F.binary_cross_entropy_with_logits(gate_logits, target, weight=multiplier)


def positive_weights(best: Tensor, gates: int) -> Tensor:
    """[gates]: samples with another best exit per sample with this one, capped."""
    counts = torch.bincount(best, minlength=gates + 1)[:gates].clamp(min=0.1)
    return ((len(best) - counts) / counts).clamp(max=MAX_POSITIVE_WEIGHT)


def optimizer_of(parameters: list[nn.Parameter], lr: float) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4)


def warm_up(model: T2TViT, data: Rows, steps: int, lr: float) -> None:
    """Stage 2: all early heads together, the earliest with the largest weight, G + 1 − l."""
    generator = torch.Generator().manual_seed(3)
    optimizer = optimizer_of(list(model.intermediate_heads.parameters()), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    gates = model.config.gates
    weight = torch.arange(gates + 1, 1, -1).float()
    for _ in range(steps):
        rows, labels = data.sample(generator)
        losses = losses_per_exit(model.logits(rows)[:-1], labels).mean(0)
        optimizer.zero_grad()
        (weight / weight.sum() * losses).sum().backward()
        optimizer.step()
        schedule.step()


def train_gates(
    model: T2TViT, data: Rows, validation: Rows, tradeoff: float, steps: int, lr: float
) -> None:
    """Stage 3: heads weighted by who leaves where, and gates, in turns of 200 batches."""
    generator = torch.Generator().manual_seed(4)
    costs = torch.tensor(shares(repository_costs(model.config)))
    optimizer = optimizer_of(list(model.intermediate_heads.parameters()), lr)
    # A gate is five numbers and starts at "leave": at the heads' rate it would need far more steps.
    optimizer.add_param_group({"params": list(model.gates.parameters()), "lr": GATE_RATE * lr})
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    weight = torch.ones(model.config.gates)
    for step in range(steps):
        if step % (2 * TURN) == 0:
            with torch.no_grad():
                logits = model.logits(validation.rows)
            best = best_exits(logits, validation.labels, costs, tradeoff)
            weight = positive_weights(best, model.config.gates)
        rows, labels = data.sample(generator)
        logits = model.logits(rows)
        if step // TURN % 2 == 0:
            masses = exit_masses(model.gate_logits(logits).detach().sigmoid())
            loss = (masses[:-1].T * losses_per_exit(logits[:-1], labels)).sum(1).mean()
        else:
            best = best_exits(logits.detach(), labels, costs, tradeoff)
            loss = gate_loss(model.gate_logits(logits.detach()), best, weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def report(model: T2TViT, data: Rows) -> tuple[float, float, list[int]]:
    """Gated accuracy, mean cost share (repository metric), images per exit."""
    logits = model.logits(data.rows)
    levels = leave(model.gate_logits(logits).sigmoid())
    answers = logits.argmax(-1).gather(0, levels[None])[0]
    costs = torch.tensor(shares(repository_costs(model.config)))
    counts = torch.bincount(levels, minlength=len(costs)).tolist()
    right = (answers == data.labels).float().mean().item()
    return right, costs[levels].mean().item(), counts


def accuracies(model: T2TViT, data: Rows) -> str:
    """Every head on every image."""
    with torch.no_grad():
        right = (model.logits(data.rows).argmax(-1) == data.labels).float().mean(1)
    return " ".join(f"{100 * v:.1f}" for v in right.tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", type=Path, default=WORK / "backbone.pt")
    parser.add_argument("--out", type=Path, default=WORK)
    parser.add_argument(
        "--tradeoff", type=float, nargs="+", default=[0.005, 0.01, 0.015, 0.02, 0.03]
    )
    parser.add_argument("--scenes", type=int, default=6000, help="training scenes to use")
    parser.add_argument("--calibration", type=int, default=2000, help="calibration scenes")
    parser.add_argument("--warm-up-steps", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=float, help="copy this λ to checkpoint/")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    start = time.time()
    model = T2TViT(Config())
    state = torch.load(args.backbone, weights_only=True)
    model.load_state_dict(state["model"])
    model.eval()
    data, validation = all_rows(model, state["step"], args.scenes, args.calibration)
    print(f"class rows {time.time() - start:.0f} s", flush=True)
    print(f"heads, calibration scenes: {accuracies(model, validation)} %", flush=True)
    warm_up(model, data, args.warm_up_steps, args.lr)
    print(f"heads, training scenes: {accuracies(model, data)} %", flush=True)
    print(f"heads, calibration scenes: {accuracies(model, validation)} %", flush=True)
    for tradeoff in args.tradeoff:
        gated = copy.deepcopy(model)
        train_gates(gated, data, validation, tradeoff, args.steps, args.lr)
        right, cost, counts = report(gated, validation)
        path = args.out / f"ckpt_{tradeoff:g}_{100 * right:.2f}.pth"
        save(gated, path, 100 * right, state["step"], torch.bfloat16)
        print(
            f"λ {tradeoff:g}: {right:.2%} at cost {cost:.3f}, exits {counts}; "
            f"{time.time() - start:.0f} s",
            flush=True,
        )
        if tradeoff == args.keep:
            shutil.copy(path, Path(__file__).resolve().parent / "checkpoint" / path.name)


if __name__ == "__main__":
    main()
