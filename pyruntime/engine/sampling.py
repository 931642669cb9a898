"""Logits to token ids. A row's token depends on its own logits, parameters and generator only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyruntime.engine.request import SamplingParams

_GROUP_ELEMENTS = 1 << 16


def make_generator(params: SamplingParams) -> torch.Generator | None:
    """The private random source of a request; None when it is greedy and draws nothing."""
    if params.greedy:
        return None
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    return generator


def sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    generators: Sequence[torch.Generator | None],
) -> list[int]:
    """Token ids, one a row. logits f32 [M,V]; params and generators M each (a draw advances one).

    Raises ValueError when a sampled row has no probability mass (NaN logits).
    """
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    random = [i for i, g in enumerate(generators) if g is not None]
    # A few rows at a time, so that the passes over them stay in the processor's cache.
    group = max(1, _GROUP_ELEMENTS // logits.shape[1])
    for rows in (random[i : i + group] for i in range(0, len(random), group)):
        drawn = _draw(
            logits[rows].float(), [params[i] for i in rows], [generators[i] for i in rows]
        )
        for i, token in zip(rows, drawn, strict=True):
            tokens[i] = token
    return tokens


def _draw(
    logits: Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator | None]
) -> list[int]:
    device = logits.device
    temperature = torch.tensor([[p.temperature] for p in params], device=device)
    # Subtracting the maximum first keeps tiny temperatures finite.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    _keep_top_k(logits, [p.top_k for p in params])
    probs = logits.softmax(dim=-1)
    _keep_top_p(probs, [p.top_p for p in params])
    # Inverse transform over the vocabulary in its own order: ties and filters cannot reorder it.
    # In float64 a draw below 1 times the total stays below the total, so a token always exists.
    cdf = probs.double().cumsum(dim=-1)
    draws = [torch.rand(1, generator=g, dtype=torch.float64) for g in generators]
    target = torch.stack(draws).to(device) * cdf[:, -1:]
    tokens: list[int] = torch.searchsorted(cdf, target, right=True).squeeze(-1).tolist()
    if max(tokens) >= logits.shape[-1]:
        raise ValueError("sample: a row's logits are not finite")
    return tokens


def _keep_top_k(logits: Tensor, top_k: Sequence[int]) -> None:
    """Masks in place all below the k-th largest logit; ties with it stay."""
    vocab = logits.shape[-1]
    rows = [i for i, k in enumerate(top_k) if 0 < k < vocab]
    if not rows:
        return
    largest = logits[rows].topk(max(top_k[i] for i in rows), dim=-1).values
    kth = torch.tensor([[top_k[i] - 1] for i in rows], device=logits.device)
    floor = torch.full_like(logits[:, :1], float("-inf"))
    floor[rows] = largest.gather(1, kth)
    logits.masked_fill_(logits < floor, float("-inf"))


def _keep_top_p(probs: Tensor, top_p: Sequence[float]) -> None:
    """Zeroes in place all below the smallest probability of the nucleus; ties with it stay."""
    for row, p in zip(probs, top_p, strict=True):
        if p == 1:
            continue
        # All entries below (1-p)/V together weigh less than 1-p: the nucleus lies above, and only
        # that part is sorted. Half the bound leaves room for rounding.
        head = row[row >= (1 - p) / len(row) / 2].sort(descending=True).values
        before = head.cumsum(dim=0) - head
        last = max(int((before < p).sum()), 1) - 1
        row.masked_fill_(row < head[last], 0)
