"""Rotary embedding, the paged cache, and attention over it.

Shapes and types are checked; the indices (rows, positions, slots, sequences, block_tables) come
from the engine's own bookkeeping and are trusted: reading them all would cost more than the op.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.ops.native.binding import F32, I32, check, check_float, cpu, refuse

_BLOCK = 32  # kBlock and kHeadPad of csrc/ops.h


def _check_type(op: str, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """`check` without rank and device, for tensors whose number of elements is compared next."""
    if tensor.dtype is not dtype or not tensor.is_contiguous():
        raise refuse(op, name, f"a contiguous {dtype} tensor", tensor)


def _check_heads(op: str, width: int, cos_sin: Tensor, norm: Tensor | None, head_dim: int) -> None:
    if head_dim < 1 or width % head_dim:
        raise InvalidInput(f"{op}: {width} columns are not heads of {head_dim}")
    check(op, "cos_sin", cos_sin, F32, 2)
    if cos_sin.shape[1] != head_dim:
        raise refuse(op, "cos_sin", f"[positions, {head_dim}]", cos_sin)
    if norm is not None:
        check(op, "norm", norm, F32, 1)
        if norm.numel() != head_dim:
            raise refuse(op, "norm", f"[{head_dim}]", norm)


def _check_rows(op: str, rows: Tensor | None, positions: Tensor, count: int) -> int:
    """Address of rows, one for each of ``count``; without rows there must be as many positions."""
    _check_type(op, "positions", positions, I32)
    if rows is None:
        if positions.numel() != count:
            raise refuse(op, "positions", f"[{count}]", positions)
        return 0
    _check_type(op, "rows", rows, I32)
    if rows.numel() != count:
        raise refuse(op, "rows", f"[{count}]", rows)
    return rows.data_ptr()


def _check_cache(op: str, keys: Tensor, values: Tensor, dtype: torch.dtype, head_dim: int) -> int:
    """Heads of a layer of `pyruntime.layers.kv.PagedKV` that holds heads of ``head_dim``."""
    _check_type(op, "keys", keys, dtype)
    _check_type(op, "values", values, dtype)
    shape = keys.shape
    size = shape[0] * shape[1] * -(-head_dim // _BLOCK) * _BLOCK * _BLOCK
    if keys.numel() != size or values.numel() != size:
        raise InvalidInput(
            f"{op}: a cache of {shape[0]} blocks and {shape[1]} heads of {head_dim} has {size} "
            f"keys and as many values, got {list(shape)} and {list(values.shape)}"
        )
    return shape[1]


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
    count, width = q.shape
    _check_heads("rotate", width, cos_sin, norm, head_dim)
    chosen = _check_rows("rotate", rows, positions, count)
    cpu.rotate(
        q.data_ptr(),
        cos_sin.data_ptr(),
        0 if norm is None else norm.data_ptr(),
        positions.data_ptr(),
        chosen,
        count,
        width // head_dim,
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
    count, width = kv.shape
    _check_heads("append", width, cos_sin, key_norm, head_dim)
    _check_rows("append", None, positions, count)
    _check_type("append", "slots", slots, I32)
    if slots.numel() != count:
        raise refuse("append", "slots", f"[{count}]", slots)
    heads = _check_cache("append", keys, values, kv.dtype, head_dim)
    if width != 2 * heads * head_dim:
        raise refuse("append", "kv", f"[N, {2 * heads * head_dim}]", kv)
    cpu.append(
        kv.data_ptr(),
        cos_sin.data_ptr(),
        0 if key_norm is None else key_norm.data_ptr(),
        positions.data_ptr(),
        slots.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        count,
        heads,
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
    sinks: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """Causal attention over the paged cache; see `pyruntime.ops.reference.attention`."""
    code = check_float("attention", "q", q, 2)
    count, width = q.shape
    _check_type("attention", "sequences", sequences, I32)
    check("attention", "block_tables", block_tables, I32, 2)
    chosen = _check_rows("attention", rows, positions, count)
    kv_heads = _check_cache("attention", keys, values, q.dtype, head_dim)
    heads = width // head_dim
    if heads * head_dim != width or heads % kv_heads or window < 0:
        raise InvalidInput(
            f"attention: {width} columns must be a multiple of {kv_heads} KV heads of {head_dim}, "
            f"and window at least 0, got {window}"
        )
    if sequences.numel() != positions.numel():
        raise refuse("attention", "sequences", f"[{positions.numel()}]", sequences)
    if sinks is not None:
        check("attention", "sinks", sinks, F32, 1)
        if sinks.numel() != heads:
            raise refuse("attention", "sinks", f"[{heads}]", sinks)
    out = torch.empty_like(q)
    cpu.attention(
        q.data_ptr(),
        chosen,
        positions.data_ptr(),
        sequences.data_ptr(),
        block_tables.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        0 if sinks is None else sinks.data_ptr(),
        out.data_ptr(),
        count,
        heads,
        kv_heads,
        head_dim,
        block_tables.shape[1],
        window,
        scale,
        code,
    )
    return out
