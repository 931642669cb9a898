"""Grouped-query self-attention: keys and values for every row, queries for the kept ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pyruntime.layers.residual import Linear, Residual, Step


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """One attention branch.

    A skipped row still writes its keys and values (later rows attend to them: the weights were
    trained so); its query, scores and output projection do not run.

    Attributes:
        q: [heads * D, d].
        kv: [2 * kv_heads * D, d], keys then values.
        o: [d, heads * D].
        q_norm, k_norm: norms of queries and keys, or None: float32 [D], of every head by itself
            (Qwen3), or float32 [heads * D], of all heads together (OLMoE).
        scale: of the scores.
        sinks: float32 [heads], logits that only take weight away (gpt-oss), or None.
        window: tokens a row sees, itself included; 0 for all.
    """

    residual: Residual
    q: Linear
    kv: Linear
    o: Linear
    head_dim: int
    q_norm: Tensor | None
    k_norm: Tensor | None
    scale: float
    sinks: Tensor | None = None
    window: int = 0

    def __call__(self, h: Tensor, step: Step) -> None:
        """h [N, d] += attention(norm(h)) for the rows the router keeps (h and the cache change)."""
        ops, batch, layer = step.ops, step.batch, self.residual.layer
        entry = self.residual.enter(h, step)
        keys, values = step.kv.keys[layer], step.kv.values[layer]
        self._append(entry.x, entry.plan.inverse, step, keys, values)
        run = entry.run
        if run.rows.shape[0] == 0:
            return
        packed = run.rows.shape[0] != batch.num_rows
        rows = run.rows if packed else None
        q = ops.segment_matmul(
            entry.x, self.q.weight, run if packed else None, gather=packed, bias=self.q.bias
        )
        eps = self.residual.norm.eps
        q_norm = self.q_norm
        if q_norm is not None and q_norm.shape[0] != self.head_dim:
            q, q_norm = ops.rms_norm(q, q_norm, eps)[0], None
        ops.rotate(q, step.cos_sin, batch.positions, rows, self.head_dim, q_norm, eps)
        attended = ops.attention(
            q,
            rows,
            batch.positions,
            batch.seq_ids,
            batch.block_tables,
            keys,
            values,
            self.head_dim,
            self.scale,
            self.sinks,
            self.window,
        )
        y = ops.segment_matmul(attended, self.o.weight, bias=self.o.bias)
        self.residual.leave(y, entry, h, step)

    def _append(self, x: Tensor, inverse: Tensor, step: Step, keys: Tensor, values: Tensor) -> None:
        batch, layer = step.batch, self.residual.layer
        positions, slots = batch.positions, batch.slots
        if step.router.copy_kv and layer > 0:
            # An approximation chosen by name: rows that skip attention reuse the layer below.
            skipped = inverse[:, 0] < 0
            step.kv.copy_from_below(layer, slots[skipped])
            x, positions, slots = x[~skipped], positions[~skipped], slots[~skipped]
        kv = step.ops.segment_matmul(x, self.kv.weight, bias=self.kv.bias)
        eps = self.residual.norm.eps
        k_norm = self.k_norm
        if k_norm is not None and k_norm.shape[0] != self.head_dim:
            width = k_norm.shape[0]
            kv[:, :width] = step.ops.rms_norm(kv[:, :width].contiguous(), k_norm, eps)[0]
            k_norm = None
        step.ops.append(
            kv,
            step.cos_sin,
            positions,
            slots,
            keys,
            values,
            self.head_dim,
            k_norm,
            eps,
        )
