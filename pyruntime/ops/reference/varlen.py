"""Attention inside ragged sequences of packed rows."""

from __future__ import annotations

import torch
from torch import Tensor


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
    """Bidirectional attention inside every sequence and none across, [Tq, heads * D].

    A row's bits depend on its own query and its sequence's keys alone: not on other sequences, nor
    on which other rows of the sequence ask. A sequence without keys answers zeros.

    Args:
        q: [Tq, heads * D], float32 or bfloat16; like k and v it may be columns of a wider matrix.
        k, v: [Tk, heads * D] of q's type.
        cu_q: int32 [n + 1], from 0 to Tq: sequence i asks with the rows ``cu_q[i]:cu_q[i + 1]``.
        cu_k: int32 [n + 1], from 0 to Tk: and sees the keys ``cu_k[i]:cu_k[i + 1]``. Both may be
            cut differently (only the class row of every image asks).
        heads: of D columns each.
        scale: multiplies the scores.
        key_bias: float32 [Tk], then added to every score of a key (the log of how many tokens it
            stands for, Token Merging, Bolya et al. 2023); -inf hides a key.
    """
    shape, out = (-1, heads, q.shape[1] // heads), torch.empty(q.shape, dtype=q.dtype)
    query_ends, key_ends = cu_q.tolist(), cu_k.tolist()
    for i in range(len(query_ends) - 1):
        mine = slice(query_ends[i], query_ends[i + 1])
        seen = slice(key_ends[i], key_ends[i + 1])
        query, key, value = (
            t.float().unflatten(1, shape[1:]).transpose(0, 1) for t in (q[mine], k[seen], v[seen])
        )
        scores = query @ key.transpose(1, 2) * scale
        if key_bias is not None:
            scores = scores + key_bias[seen]
        out[mine] = (scores.softmax(-1) @ value).transpose(0, 1).flatten(1).to(q.dtype)
    return out
