"""DynamicViT, EViT and Token Merging once more in plain torch: dense [B, N, D], a batch of images
of one length, rows in the order of the released code.

Rules as in raoyongming/DynamicViT models/dyvit.py, youweiliang/evit evit.py and
facebookresearch/ToMe tome/merge.py, over the names of a folder's tensors. Shares no line with the
runtime.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracle.t2t import State, linear, norm

EPS = 1e-6


@dataclass(frozen=True)
class Rule:
    """What leaves where.

    Attributes:
        each: block -> share of patches kept, or pairs merged.
        prefix: rows that stay.
    """

    method: Literal["dynamicvit", "evit", "tome"]
    each: dict[int, float]
    prefix: int = 1
    fuse: bool = False
    proportional: bool = True


def predict(state: State, name: str, patches: Tensor) -> Tensor:
    """DynamicViT's log-probabilities (keep, drop), [B, N, 2]; its policy is all ones."""
    x = F.gelu(linear(state, f"{name}.in", norm(state, f"{name}.in.norm", patches, EPS)))
    half = x.shape[-1] // 2
    mean = x[..., half:].mean(1, keepdim=True).expand(-1, x.shape[1], -1)
    x = torch.cat([x[..., :half], mean], -1)
    x = F.gelu(linear(state, f"{name}.out.0", x))
    x = F.gelu(linear(state, f"{name}.out.1", x))
    return F.log_softmax(linear(state, f"{name}.out.2", x), -1)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows index [B, M] of x [B, N, D]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def dynamicvit(state: State, name: str, x: Tensor, keep: float, prefix: int, began: int) -> Tensor:
    score = predict(state, name, x[:, prefix:])[..., 0]
    order = score.argsort(dim=1, descending=True)[:, : int(began * keep)]
    return torch.cat([x[:, :prefix], take(x[:, prefix:], order)], 1)


def evit(x: Tensor, shares: Tensor, keep: float, prefix: int, fuse: bool) -> Tensor:
    """Of attention [B, heads, N, N]."""
    patches, attention = x[:, prefix:], shares[:, :, 0, prefix:].mean(1)
    count = math.ceil(keep * patches.shape[1])
    if count == patches.shape[1]:
        return x
    order = attention.argsort(dim=1, descending=True)
    kept, rest = order[:, :count], order[:, count:]
    parts = [x[:, :prefix], take(patches, kept)]
    if fuse:
        weights = attention.gather(1, rest)[..., None]
        parts.append((take(patches, rest) * weights).sum(1, keepdim=True))
    return torch.cat(parts, 1)


def tome(x: Tensor, metric: Tensor, size: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Of keys [B, N, d] averaged over heads and sizes [B, N, 1]; one image after the other."""
    r = min(r, (x.shape[1] - prefix) // 2)
    if r <= 0:
        return x, size
    images = [_merge(*image, r, prefix) for image in zip(x, metric, size, strict=True)]
    return torch.stack([new for new, _ in images]), torch.stack([new for _, new in images])


def _merge(x: Tensor, metric: Tensor, size: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[::2] @ metric[1::2].T
    for i in range(prefix):
        if i % 2:
            scores[:, i // 2] = -math.inf
        else:
            scores[i // 2] = -math.inf
    best, to = scores.max(-1)
    leaving = set(best.argsort(descending=True)[:r].tolist())
    total, mass = x * size, size.clone()
    for a in sorted(leaving):
        b = 2 * int(to[a]) + 1
        total[b] += x[2 * a] * size[2 * a]
        mass[b] += size[2 * a]
    mean = total / mass
    stays = [2 * a for a in range(len(scores)) if a not in leaving]
    odd = list(range(1, len(x), 2))
    first = [i for i in stays + odd if i < prefix]
    order = [*sorted(first), *(i for i in stays if i >= prefix), *(i for i in odd if i >= prefix)]
    return mean[order], mass[order]


def blocks(state: State, x: Tensor, heads: int, layers: int, rule: Rule | None = None) -> Tensor:
    """Rows [B, N', D] after all blocks of [B, N, D]."""
    size = torch.ones_like(x[..., :1])
    began, number = x.shape[1] - (rule.prefix if rule else 0), 0
    for i in range(layers):
        attn, mlp = f"layers.{i}.attn", f"layers.{i}.mlp"
        each = rule.each.get(i) if rule is not None else None
        if rule is not None and each is not None and rule.method == "dynamicvit":
            x = dynamicvit(state, f"reduce.{number}", x, each, rule.prefix, began)
            number += 1
        qkv = linear(state, f"{attn}.qkv", norm(state, f"{attn}.norm", x, EPS))
        q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        if rule is not None and rule.method == "tome" and rule.proportional:
            scores = scores + size.log()[:, None, None, :, 0]
        shares = scores.softmax(-1)
        x = x + linear(state, f"{attn}.o", (shares @ v).transpose(1, 2).flatten(2))
        if rule is not None and each is not None and rule.method == "evit":
            x = evit(x, shares, each, rule.prefix, rule.fuse)
        if rule is not None and each is not None and rule.method == "tome":
            x, size = tome(x, k.mean(1), size, int(each), rule.prefix)
        inner = F.gelu(linear(state, f"{mlp}.up", norm(state, f"{mlp}.norm", x, EPS)))
        x = x + linear(state, f"{mlp}.down", inner)
    return x
