"""Rotary embedding, the paged cache, and attention over it."""

from __future__ import annotations

import torch
from torch import Tensor

from pyruntime.ops.weight import PANEL

BLOCK = 32  # tokens of one block of the paged cache


def rotate(
    q: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    rows: Tensor | None,
    head_dim: int,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Rotary embedding of q [R, heads * D], half-split pairs, in place (mutated and returned).

    Args:
        cos_sin: float32 [positions, D]: D/2 cosines, then D/2 sines.
        positions: int32 [N], read at ``rows`` int32 [R] (None: the identity).
        norm: float32 [D], RMS norm of every head first (Qwen3).
    """
    at = positions if rows is None else positions[rows.long()]
    heads = q.view(q.shape[0], q.shape[1] // head_dim, head_dim).float()
    if norm is not None:
        heads = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + eps) * norm
    cos, sin = cos_sin[at.long()][:, None].chunk(2, dim=-1)
    a, b = heads.chunk(2, dim=-1)
    return q.copy_(torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(1))


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
    """Rotate the new keys and store keys and values in the paged cache (both mutated).

    Args:
        kv: [N, 2 * heads * D]: keys, then values.
        slots: int32 [N], block * 32 + offset.
        keys, values: one layer of `pyruntime.layers.kv.PagedKV`.
    """
    key, value = kv.unflatten(1, (2, -1)).unbind(1)
    key = rotate(key.contiguous(), cos_sin, positions, None, head_dim, key_norm, eps)
    block, offset = slots.long() // BLOCK, slots.long() % BLOCK
    shape = (kv.shape[0], key.shape[1] // head_dim, head_dim)
    channel = torch.arange(head_dim)
    if keys.dtype == torch.bfloat16:
        at = (block[:, None], slice(None), channel // 2, offset[:, None], channel % 2)
        keys[at] = key.view(shape).transpose(1, 2)
        pair, odd = offset[:, None] // 2, offset[:, None] % 2
        values[block[:, None], :, channel // PANEL, pair, channel % PANEL, odd] = value.view(
            shape
        ).transpose(1, 2)
    else:
        keys[block[:, None], :, channel, offset[:, None]] = key.view(shape).transpose(1, 2)
        values[block[:, None], :, channel // PANEL, offset[:, None], channel % PANEL] = value.view(
            shape
        ).transpose(1, 2)


def read_cache(
    keys: Tensor, values: Tensor, blocks: Tensor, head_dim: int
) -> tuple[Tensor, Tensor]:
    """Keys and values of int64 blocks [B] in token order, each [B * 32, heads, D]."""
    key, value = keys[blocks], values[blocks]
    if keys.dtype == torch.bfloat16:
        key = key.permute(0, 3, 1, 2, 4).flatten(3)
        value = value.permute(0, 3, 5, 1, 2, 4).flatten(1, 2).flatten(3)
    else:
        key = key.permute(0, 3, 1, 2)
        value = value.permute(0, 3, 1, 2, 4).flatten(3)
    return key.flatten(0, 1)[..., :head_dim], value.flatten(0, 1)[..., :head_dim]


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
    """Causal attention of ragged query rows over the paged cache, [R, heads * D].

    A row sees the cache entries 0 .. its position of its sequence, with a window the last
    ``window`` of them.

    Args:
        q: [R, heads * D]; row r belongs to source row ``rows[r]`` (None: the identity).
        positions, sequences: int32 [N]; rows of one sequence are contiguous, positions ascending.
        block_tables: int32 [B, max_blocks].
        keys, values: one layer of `pyruntime.layers.kv.PagedKV`.
        sinks: float32 [heads], a logit of every head that joins the denominator of the softmax and
            has no value (gpt-oss).
        window: 0 for none.
    """
    source = torch.arange(q.shape[0]) if rows is None else rows.long()
    out = torch.empty_like(q)
    for sequence in sequences[source].unique().tolist():
        mine = torch.nonzero(sequences[source] == sequence)[:, 0]
        at = positions[source[mine]].long()
        blocks = block_tables[sequence, : int(at.max()) // BLOCK + 1].long()
        key, value = read_cache(keys, values, blocks, head_dim)
        query = q[mine].view(len(mine), -1, head_dim).float()
        group = query.shape[1] // key.shape[1]
        key, value = (t.float().repeat_interleave(group, dim=1) for t in (key, value))
        scores = torch.einsum("rhd,thd->hrt", query, key) * scale
        entry = torch.arange(key.shape[0])
        hidden = entry > at[:, None]
        if window:
            hidden |= entry <= at[:, None] - window
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(mine), 1)], -1)
        weights = scores.softmax(-1)[..., : len(entry)]
        out[mine] = torch.einsum("hrt,thd->rhd", weights, value).flatten(1).to(q.dtype)
    return out
