"""One MoE layer, the same for every engine: weights, inputs, routing, reference, cold-cache timing.

Needs torch alone: peers import it from their own environments, bench_moe from ours.

The layer is Qwen3-MoE's: logits = x W_r^T, softmax, k largest, renormalised; an expert is
down(silu(gate x) * up x). What is routed where is part of the input, not of chance: the first E
columns of x hold the wanted logits (over SCALE, a power of two) and W_r is SCALE times the identity
on these columns, so that every engine finds exactly the same logits whatever its precision and
order of summation. The logits are a fixed log-probability per expert plus Gumbel noise, which draws
k experts without replacement: equally likely ones, or a Zipf law.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE = 4.0
ZIPF = 1.2
TOLERANCE = {"bfloat16": 0.02, "float32": 0.001, "float16": 0.01, "int8": 0.04, "q8_0": 0.04}

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Shape:
    """E experts of which k run per token, H hidden, I inner features."""

    experts: int
    top_k: int
    hidden: int
    inner: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From "ExkxHxI"."""
        return cls(*map(int, text.split("x")))

    def __str__(self) -> str:
        return f"{self.experts}x{self.top_k}x{self.hidden}x{self.inner}"

    @property
    def expert_values(self) -> int:
        """Weights of one expert: gate, up and down."""
        return 3 * self.hidden * self.inner

    @property
    def router_values(self) -> int:
        """Weights of the router."""
        return self.experts * self.hidden

    def tiny(self) -> Shape:
        """A layer of the same code and next to no weights."""
        return Shape(self.experts, self.top_k, 128, 64)

    def macs(self, slots: int, tokens: int) -> int:
        """Multiply-accumulates of `slots` token-expert pairs and the router."""
        return slots * self.expert_values + tokens * self.router_values


SHAPES = (Shape(64, 8, 2048, 768), Shape(8, 2, 2048, 4096), Shape(32, 4, 1024, 512))


@dataclass(frozen=True, slots=True)
class Weights:
    """gate and up [E, I, H], down [E, H, I], router [E, H]; bfloat16."""

    gate: Tensor
    up: Tensor
    down: Tensor
    router: Tensor

    @classmethod
    def random(cls, shape: Shape, seed: int = 0) -> Weights:
        """Normal, scaled so that activations keep their size; the same in every process."""
        random = torch.Generator().manual_seed(seed)
        e, h, i = shape.experts, shape.hidden, shape.inner

        def normal(*size: int) -> Tensor:
            data = torch.empty(size, dtype=torch.bfloat16)
            return data.normal_(std=1 / math.sqrt(size[-1]), generator=random)

        router = torch.zeros(e, h, dtype=torch.bfloat16)
        router[:, :e] = SCALE * torch.eye(e)
        return cls(normal(e, i, h), normal(e, i, h), normal(e, h, i), router)


def inputs(shape: Shape, tokens: int, routing: str, seed: int = 0) -> Tensor:
    """Input bfloat16 [T, H] whose first columns steer it: routing "uniform" or "zipf"."""
    random = torch.Generator().manual_seed(1000 * seed + tokens)
    chances = torch.ones(shape.experts)
    if routing == "zipf":
        ranks = torch.randperm(shape.experts, generator=torch.Generator().manual_seed(5))
        chances = (1.0 + ranks) ** -ZIPF
    elif routing != "uniform":
        raise ValueError(f"routing is uniform or zipf, not {routing}")
    steer = torch.empty(tokens, shape.experts, dtype=torch.bfloat16)
    todo = torch.ones(tokens, dtype=torch.bool)
    while todo.any():  # no ties at the cut: whoever ranks them must find the same experts
        noise = torch.rand(int(todo.sum()), shape.experts, generator=random).clamp_(min=1e-9)
        logits = chances.log() - torch.log(-torch.log(noise))
        steer[todo] = (logits / SCALE).bfloat16()
        best = steer.float().sort(dim=1, descending=True).values
        todo = best[:, shape.top_k - 1] == best[:, min(shape.top_k, shape.experts - 1)]
        todo &= shape.top_k < shape.experts
    x = torch.randn(tokens, shape.hidden, generator=random).bfloat16()
    x[:, : shape.experts] = steer
    return x


def route(shape: Shape, router: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Experts int64 [T, k], best first, and their weights float32 [T, k]."""
    shares = torch.softmax(F.linear(x.float(), router.float()), dim=-1)
    best, ids = torch.topk(shares, shape.top_k, dim=-1)
    return ids, best / best.sum(dim=-1, keepdim=True)


def reference(shape: Shape, weights: Weights, x: Tensor, kept: Tensor | None = None) -> Tensor:
    """The layer in float32 [T, H]; kept bool [T, k] cuts choices off without renormalising."""
    ids, shares = route(shape, weights.router, x)
    if kept is not None:
        shares = shares * kept
    out, x = torch.zeros(x.shape), x.float()
    for expert in ids.unique().tolist():
        rows, slots = torch.where(ids == expert)
        gate = F.linear(x[rows], weights.gate[expert].float())
        inner = F.silu(gate) * F.linear(x[rows], weights.up[expert].float())
        part = F.linear(inner, weights.down[expert].float())
        out.index_add_(0, rows, part * shares[rows, slots, None])
    return out


def error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest wanted value."""
    return float((found.float() - wanted).abs().max() / wanted.abs().max())


def touched(shape: Shape, tokens: int, routing: str, calls: int) -> dict[str, float]:
    """Of one call, on average: distinct experts, and the most loaded one's share over the mean."""
    experts, imbalance = [], []
    router = torch.zeros(shape.experts, shape.hidden)
    router[:, : shape.experts] = SCALE * torch.eye(shape.experts)
    for seed in range(calls):
        ids, _ = route(shape, router, inputs(shape, tokens, routing, seed))
        load = ids.flatten().bincount(minlength=shape.experts)
        experts.append(int((load > 0).sum()))
        imbalance.append(float(load.max()) / (tokens * shape.top_k / shape.experts))
    return {"experts": sum(experts) / calls, "imbalance": sum(imbalance) / calls}


class Flush:
    """Empties the caches: reads memory of three times the last level, by torch's own threads."""

    def __init__(self) -> None:
        self._data = torch.ones(3 * last_level_bytes() // 8, dtype=torch.int64)

    def __call__(self) -> None:
        self._data.sum()


def last_level_bytes() -> int:
    """Size of the largest cache of the first core; 32 MiB where the system does not say."""
    found = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found.append(int(path.read_text().strip().removesuffix("K")) << 10)
    return max(found)


def time_calls(
    prepare: Callable[[Tensor], Call],
    examples: list[Tensor],
    flush: Callable[[], None],
    warm: Callable[[], object],
) -> list[float]:
    """Seconds of one call per example: weights out of the caches, code in, input just written.

    `warm` runs a tiny layer of its own, so that the interpreter, the libraries and the threads are
    as awake as between two layers of a model.
    """
    seconds = []
    for example in examples:
        flush()
        warm()
        call = prepare(example)
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds
