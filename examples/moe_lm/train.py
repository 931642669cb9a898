"""Train the mixture of experts on the standard library's source, within a wall-clock budget."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from data import CHECKPOINT, HERE, load_corpus, sample_batch
from model import Config, Cut, Mixtral, Routing
from rules import share_cut, shares

# From this share of the budget on, most batches leave second experts out.
CUT_FROM, CUT_BATCHES, CUT_MAX = 0.5, 0.75, 0.7


def learning_rate(progress: float, step: int, warmup: int) -> float:
    """Linear warm-up in steps, then a cosine over the budget down to 2 % of the peak."""
    rate = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return rate * min(1.0, (step + 1) / warmup)


def window_length(step: int) -> int:
    """Mostly short windows; every fourth batch is long so that all 1024 positions are trained."""
    return 1024 if step % 4 == 3 else 512


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weight decay on matrices only; norm weights stay free."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def balance_loss(routings: Sequence[Routing]) -> Tensor:
    """Switch's auxiliary loss E · Σ f_e · P_e, mean over layers; 1 when perfectly balanced.

    f is the share of the (token, slot) pairs that an expert gets *before* any cut: the cut is the
    user's choice, the router should be balanced without it.
    """
    losses = []
    for r in routings:
        count = r.probs.shape[1]
        f = torch.bincount(r.experts.flatten(), minlength=count).float() / r.experts.numel()
        losses.append(count * (f * r.probs.mean(0)).sum())
    return torch.stack(losses).mean()


def draw_cut(seen: Tensor, generator: torch.Generator) -> Cut | None:
    """A share cut with a random ratio, as one threshold for all layers.

    `seen` holds the shares of an earlier batch, all layers together; its quantile stands for this
    batch, whose shares are not known before it has run.
    """
    keep, ratio = torch.rand(2, generator=generator).tolist()
    if keep >= CUT_BATCHES:
        return None
    return share_cut(torch.quantile(seen, 1 - CUT_MAX * ratio).item())


def save_model(model: nn.Module, path: Path) -> None:
    """bf16, contiguous, under the names Mixtral checkpoints have on disk."""
    state = {name: t.detach().to(torch.bfloat16) for name, t in model.state_dict().items()}
    save_file(state, str(path), metadata={"format": "pt"})


def save_state(path: Path, state: dict[str, object]) -> None:
    """Write beside and rename, so that a kill in between leaves the old file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="config, tokenizer")
    parser.add_argument("--state", type=Path, default=HERE / "work" / "state.pt", help="to resume")
    parser.add_argument("--minutes", type=float, default=55.0, help="wall-clock budget, all runs")
    parser.add_argument("--max-steps", type=int, help="stop early (smoke test)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--balance", type=float, default=0.04, help="Σ over 4 layers: 0.01 each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fp32", action="store_true", help="no bf16 autocast")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    config = Config.load(args.checkpoint / "config.json")
    stream = torch.cat(load_corpus(args.checkpoint)[0])
    model = Mixtral(config)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, 0.1), lr=args.lr, betas=(0.9, 0.95), fused=True
    )
    step, spent, running, seen = 0, 0.0, math.log(config.vocab_size), torch.empty(0)
    if args.state.exists():
        state = torch.load(args.state, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        step, spent, running, seen = (state[k] for k in ("step", "spent", "running", "seen"))
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:.3f} M parameters, {len(stream) / 1e6:.2f} M training tokens", flush=True)

    def save() -> None:
        whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        counters = {"step": step, "spent": spent, "running": running, "seen": seen}
        save_state(args.state, {**whole, **counters, "generator": generator.get_state()})

    budget, start, first = args.minutes * 60, time.time() - spent, step
    saved = spent
    while spent < budget and (args.max_steps is None or step < first + args.max_steps):
        progress = spent / budget
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate(progress, step, 100)
        ids, targets = sample_batch(stream, args.tokens, window_length(step), generator)
        cut = draw_cut(seen, generator) if progress >= CUT_FROM and len(seen) else None
        with torch.autocast("cpu", torch.bfloat16, enabled=not args.fp32):
            logits, routings = model(ids, cut)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        balance = balance_loss(routings)
        optimizer.zero_grad(set_to_none=True)
        (loss + args.balance * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen = torch.cat([shares(r.top().detach()) for r in routings])
        running = 0.97 * running + 0.03 * loss.item()
        step, spent = step + 1, time.time() - start
        if step % 25 == 0:
            single = torch.cat([r.single for r in routings]).float().mean().item()
            print(
                f"step {step} loss {running:.3f} balance {balance.item():.3f} single {single:.2f} "
                f"{spent:.0f} s",
                flush=True,
            )
        if spent - saved > 120:
            saved = spent
            save()
    save()
    print(f"{step} steps, {step * args.tokens / 1e6:.2f} M tokens, {spent:.0f} s", flush=True)
    if spent >= budget:
        save_model(model, args.checkpoint / "model.safetensors")


if __name__ == "__main__":
    main()
