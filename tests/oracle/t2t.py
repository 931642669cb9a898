"""T2T-ViT with JEI-DNN's exits, stated once more in plain torch: nothing skips, masks decide.

Works on the tensors of a checkpoint under their official names, [B, N, D] throughout, and shares no
line with the runtime.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]


class Masked(NamedTuple):
    """Masked evaluation of B images by G gates.

    Attributes:
        levels: int64 [B], G for the final head.
        logits: [B, C] of that head.
        heads: [B, G + 1, C] of all of them.
        gates: [B, G], their sigmoids.
        mass: [B, G], probability of leaving at each.
    """

    levels: Tensor
    logits: Tensor
    heads: Tensor
    gates: Tensor
    mass: Tensor


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Of [B, N, D] each; scale is head_dim^-0.5."""
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def performer(state: State, name: str, x: Tensor) -> Tensor:
    """The token layer: slices k, q, v; the skip is v."""
    k, q, v = linear(state, f"{name}.kqv", norm(state, f"{name}.norm1", x, 1e-5)).chunk(3, -1)
    w = state[f"{name}.w"]

    def phi(u: Tensor) -> Tensor:
        size = u.square().sum(-1, keepdim=True) / 2
        return torch.exp(torch.einsum("btd,md->btm", u, w) - size) / math.sqrt(len(w))

    kp, qp = phi(k), phi(q)
    denominator = torch.einsum("btm,bm->bt", qp, kp.sum(1))[..., None]
    y = torch.einsum("btm,bmd->btd", qp, torch.einsum("btm,btd->bmd", kp, v))
    out = v + linear(state, f"{name}.proj", y / (denominator + 1e-8))
    inner = F.gelu(linear(state, f"{name}.mlp.0", norm(state, f"{name}.norm2", out, 1e-5)))
    return out + linear(state, f"{name}.mlp.2", inner)


def tokens(state: State, images: Tensor) -> Tensor:
    """[B, N, D] of images [B, 3, H, W]."""
    height, width = images.shape[2] // 4, images.shape[3] // 4
    x = F.unfold(images, 7, stride=4, padding=2).transpose(1, 2)
    for n in (1, 2):
        x = performer(state, f"tokens_to_token.attention{n}", x)
        image = x.transpose(1, 2).unflatten(2, (height, width))
        height, width = height // 2, width // 2
        x = F.unfold(image, 3, stride=2, padding=1).transpose(1, 2)
    return linear(state, "tokens_to_token.project", x)


def hidden(state: State, images: Tensor) -> list[Tensor]:
    """Output [B, 1 + N, D] of every block."""
    x = tokens(state, images)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]
    heads = x.shape[2] // 64
    found = []
    for i in range(sum(name.endswith("norm1.weight") for name in state if "blocks" in name)):
        block = f"blocks.{i}"
        qkv = linear(state, f"{block}.attn.qkv", norm(state, f"{block}.norm1", x, 1e-5))
        x = x + linear(state, f"{block}.attn.proj", attend(*qkv.chunk(3, -1), heads))
        inner = F.gelu(linear(state, f"{block}.mlp.fc1", norm(state, f"{block}.norm2", x, 1e-5)))
        x = x + linear(state, f"{block}.mlp.fc2", inner)
        found.append(x)
    return found


def all_heads(state: State, images: Tensor) -> Tensor:
    """Logits [B, G + 1, C] of every intermediate head, then of the final one."""
    classes = [norm(state, "norm", x, 1e-5)[:, 0] for x in hidden(state, images)]
    gates = len({name.split(".")[1] for name in state if name.startswith("gates.")})
    found = [linear(state, f"intermediate_heads.{i}", classes[i]) for i in range(gates)]
    return torch.stack([*found, linear(state, "head", classes[-1])], 1)


def features(logits: Tensor) -> Tensor:
    """The four inputs of a gate, [..., 4], of logits [..., C]."""
    p = logits.softmax(-1)
    best = p.topk(2, -1).values
    squared = p.square() / p.square().sum(-1, keepdim=True)
    entropies = [torch.special.entr(each).sum(-1) for each in (p, squared)]
    return torch.stack([best[..., 0], entropies[0], best[..., 0] - best[..., 1], entropies[1]], -1)


def compose(gates: Tensor) -> tuple[Tensor, Tensor]:
    """Level int64 [B] and mass [B, G] of gate outputs [B, G], by the official recurrence."""
    count, number = gates.shape
    levels = torch.full((count,), number)
    left, stayed = torch.ones(count), torch.ones(count)
    mass = []
    for i in range(number):
        p = torch.minimum(gates[:, i], left).clamp(min=0)
        hazard = (p / stayed).clamp(0, 1)
        levels[(levels == number) & (hazard >= 0.5)] = i
        left, stayed = left - gates[:, i], stayed * (1 - hazard)
        mass.append(p)
    return levels, torch.stack(mass, 1)


def evaluate(state: State, images: Tensor) -> Masked:
    """All heads for all images, then the gates choose."""
    heads = all_heads(state, images)
    gates = torch.stack(
        [
            torch.sigmoid(linear(state, f"gates.{i}.linear", features(heads[:, i])))[:, 0]
            for i in range(heads.shape[1] - 1)
        ],
        1,
    )
    levels, mass = compose(gates)
    return Masked(levels, heads[torch.arange(len(heads)), levels], heads, gates, mass)
