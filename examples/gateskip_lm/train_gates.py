"""Wrap the base model's branches in GateSkip gates and fine-tune everything.

One checkpoint has to serve every budget, so each step draws its own skip ratio q ~ U(0, q_max),
q_max rising from 0 to 0.6 over the first half of training. (The official job raises one fixed
ratio from 0 to 0.2 only.) Skipping is hard from the start, by batch quantile, as at inference.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from data import HERE, load_corpus, sample_batch
from model import Config, Llama
from rules import batch_quantile
from train import schedule, window_length

Q_MAX = 0.6


class TrainingRule:
    """batch_quantile that also notes how far apart the scores of each branch lie, for the log."""

    def __init__(self, q: float) -> None:
        self.rule = batch_quantile(q)
        self.means: list[float] = []
        self.spreads: list[float] = []

    def __call__(self, branch: int, scores: Tensor, valid: Tensor) -> Tensor:
        self.means.append(scores[valid].mean().item())
        self.spreads.append(scores[valid].std().item())
        return self.rule(branch, scores, valid)

    def summary(self) -> str:
        count = max(1, len(self.means))
        return (
            f"gate {sum(self.means) / count:.3f} (branches {min(self.means):.2f}"
            f"..{max(self.means):.2f}) spread {sum(self.spreads) / count:.3f} "
            f"(least {min(self.spreads):.4f})"
        )


def save(model: nn.Module, kind: str, path: Path) -> None:
    """GateSkip's own format: a flat state dict without any configuration. Tied lm_head left out.

    Scalar gates are a few hundred numbers and stay fp32; everything else is bf16.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        keep = kind == "scalar" and ".gate.gate." in name
        state[name] = tensor.detach().to(torch.float32 if keep else torch.bfloat16).clone()
    torch.save(state, path)
    # The checkpoint alone does not say which variant it holds; this file does.
    sidecar = {
        "base_model": "base",
        "gate_type": kind,
        "shared": False,
        "gating_mode": "after_module",
        "actually_gate": True,
        "gate_attention": True,
        "gate_mlp": True,
        "rule": "batch_quantile",
        "skip_ratio": 0.25,
        "kv_mode": "dense",
    }
    path.with_suffix(".json").write_text(json.dumps(sidecar, indent=2) + "\n")


def optimizer_for(model: nn.Module, lr: float, gate_lr: float, bias_lr: float) -> torch.optim.AdamW:
    """The backbone moves slowly; gates start as constants and must travel far in few steps."""
    groups: dict[str, list[nn.Parameter]] = {"matrix": [], "norm": [], "gate": [], "bias": []}
    for name, parameter in model.named_parameters():
        if ".gate.gate." in name:
            groups["bias" if name.endswith("bias") else "gate"].append(parameter)
        else:
            groups["matrix" if parameter.dim() == 2 else "norm"].append(parameter)
    rates = {"matrix": lr, "norm": lr, "gate": gate_lr, "bias": bias_lr}
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": rates[key],
                "peak": rates[key],
                "weight_decay": 0.1 if key == "matrix" else 0.0,
            }
            for key, parameters in groups.items()
        ],
        betas=(0.9, 0.95),
        fused=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gates", choices=("scalar", "vector"), required=True)
    parser.add_argument("--base", type=Path, default=HERE / "base")
    parser.add_argument("--weights", type=Path, default=HERE / "work" / "base_weights")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per step")
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--gate-lr", type=float, default=3e-3)
    parser.add_argument("--bias-lr", type=float, default=2e-2)
    parser.add_argument("--gate-weight", type=float, default=0.1, help="λ of the gate loss")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(2)
    stream = torch.cat(load_corpus(args.base)[0])
    model = Llama(Config.load(args.base / "config.json"))
    model.load_state_dict(load_file(str(args.weights / "model.safetensors")))
    model.add_gates(args.gates)
    optimizer = optimizer_for(model, args.lr, args.gate_lr, args.bias_lr)
    path = args.out / f"gateskip_{args.gates}.pt"
    args.out.mkdir(parents=True, exist_ok=True)

    start, running, dense = time.time(), 0.0, 0.0
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, args.steps, 40)
        q_max = Q_MAX * min(1.0, 2 * step / args.steps)
        q = q_max * torch.rand((), generator=generator).item()
        rule = TrainingRule(q)
        ids, targets = sample_batch(stream, args.tokens, window_length(step), generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits, squares = model(ids, rule)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        gate_loss = torch.stack(squares).mean()
        optimizer.zero_grad(set_to_none=True)
        (loss + args.gate_weight * gate_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running = loss.item() if step == 0 else 0.95 * running + 0.05 * loss.item()
        if q < 0.1:
            dense = loss.item() if dense == 0.0 else 0.8 * dense + 0.2 * loss.item()
        if step % 25 == 0 or step == args.steps - 1:
            print(
                f"step {step} q {q:.2f} loss {running:.3f} (q<.1: {dense:.3f}) "
                f"{rule.summary()} {time.time() - start:.0f} s",
                flush=True,
            )
        if step % 100 == 99 or step == args.steps - 1:
            save(model, args.gates, path)


if __name__ == "__main__":
    main()
