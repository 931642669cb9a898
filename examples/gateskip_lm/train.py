"""Train the base model (a plain Llama) on the standard library's source."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from data import HERE, load_corpus, sample_batch
from model import Config, Llama


def schedule(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine down to 3 % of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * progress))


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


def save(model: nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: t.detach().to(torch.bfloat16) for name, t in model.state_dict().items()}
    save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=HERE / "base")
    parser.add_argument("--out", type=Path, default=HERE / "work" / "base_weights")
    parser.add_argument("--steps", type=int, default=1750)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fp32", action="store_true", help="no bf16 autocast")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    config = Config.load(args.base / "config.json")
    stream = torch.cat(load_corpus(args.base)[0])
    model = Llama(config)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, 0.1), lr=args.lr, betas=(0.9, 0.95), fused=True
    )
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:.3f} M parameters, {len(stream) / 1e6:.2f} M training tokens", flush=True)

    start, running = time.time(), 0.0
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * schedule(step, args.steps, 100)
        ids, targets = sample_batch(stream, args.tokens, window_length(step), generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=not args.fp32):
            logits, _ = model(ids)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running = loss.item() if step == 0 else 0.95 * running + 0.05 * loss.item()
        if step % 25 == 0 or step == args.steps - 1:
            rate = (step + 1) * args.tokens / (time.time() - start)
            print(
                f"step {step} loss {running:.3f} {rate:.0f} tok/s {time.time() - start:.0f} s",
                flush=True,
            )
        if step % 200 == 199 or step == args.steps - 1:
            save(model, args.out)


if __name__ == "__main__":
    main()
