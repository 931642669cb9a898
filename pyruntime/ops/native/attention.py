"""Rotary embedding, the paged cache, and attention over it."""

from __future__ import annotations

import torch
from torch import Tensor

from pyruntime.ops.native.binding import check_float, cpu


def rotate(
    q: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    rows: Tensor | None,
    head_dim: int,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Rotary embedding of queries in place; see `pyruntime.ops.reference.rotate`."""
    code = check_float("rotate", "q", q, 2)
    cpu.rotate(
        q.data_ptr(),
        cos_sin.data_ptr(),
        0 if norm is None else norm.data_ptr(),
        positions.data_ptr(),
        0 if rows is None else rows.data_ptr(),
        q.shape[0],
        q.shape[1] // head_dim,
        head_dim,
        eps,
        code,
    )
    return q


def append(
    kv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    head_dim: int,
    key_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """New keys and values into the cache; see `pyruntime.ops.reference.append`."""
    code = check_float("append", "kv", kv, 2)
    cpu.append(
        kv.data_ptr(),
        cos_sin.data_ptr(),
        0 if key_norm is None else key_norm.data_ptr(),
        positions.data_ptr(),
        slots.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        kv.shape[0],
        kv.shape[1] // (2 * head_dim),
        head_dim,
        eps,
        code,
    )


def attention(
    q: Tensor,
    rows: Tensor | None,
    positions: Tensor,
    sequences: Tensor,
    block_tables: Tensor,
    keys: Tensor,
    values: Tensor,
    head_dim: int,
    scale: float,
) -> Tensor:
    """Causal attention over the paged cache; see `pyruntime.ops.reference.attention`."""
    code = check_float("attention", "q", q, 2)
    out = torch.empty_like(q)
    cpu.attention(
        q.data_ptr(),
        0 if rows is None else rows.data_ptr(),
        positions.data_ptr(),
        sequences.data_ptr(),
        block_tables.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        out.data_ptr(),
        q.shape[0],
        q.shape[1] // head_dim,
        keys.shape[1],
        head_dim,
        block_tables.shape[1],
        scale,
        code,
    )
    return out
