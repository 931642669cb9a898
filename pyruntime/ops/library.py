"""The ops as torch sees them: ``torch.ops.pyruntime.*``, registered when this module is imported.

For ``torch.compile`` and ``torch.export``. No argument is mutated, and because a compiled program
needs sizes that depend on shapes alone, every packed tensor has ``capacity`` rows (N, or N * k for
``plan_topk``) of which the first ``offsets[S]`` count; beyond, ``rows`` is -1 and the rest is 0 (on
a GPU: unspecified). Only rows that count are computed. Meaning and errors are those of
`pyruntime.ops.reference`; there is no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, cast

import torch
from torch import Tensor
from torch.library import Library, infer_schema, register_fake

from pyruntime import ops
from pyruntime.errors import InvalidInput
from pyruntime.ops.reference.patches import grid
from pyruntime.ops.topk import GroupScore, Score, TopK
from pyruntime.ops.weight import PAIRED, Weight
from pyruntime.plan import Plan

_LIBRARY = Library("pyruntime", "DEF")  # the registration lives as long as this object
_Function = Callable[..., Any]


def _op(fake: _Function) -> Callable[[_Function], _Function]:
    """Define an op named and typed as the function; ``fake`` makes its results without values."""

    def register(function: _Function) -> _Function:
        name = function.__name__
        schema = infer_schema(function, op_name=name, mutates_args=())
        _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        register_fake(f"pyruntime::{name}", fake, lib=_LIBRARY)
        return function

    return register


def _fake_index(like: Tensor, capacity: int, segments: int, choices: int) -> tuple[Tensor, ...]:
    sizes = [(capacity,), (segments + 1,), (capacity // choices, choices)]
    return tuple(like.new_empty(size, dtype=torch.int32) for size in sizes)


def _index(plan: Plan, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = plan.rows.new_full((capacity,), -1)
    rows[: plan.rows.shape[0]] = plan.rows
    return rows, plan.offsets.clone(), plan.inverse.clone()  # a planner's tensors share memory


def _packed_weights(plan: Plan, capacity: int) -> Tensor:
    weights = plan.rows.new_zeros(capacity, dtype=torch.float32)
    count = plan.rows.shape[0]
    weights[:count] = 1.0 if plan.weights is None else plan.weights
    return weights


def _plan(
    rows: Tensor, offsets: Tensor, num_rows: int, inverse: Tensor, weights: Tensor | None = None
) -> Plan:
    kept = int(offsets[-1]) if rows.is_cpu else rows.shape[0]
    weights = None if weights is None else weights[:kept]
    return Plan(rows[:kept], offsets, weights, inverse, num_rows, rows.shape[0])


def _pad(packed: Tensor, capacity: int) -> Tensor:
    if packed.shape[0] == capacity:
        return packed
    return torch.cat([packed, packed.new_zeros(capacity - packed.shape[0], *packed.shape[1:])])


@_op(lambda scores, tau: (*_fake_index(scores, scores.shape[0], 1, 1), torch.empty_like(scores)))
def plan_threshold(scores: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(rows [N], offsets [2], inverse [N, 1], weights [N]: the scores of the kept rows)."""
    plan = ops.plan_threshold(scores.contiguous(), tau.contiguous())
    rows, offsets, inverse = _index(plan, scores.shape[0])
    weights = torch.where(rows >= 0, scores[rows.clamp(min=0).long()], 0.0)
    return rows, offsets, inverse, weights


