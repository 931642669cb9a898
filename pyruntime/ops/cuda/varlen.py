"""Attention inside ragged sequences: launches of ``csrc/cuda/attention_varlen.cu``."""

from __future__ import annotations

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.ops.cuda.check import (
    FLOATS,
    INT_MAX,
    WARP,
    alignment,
    ceil_div,
    check,
    check_device,
    check_rows,
    refuse,
)
from pyruntime.ops.cuda.kernels import kernels_of

ATTEND_THREADS = 128
MAX_HEAD = 128  # columns of a head
SLOTS = {32: 4, 64: 4, 96: 4, 128: 3}  # of 64 keys in shared memory, by the columns they have
FEW_ROWS, MANY_ROWS = 64, 256  # query rows of a block
MANY = 256  # blocks of MANY_ROWS that fill a device
MAX_GRID_Y = 65_535


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
    """Attention inside sequences; see `pyruntime.ops.reference.attention_varlen`.

    A head has at most 128 columns. The boundaries are not checked, reporting wrong ones would mean
    waiting for the device; rows beyond the last of ``cu_q`` are unspecified. bfloat16 rounds the
    weights of the softmax before they multiply the values.
    """
    check_rows("attention_varlen", "q", q, tuple(FLOATS), -1)
    queries, width = q.shape
    check_rows("attention_varlen", "k", k, (q.dtype,), width)
    check_rows("attention_varlen", "v", v, (q.dtype,), width)
    if not 1 <= heads <= MAX_GRID_Y or width % heads or width // heads > MAX_HEAD:
        raise InvalidInput(
            f"attention_varlen: {width} columns are not {heads} equal heads of at most {MAX_HEAD}"
        )
    if v.shape[0] != k.shape[0]:
        raise refuse("attention_varlen", "v", f"[{k.shape[0]}, {width}], one row a key", v)
    check("attention_varlen", "cu_q", cu_q, (torch.int32,), (-1,))
    check("attention_varlen", "cu_k", cu_k, (torch.int32,), (max(cu_q.shape[0], 1),))
    if key_bias is not None:
        check("attention_varlen", "key_bias", key_bias, (torch.float32,), (k.shape[0],))
    check_device("attention_varlen", q, k=k, v=v, cu_q=cu_q, cu_k=cu_k, key_bias=key_bias)
    out = torch.empty(queries, width, dtype=q.dtype, device=q.device)
    count, dim = cu_k.shape[0] - 1, width // heads
    if queries == 0 or count == 0 or dim == 0:
        return out
    block_rows = MANY_ROWS if count * heads >= MANY else FEW_ROWS
    if queries // block_rows + count > INT_MAX:
        raise InvalidInput(f"attention_varlen: {count} sequences of {queries} rows are too many")
    form, shared = _form(q, k, v, dim)
    kernels_of(q.device.index).launch(
        f"attention_varlen_{form}",
        (queries // block_rows + count, heads),
        (ATTEND_THREADS, 1),
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        cu_q.data_ptr(),
        cu_k.data_ptr(),
        0 if key_bias is None else key_bias.data_ptr(),
        out.data_ptr(),
        *(q.stride(0), k.stride(0), v.stride(0)),
        *(count, heads, dim, block_rows, scale),
        shared=shared,
    )
    return out


def _form(q: Tensor, k: Tensor, v: Tensor, dim: int) -> tuple[str, int]:
    """What a kernel's name ends in, and its dynamic shared memory."""
    sizes = dim | q.stride(0) | k.stride(0) | v.stride(0)
    if q.dtype is torch.bfloat16 and sizes % 8 == 0 and alignment(16, q, k, v) == 16:
        wide = ceil_div(dim, WARP) * WARP
        return f"mma_{wide}", SLOTS[wide] * 2 * 64 * 2 * wide  # keys and values
    return f"plain_{FLOATS[q.dtype]}_{64 if dim <= 64 else MAX_HEAD}", 0
