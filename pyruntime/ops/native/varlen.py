"""Attention inside ragged sequences of packed rows.

The boundaries are read and checked in C++, where that costs nothing: they say what memory is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.ops.native.binding import CODES, F32, I32, check, cpu, refuse


def _check_rows(name: str, tensor: Tensor, like: Tensor) -> None:
    """Rows that lie together, at any distance from each other."""
    if (
        tensor.dtype not in CODES
        or tensor.dtype is not like.dtype
        or tensor.dim() != 2
        or tensor.shape[1] != like.shape[1]
        or (tensor.stride(1) != 1 and tensor.shape[1] > 1)
        or not tensor.is_cpu
    ):
        kind = f"{like.dtype} [rows, {like.shape[1]}]" if tensor is not like else "matrix"
        expected = f"a CPU float32 or bfloat16 {kind} with contiguous rows"
        raise refuse("attention_varlen", name, expected, tensor)


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
    """Attention inside sequences; see `pyruntime.ops.reference.attention_varlen`."""
    _check_rows("q", q, q)
    _check_rows("k", k, q)
    _check_rows("v", v, q)
    check("attention_varlen", "cu_q", cu_q, I32, 1)
    check("attention_varlen", "cu_k", cu_k, I32, 1)
    (queries, width), keys, ends = q.shape, k.shape[0], cu_q.shape[0]
    if heads < 1 or width % heads:
        raise InvalidInput(f"attention_varlen: {width} columns are not {heads} equal heads")
    if v.shape[0] != keys:
        raise refuse("attention_varlen", "v", f"[{keys}, {width}], one row a key", v)
    if ends < 1 or cu_k.shape[0] != ends:
        raise refuse("attention_varlen", "cu_k", f"[{max(ends, 1)}], as long as cu_q", cu_k)
    if key_bias is not None:
        check("attention_varlen", "key_bias", key_bias, F32, 1)
        if key_bias.shape[0] != keys:
            raise refuse("attention_varlen", "key_bias", f"[{keys}]", key_bias)
    out = torch.empty(queries, width, dtype=q.dtype)
    wrong = cpu.attention_varlen(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        cu_q.data_ptr(),
        cu_k.data_ptr(),
        0 if key_bias is None else key_bias.data_ptr(),
        out.data_ptr(),
        queries,
        keys,
        ends - 1,
        heads,
        width // heads,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        scale,
        CODES[q.dtype],
    )
    if wrong:
        total = queries if wrong == "cu_q" else keys
        raise InvalidInput(
            f"attention_varlen: {wrong} must rise from 0 to the {total} rows it cuts"
        )
    return out