@_op(
    lambda logits, k, *_, **__: (
        *_fake_index(logits, logits.shape[0] * k, logits.shape[1], k),
        logits.new_empty(logits.shape[0] * k),
    )
)
def plan_topk(
    logits: Tensor,
    k: int,
    selection_bias: Tensor | None = None,
    limits: Tensor | None = None,
    score: str = "none",
    over_chosen: bool = False,
    normalize: bool = False,
    epsilon: float = 0.0,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    round_weights: bool = False,
    renormalize_used: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(rows [N * k], offsets [S + 1], inverse [N, k], weights [N * k]); see `TopK`."""
    rule = TopK(
        k,
        cast(Score, score),
        over_chosen,
        normalize,
        epsilon,
        scale,
        groups,
        top_groups,
        cast(GroupScore, group_score),
        round_weights,
        renormalize_used,
    )
    bias = None if selection_bias is None else selection_bias.contiguous()
    cuts = None if limits is None else limits.contiguous()
    plan = ops.plan_topk(logits.contiguous(), rule, bias, cuts)
    return *_index(plan, logits.shape[0] * k), _packed_weights(plan, logits.shape[0] * k)


@_op(
    lambda labels, segments, weights=None: (
        *_fake_index(labels, labels.numel(), segments, labels.shape[1] if labels.dim() == 2 else 1),
        labels.new_empty(labels.numel(), dtype=torch.float32),
    )
)
def plan_partition(
    labels: Tensor, segments: int, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of labels [N] or [N, K]: rows, offsets [segments + 1], inverse [N, K], weights or 1."""
    given = None if weights is None else weights.contiguous()
    plan = ops.plan_partition(labels.contiguous(), segments, given)
    return *_index(plan, labels.numel()), _packed_weights(plan, labels.numel())


@_op(lambda scores, q: scores.new_empty(()))
def quantile(scores: Tensor, q: float) -> Tensor:
    """Float32 []."""
    return ops.quantile(scores.contiguous(), q)


@_op(lambda x, rows, offsets: x.new_empty(rows.shape[0], *x.shape[1:]))
def gather(x: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    """x [N, ...] to packed rows [capacity, ...]: any rank, so it is a functional compact too."""
    flat = x.contiguous().view(x.shape[0], prod(x.shape[1:]))
    packed = ops.gather(flat, _plan(rows, offsets, x.shape[0], rows[:, None]))
    return _pad(packed.view(packed.shape[0], *x.shape[1:]), rows.shape[0])


@_op(lambda packed, rows, offsets, inverse, base, *_: base.new_empty(base.shape))
def combine(
    packed: Tensor,
    rows: Tensor,
    offsets: Tensor,
    inverse: Tensor,
    base: Tensor,
    weights: Tensor | None = None,
    channel_weights: Tensor | None = None,
) -> Tensor:
    """base [N, H] plus the weighted packed rows [capacity, H] of each of its rows, [N, H]."""
    plan = _plan(rows, offsets, base.shape[0], inverse, weights)
    out = base.clone(memory_format=torch.contiguous_format)
    factor = None if channel_weights is None else channel_weights.contiguous()
    return ops.combine(packed[: plan.rows.shape[0]].contiguous(), plan, out, factor)


@_op(
    lambda x, weight, bias, eps, rows=None, out_dtype=None, epilogue="none": x.new_empty(
        (x if rows is None else rows).shape[0], x.shape[1], dtype=out_dtype or x.dtype
    )
)
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    rows: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    epilogue: str = "none",
) -> Tensor:
    """x [N, H], or its ``rows`` [R], centred and scaled."""
    at = None if rows is None else rows.contiguous()
    return ops.layer_norm(
        x.contiguous(), weight.contiguous(), bias.contiguous(), eps, at, out_dtype, epilogue
    )


def _fake_patches(
    images: Tensor,
    size: int,
    stride: int,
    padding: int = 0,
    channels_last: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    count, channels, down, across = grid(images, size, stride, padding, channels_last)
    shape = (count * down * across, channels * size * size)
    return images.new_empty(shape, dtype=out_dtype or images.dtype)


@_op(_fake_patches)
def patches(
    images: Tensor,
    size: int,
    stride: int,
    padding: int = 0,
    channels_last: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """[B, C, H, W], or [B, H, W, C] if channels_last, as [B * down * across, C * size * size]."""
    return ops.patches(
        images.contiguous(), size, stride, padding, channels_last=channels_last,
        out_dtype=out_dtype,
    )  # fmt: skip


def _fake_product(
    x: Tensor,
    weight: Tensor,
    out_features: int,
    in_features: int,
    offsets: Tensor | None = None,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    epilogue: str = "none",
    out_dtype: torch.dtype | None = None,
    *_: object,
) -> Tensor:
    width = out_features // 2 if epilogue in PAIRED else out_features
    return x.new_empty((x if rows is None else rows).shape[0], width, dtype=out_dtype or x.dtype)


@_op(_fake_product)
def segment_matmul(
    x: Tensor,
    weight: Tensor,
    out_features: int,
    in_features: int,
    offsets: Tensor | None = None,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    epilogue: str = "none",
    out_dtype: torch.dtype | None = None,
    alpha: float = 1.702,
    limit: float = 7.0,
    scale: Tensor | None = None,
) -> Tensor:
    """Packed rows [capacity, K], or with ``rows`` those of x [N, K], times a `Weight`'s data.

    Without offsets every row of x runs. Epilogues of a pair take a `Weight.pack_gate_up`, int8
    panels their scale.
    """
    if offsets is None and rows is not None:
        raise InvalidInput("segment_matmul: rows need offsets")
    layout = "dense" if weight.dim() == 3 else "panel"
    matrices = Weight(weight, out_features, in_features, layout, epilogue in PAIRED, scale)
    capacity, plan = (x if rows is None else rows).shape[0], None
    if offsets is not None:
        index = offsets.new_empty(capacity) if rows is None else rows
        plan = _plan(index, offsets, x.shape[0], index[:, None])
        x = x[: plan.rows.shape[0]] if rows is None else x
    out = ops.segment_matmul(
        x.contiguous(), matrices, plan, gather=rows is not None, epilogue=epilogue, bias=bias,
        out_dtype=out_dtype, alpha=alpha, limit=limit,
    )  # fmt: skip
    return _pad(out, capacity)


@_op(lambda q, *_, **__: torch.empty_like(q, memory_format=torch.contiguous_format))
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
    """[Tq, heads * D]; see `pyruntime.ops.reference.attention_varlen`."""
    bias = None if key_bias is None else key_bias.contiguous()
    return ops.attention_varlen(q, k, v, cu_q, cu_k, heads, scale, bias)


# Registered in files of their own, with what is defined above.
from pyruntime.ops import library_embed, library_exit  # noqa: E402, F401
