"""Perplexity and next-token accuracy on the held-out modules, by masked skipping in plain torch.

Every branch runs densely and skipped rows are zeroed: slow, simple, and the reference for what a
runtime that really skips must reproduce.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from data import HERE, load_corpus
from model import Config, Llama
from rules import SkipRule, batch_quantile, fixed_thresholds, random_skipping

RATIOS = (0.0, 0.15, 0.25, 0.4, 0.5, 0.6)
LENGTH, BATCH = 512, 16


class Recorder:
    """Runs another rule and keeps what every branch saw and decided."""

    def __init__(self, rule: SkipRule) -> None:
        self.rule = rule
        self.scores: dict[int, list[Tensor]] = {}
        self.skips: dict[int, list[Tensor]] = {}

    def __call__(self, branch: int, scores: Tensor, valid: Tensor) -> Tensor:
        skip = self.rule(branch, scores, valid)
        self.scores.setdefault(branch, []).append(scores[valid])
        self.skips.setdefault(branch, []).append(skip[valid])
        return skip

    def share(self) -> float:
        """Skipped share of valid tokens, every branch counting the same."""
        shares = [torch.cat(parts).float().mean().item() for parts in self.skips.values()]
        return sum(shares) / len(shares) if shares else 0.0


def calibrate(model: Llama, windows: Tensor, q: float) -> list[float]:
    """Thresholds whose average skip ratio is q, measured while skipping at q.

    Skipping changes the scores further up, so each threshold must be measured with the skipping
    below it already active. One big batch under batch_quantile does exactly that.
    """
    recorder = Recorder(batch_quantile(q))
    model(windows, recorder)
    branches = 2 * model.config.num_hidden_layers
    return [torch.quantile(recorder.scores[b][0], q).item() for b in range(branches)]


def windows_of(documents: list[Tensor], limit: int | None = None) -> Tensor:
    """Consecutive windows of LENGTH + 1 tokens over the concatenated documents."""
    stream = torch.cat(documents)
    count = (len(stream) - 1) // LENGTH
    starts = torch.arange(count) * LENGTH
    if limit is not None:
        starts = starts[torch.linspace(0, count - 1, limit).long()]
    return stream[starts[:, None] + torch.arange(LENGTH + 1)]


@dataclass
class Result:
    perplexity: float
    accuracy: float
    skipped: float


def score(model: Llama, windows: Tensor, rule: SkipRule | None) -> Result:
    recorder = Recorder(rule) if rule is not None else None
    loss, correct, total = 0.0, 0, 0
    for batch in windows.split(BATCH):
        logits = model(batch[:, :-1], recorder)[0].float().flatten(0, 1)
        targets = batch[:, 1:].flatten()
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        correct += int((logits.argmax(-1) == targets).sum())
        total += targets.numel()
    skipped = recorder.share() if recorder else 0.0
    return Result(math.exp(loss / total), correct / total, skipped)


def load_gated(path: Path, kind: str, config: Config) -> Llama:
    model = Llama(config)
    model.add_gates(kind)
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state)  # strict: a missing or unknown name is an error
    return model.eval()


def print_gates(model: Llama, windows: Tensor) -> None:
    """Scores per branch while nothing is skipped, and how far tokens differ in the skips at .25."""
    recorder = Recorder(batch_quantile(0.0))
    score(model, windows[: 2 * BATCH], recorder)
    print("| branch | p1 | p25 | p50 | p75 | p99 |\n|---|---|---|---|---|---|")
    levels = torch.tensor([0.01, 0.25, 0.5, 0.75, 0.99])
    for branch, parts in sorted(recorder.scores.items()):
        name = f"{branch // 2} {'mlp' if branch % 2 else 'attn'}"
        values = torch.quantile(torch.cat(parts), levels).tolist()
        print(f"| {name} | " + " | ".join(f"{v:.4f}" for v in values) + " |")
    recorder = Recorder(batch_quantile(0.25))
    score(model, windows[: 2 * BATCH], recorder)
    per_token = torch.stack([torch.cat(p) for _, p in sorted(recorder.skips.items())]).sum(0)
    counts = torch.bincount(per_token, minlength=17).float() / len(per_token)
    print(
        "tokens by number of skipped branches at q = .25: "
        + " ".join(f"{i}:{c:.3f}" for i, c in enumerate(counts.tolist()))
    )


def run(args: argparse.Namespace) -> None:
    config = Config.load(args.base / "config.json")
    train, held_out = load_corpus(args.base)
    windows, calibration = windows_of(held_out, args.limit), windows_of(train, 32)[:, :-1]
    weights = args.weights / "model.safetensors"
    if weights.exists():
        model = Llama(config)
        model.load_state_dict(load_file(str(weights)))
        base = score(model.eval(), windows, None)
        print(
            f"base: perplexity {base.perplexity:.2f} accuracy {base.accuracy:.2%} "
            f"({windows.shape[0] * LENGTH} held-out tokens)",
            flush=True,
        )
    for kind in args.kinds:
        model = load_gated(args.gated / f"gateskip_{kind}.pt", kind, config)
        print(
            f"\n{kind} gates: perplexity / accuracy (skipped share)\n\n"
            "| q | batch_quantile | calibrated | random |\n|---|---|---|---|"
        )
        for q in args.ratios:
            rules = [batch_quantile(q)]
            if q > 0:
                rules += [fixed_thresholds(calibrate(model, calibration, q)), random_skipping(q)]
            results = [score(model, windows, rule) for rule in rules]
            cells = [f"{r.perplexity:.2f} / {r.accuracy:.1%} ({r.skipped:.3f})" for r in results]
            print(f"| {q:g} | " + " | ".join(cells + ["–"] * (3 - len(cells))) + " |", flush=True)
        print()
        print_gates(model, windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=HERE / "base")
    parser.add_argument("--weights", type=Path, default=HERE / "work" / "base_weights")
    parser.add_argument("--gated", type=Path, default=HERE)
    parser.add_argument("--kinds", nargs="+", default=["scalar", "vector"])
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=int, help="use this many held-out windows only")
    parser.add_argument("--fp32", action="store_true", help="no bf16 autocast (slower)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=not args.fp32):
        run(args)


if __name__ == "__main__":
    main()
