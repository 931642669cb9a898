"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), in the space of its cache.

Keys and values of all heads are projections of one latent vector a token, so the cache holds that
vector and the rotated channels next to it, once. Instead of projecting every cached vector up, a
query is projected down (`k_b`) and the attended latent up (`v_b`): what remains is attention with
one KV head, the same op as everywhere. Each head's projection is a segment of a grouped matmul.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyruntime.format.spec import LatentSpec
from pyruntime.layers.norm import Norm
from pyruntime.layers.residual import Linear, Residual, Step
from pyruntime.plan import Plan


@dataclass(frozen=True, slots=True, eq=False)
class LatentAttention:
    """One attention branch with a latent cache.

    A cached key of D = kv_rank + rope_dim channels is rotated as a whole: pairs (j, j + D/2) with
    j < rope_dim/2 are the rotary channels, all others turn by zero (see `layers.rope`).

    Attributes:
        q_a, q_a_norm: [q_rank, d] and its norm, or None: queries come from the row itself.
        q_nope, q_rope: [heads * nope_dim, q_rank or d] and [heads * rope_dim, ...].
        kv_a: [kv_rank + rope_dim, d].
        kv_a_norm: of the latent vector.
        k_b: per head [kv_rank, nope_dim].
        v_b: per head [value_dim, kv_rank].
        o: [d, heads * value_dim].
        scale: of the scores.
    """

    residual: Residual
    latent: LatentSpec
    q_a: Linear | None
    q_a_norm: Norm | None
    q_nope: Linear
    q_rope: Linear
    kv_a: Linear
    kv_a_norm: Norm
    k_b: Linear
    v_b: Linear
    o: Linear
    scale: float

    def __call__(self, h: Tensor, step: Step) -> None:
        """h [N, d] += attention(norm(h)) for the rows the router keeps (h and the cache change)."""
        ops, batch, layer = step.ops, step.batch, self.residual.layer
        entry = self.residual.enter(h, step)
        keys, values = step.kv.keys[layer], step.kv.values[layer]
        self._append(entry.x, step, keys, values)
        run = entry.run
        count = run.rows.shape[0]
        if count == 0:
            return
        packed = count != batch.num_rows
        rows = run.rows if packed else None
        x = ops.gather(entry.x, run) if packed else entry.x
        width, rank = self.latent.kv_rank + self.latent.rope_dim, self.latent.kv_rank
        heads = self.k_b.weight.segments
        by_head = _by_head(count, heads)
        query = self._queries(x, step, by_head)
        ops.rotate(query, step.cos_sin, batch.positions, rows, width)
        attended = ops.attention(
            query,
            rows,
            batch.positions,
            batch.seq_ids,
            batch.block_tables,
            keys,
            values,
            width,
            self.scale,
        )
        latent = attended.view(count * heads, width)[:, :rank].contiguous()
        value = ops.segment_matmul(latent, self.v_b.weight, by_head, gather=True)
        value = value.view(heads, count, -1).transpose(0, 1).reshape(count, -1)
        y = ops.segment_matmul(value, self.o.weight, bias=self.o.bias)
        self.residual.leave(y, entry, h, step)

    def _queries(self, x: Tensor, step: Step, by_head: Plan) -> Tensor:
        """Queries in the space of the cache, not rotated yet, [R, heads * D]."""
        ops, latent = step.ops, self.latent
        if self.q_a is not None and self.q_a_norm is not None:
            x = ops.segment_matmul(x, self.q_a.weight, bias=self.q_a.bias)
            x, _ = self.q_a_norm(ops, x)
        heads, count = self.k_b.weight.segments, x.shape[0]
        nope = ops.segment_matmul(x, self.q_nope.weight).view(-1, latent.nope_dim)
        down = ops.segment_matmul(nope, self.k_b.weight, by_head, gather=True)
        rope = ops.segment_matmul(x, self.q_rope.weight).view(count, heads, -1)
        return self._joined(down.view(heads, count, -1).transpose(0, 1), rope).flatten(1)

    def _append(self, x: Tensor, step: Step, keys: Tensor, values: Tensor) -> None:
        ops, batch, rank = step.ops, step.batch, self.latent.kv_rank
        kv = ops.segment_matmul(x, self.kv_a.weight, bias=self.kv_a.bias)
        latent, _ = self.kv_a_norm(ops, kv[:, :rank].contiguous())
        key = self._joined(latent, kv[:, rank:])
        value = torch.nn.functional.pad(latent, (0, self.latent.rope_dim))
        ops.append(
            torch.cat([key, value], dim=1),
            step.cos_sin,
            batch.positions,
            batch.slots,
            keys,
            values,
            key.shape[1],
        )

    def _joined(self, latent: Tensor, rope: Tensor) -> Tensor:
        """[.., kv_rank] and [.., rope_dim] in the channel order of the cache, [.., D]."""
        turned = self.latent.rope_dim // 2
        still = (self.latent.kv_rank + self.latent.rope_dim) // 2 - turned
        parts = [rope[..., :turned], latent[..., :still], rope[..., turned:], latent[..., still:]]
        return torch.cat(parts, dim=-1)


def _by_head(count: int, heads: int) -> Plan:
    """Rows r * heads + h, the (row, head) pairs of a [R * heads, ...] tensor, grouped by head."""
    pairs = torch.arange(count * heads, dtype=torch.int32)
    rows = pairs.view(count, heads).t().reshape(-1).contiguous()
    offsets = torch.arange(heads + 1, dtype=torch.int32) * count
    inverse = pairs.view(heads, count).t().reshape(-1, 1).contiguous()
    return Plan(rows, offsets, None, inverse, count * heads, count * heads)
