"""The handful of operations that execute any Plan.

Every op exists as `pyruntime.ops.reference` (torch, the specification), `pyruntime.ops.native`
(C++) and, for the ops of the plan itself, `pyruntime.ops.cuda`; `backend` picks by device and the
functions here pick by their first argument. Their documentation is the reference's.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from pyruntime.ops.backend import backend
from pyruntime.ops.exit import ExitHead, ExitRule
from pyruntime.ops.pixels import Pixels
from pyruntime.ops.topk import TopK
from pyruntime.ops.weight import Weight
from pyruntime.plan import Plan

__all__ = [
    "ExitHead",
    "ExitRule",
    "Pixels",
    "TopK",
    "Weight",
    "attention_varlen",
    "backend",
    "combine",
    "compact",
    "embed_patches",
    "gather",
    "gather_patches",
    "layer_norm",
    "patches",
    "plan_exit",
    "plan_partition",
    "plan_threshold",
    "plan_topk",
    "quantile",
    "segment_matmul",
]


def plan_threshold(scores: Tensor, tau: Tensor, weighted: bool = False) -> Plan:
    """See `pyruntime.ops.reference.plan_threshold`."""
    return cast(Plan, backend(scores.device).plan_threshold(scores, tau, weighted))


def plan_topk(
    logits: Tensor,
    rule: TopK,
    selection_bias: Tensor | None = None,
    limits: Tensor | None = None,
) -> Plan:
    """See `pyruntime.ops.reference.plan_topk`."""
    return cast(Plan, backend(logits.device).plan_topk(logits, rule, selection_bias, limits))


def plan_exit(
    x: Tensor,
    rule: ExitRule,
    state: Tensor,
    limits: Tensor,
    head: ExitHead | None = None,
    rows: Tensor | None = None,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor, Plan]:
    """See `pyruntime.ops.reference.plan_exit`."""
    ops = backend(x.device)
    return cast(
        tuple[Tensor, Tensor, Plan],
        ops.plan_exit(x, rule, state, limits, head, rows, total),
    )


def plan_partition(labels: Tensor, segments: int, weights: Tensor | None = None) -> Plan:
    """See `pyruntime.ops.reference.plan_partition`."""
    return cast(Plan, backend(labels.device).plan_partition(labels, segments, weights))


def quantile(scores: Tensor, q: float) -> Tensor:
    """See `pyruntime.ops.reference.quantile`."""
    return cast(Tensor, backend(scores.device).quantile(scores, q))


def gather(x: Tensor, plan: Plan, out: Tensor | None = None) -> Tensor:
    """See `pyruntime.ops.reference.gather`."""
    return cast(Tensor, backend(x.device).gather(x, plan, out))


def compact(x: Tensor, plan: Plan) -> Tensor:
    """See `pyruntime.ops.reference.compact`."""
    return cast(Tensor, backend(x.device).compact(x, plan))


def combine(
    packed: Tensor, plan: Plan, out: Tensor, channel_weights: Tensor | None = None
) -> Tensor:
    """See `pyruntime.ops.reference.combine`."""
    return cast(Tensor, backend(packed.device).combine(packed, plan, out, channel_weights))


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    rows: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    epilogue: str = "none",
) -> Tensor:
    """See `pyruntime.ops.reference.layer_norm`."""
    ops = backend(x.device)
    return cast(Tensor, ops.layer_norm(x, weight, bias, eps, rows, out_dtype, epilogue))


def patches(
    images: Tensor,
    size: int,
    stride: int,
    padding: int = 0,
    *,
    channels_last: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """See `pyruntime.ops.reference.patches`."""
    ops = backend(images.device)
    return cast(
        Tensor,
        ops.patches(
            images, size, stride, padding, channels_last=channels_last, out_dtype=out_dtype
        ),
    )


def gather_patches(
    pixels: Pixels,
    places: Tensor,
    size: int,
    resize: str = "area",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """See `pyruntime.ops.reference.gather_patches`."""
    ops = backend(pixels.data.device)
    return cast(Tensor, ops.gather_patches(pixels, places, size, resize, out_dtype))


def embed_patches(
    pixels: Pixels,
    places: Tensor,
    weight: Weight,
    bias: Tensor | None,
    *,
    size: int,
    resize: str = "area",
    positions: Tensor | None = None,
    position_rows: Tensor | None = None,
    epilogue: str = "none",
    out: Tensor,
    out_rows: Tensor | None = None,
) -> Tensor:
    """See `pyruntime.ops.reference.embed_patches`."""
    ops = backend(pixels.data.device)
    return cast(
        Tensor,
        ops.embed_patches(
            pixels, places, weight, bias, size=size, resize=resize, positions=positions,
            position_rows=position_rows, epilogue=epilogue, out=out, out_rows=out_rows,
        ),
    )  # fmt: skip


def segment_matmul(
    x: Tensor,
    weight: Weight,
    plan: Plan | None = None,
    *,
    gather: bool = False,
    epilogue: str = "none",
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    alpha: float = 1.702,
    limit: float = 7.0,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """See `pyruntime.ops.reference.segment_matmul`."""
    ops = backend(x.device)
    return cast(
        Tensor,
        ops.segment_matmul(
            x, weight, plan, gather=gather, epilogue=epilogue, bias=bias, out_dtype=out_dtype,
            alpha=alpha, limit=limit, out=out, accumulate=accumulate,
        ),
    )  # fmt: skip


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    heads: int,
    scale: float,
    key_bias: Tensor | None = None,
) -> Tensor:
    """See `pyruntime.ops.reference.attention_varlen`."""
    ops = backend(q.device)
    return cast(Tensor, ops.attention_varlen(q, k, v, cu_q, cu_k, heads, scale, key_bias))
