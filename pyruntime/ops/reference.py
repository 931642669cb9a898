"""The specification of every op, in a few lines of torch; runs on any device torch has.

Shapes: N source rows, R packed rows, H or K columns, S segments. Every count may be zero.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.ops.weight import PANEL, Weight
from pyruntime.plan import Plan

BLOCK = 32  # tokens of one block of the paged cache


# ---- planners ------------------------------------------------------------------------------------


def plan_threshold(scores: Tensor, tau: Tensor, weighted: bool = False) -> Plan:
    """Keep row n unless ``scores[n] <= tau`` (GateSkip's inclusive rule; a NaN score is kept).

    Args:
        scores: float32 [N].
        tau: float32 [] or [N]; -inf never skips.
        weighted: the combine weight of a kept row is its score.
    """
    keep = ~(scores <= tau)
    plan = plan_partition(torch.where(keep, 0, -1).to(torch.int32), 1)
    return dataclasses.replace(plan, weights=scores[keep]) if weighted else plan


def plan_partition(labels: Tensor, segments: int) -> Plan:
    """Group rows by label, in order; label -1 drops the row.

    Args:
        labels: int32 [N] in [-1, S).
        segments: S.
    """
    if labels.numel() and not -1 <= int(labels.min()) <= int(labels.max()) < segments:
        raise InvalidInput(f"plan_partition: labels must lie in [-1, {segments})")
    kept = int((labels >= 0).sum())
    order = torch.argsort(labels, stable=True)[labels.numel() - kept :]
    inverse = torch.full_like(labels, -1)
    inverse[order] = torch.arange(kept, dtype=torch.int32, device=labels.device)
    sizes = torch.bincount(labels[order], minlength=segments)
    return Plan(order.int(), _offsets(sizes), None, inverse[:, None], labels.numel(), kept)


def plan_topk(scores: Tensor, k: int, renormalize: bool = False) -> Plan:
    """The k largest scores of every row; ties go to the lowest segment, NaN counts as lowest.

    Args:
        scores: float32 [N, S].
        k: choices of a row; ``inverse[n, j]`` is its j-th best.
        renormalize: divide the k weights of a row by their sum (added best first).
    """
    count, segments = scores.shape
    if not 1 <= k <= segments:
        raise InvalidInput(f"plan_topk: k must lie in [1, {segments}], got {k}")
    ranked = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    # A stable sort settles ties by segment; NaN and -inf are told apart by a second, minor key.
    order = torch.argsort(scores.isnan().int(), dim=1, stable=True)
    best = torch.argsort(ranked.gather(1, order), dim=1, descending=True, stable=True)
    order = order.gather(1, best)
    chosen = order[:, :k]
    weights = scores.gather(1, chosen)
    if renormalize:
        total = torch.zeros(count, dtype=scores.dtype, device=scores.device)
        for j in range(k):
            total = total + weights[:, j]
        weights = weights / total[:, None]
    packed = torch.argsort(chosen.flatten(), stable=True)
    inverse = torch.empty(count * k, dtype=torch.int32, device=scores.device)
    inverse[packed] = torch.arange(count * k, dtype=torch.int32, device=scores.device)
    offsets = _offsets(torch.bincount(chosen.flatten(), minlength=segments))
    rows = (packed // k).int()
    return Plan(rows, offsets, weights.flatten()[packed], inverse.view(count, k), count, count * k)


def quantile(scores: Tensor, q: float) -> Tensor:
    """Quantile of float32 [N >= 1] by linear interpolation, float32 []; rank q*(N-1) in float64.

    NaN ranks above every number.
    """
    if not 0.0 <= q <= 1.0 or scores.numel() == 0:
        raise InvalidInput(
            f"quantile: needs q in [0, 1] and at least one score, got q={q} of {scores.numel()}"
        )
    ordered = scores.sort().values
    rank = q * (scores.numel() - 1)
    below = int(rank)
    part = torch.tensor(rank - below, dtype=torch.float32)
    if part == 0:
        return ordered[below].clone()
    return ordered[below] + (ordered[below + 1] - ordered[below]) * part


def _offsets(sizes: Tensor) -> Tensor:
    return F.pad(sizes.cumsum(0), (1, 0)).int()


# ---- movement ------------------------------------------------------------------------------------


def gather(x: Tensor, plan: Plan) -> Tensor:
    """x [N, H] of any dtype to packed rows [R, H]."""
    return x[plan.rows.long()]


def compact(x: Tensor, plan: Plan) -> Tensor:
    """Move the kept rows of x [N, ...] to its front (x is mutated); return that view [R, ...]."""
    x[: plan.kept] = x[plan.rows.long()]
    return x[: plan.kept]


def combine(
    packed: Tensor, plan: Plan, out: Tensor, channel_weights: Tensor | None = None
) -> Tensor:
    """out[n] += sum over choices of weight * packed[position], accumulated in float32, in order.

    Args:
        packed: [R, H], float32 or bfloat16.
        plan: rows without a choice keep their value in out, bit for bit.
        out: [N, H] of the same dtype, mutated and returned.
        channel_weights: float32 [N, H], multiplies the contribution channel by channel.
    """
    total = out.float()
    for k in range(plan.inverse.shape[1]):
        position = plan.inverse[:, k].long()
        rows = torch.nonzero(position >= 0)[:, 0]
        value = packed[position[rows]].float()
        if plan.weights is not None:
            value = value * plan.weights[position[rows], None]
        if channel_weights is not None:
            value = value * channel_weights[rows]
        total[rows] = total[rows] + value
    return out.copy_(total)


# ---- compute -------------------------------------------------------------------------------------


def segment_matmul(
    x: Tensor,
    weight: Weight,
    plan: Plan | None = None,
    *,
    gather: bool = False,
    epilogue: str = "none",
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Each packed row times its segment's matrix: x @ W[s]^T + bias[s], then the epilogue.

    Args:
        x: packed rows [R, K], or source rows [N, K] with ``gather``.
        weight: S matrices [N_out, K] of x's dtype.
        plan: None for one matrix over all rows.
        gather: read row ``plan.rows[r]`` of x instead of row r.
        epilogue: none, gelu (erf), silu, or silu_mul: silu(first half of the columns) * second.
        bias: float32 [S, N_out], or [N_out].
        out_dtype: of the result, x's by default; accumulation is float32.

    Returns:
        [R, N_out], or [R, N_out / 2] for silu_mul.
    """
    if gather and plan is not None:
        x = x[plan.rows.long()]
    sizes = [x.shape[0]] if plan is None else plan.offsets.diff().tolist()
    matrices = weight.dense().float()
    parts = []
    for s, rows in enumerate(x.float().split(sizes)):
        y = rows @ matrices[s].T
        if bias is not None:
            y = y + bias.view(-1, weight.out_features)[s]
        if epilogue == "silu_mul":
            left, right = y.chunk(2, dim=1)
            y = F.silu(left) * right
        elif epilogue == "gelu":
            y = F.gelu(y)
        elif epilogue == "silu":
            y = F.silu(y)
        elif epilogue != "none":
            raise InvalidInput(f"segment_matmul: unknown epilogue {epilogue!r}")
        parts.append(y)
    return torch.cat(parts).to(out_dtype or x.dtype)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, probe: Tensor | None = None, probe_bias: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """Root-mean-square norm of x [N, H], computed in float32 and rounded once.

    Args:
        weight: float32 [H].
        probe: float32 [H]: the second result is ``sigmoid(out @ probe + probe_bias)``, float32
            [N]: a scalar gate at no extra pass. It reads the rounded row, as a gate after the norm
            would.
    """
    wide = x.float()
    out = (wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + eps) * weight).to(x.dtype)
    return out, None if probe is None else torch.sigmoid(out.float() @ probe + probe_bias)


def gate(logits: Tensor) -> Tensor:
    """Sigmoid of float32 [N, H] in place (mutated); returns the mean of every row, float32 [N]."""
    return logits.sigmoid_().mean(1)


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
) -> Tensor:
    """Causal attention of ragged query rows over the paged cache, [R, heads * D].

    A row sees the cache entries 0 .. its position of its sequence.

    Args:
        q: [R, heads * D]; row r belongs to source row ``rows[r]`` (None: the identity).
        positions, sequences: int32 [N]; rows of one sequence are contiguous, positions ascending.
        block_tables: int32 [B, max_blocks].
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
        future = torch.arange(key.shape[0]) > at[:, None]
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        out[mine] = torch.einsum("hrt,thd->rhd", weights, value).flatten(1).to(q.dtype)
    return out
