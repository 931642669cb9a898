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
        q_norm, k_norm: float32 [D] per-head norms (Qwen3), or None.
    """

    residual: Residual
    q: Linear
    kv: Linear
    o: Linear
    head_dim: int
    q_norm: Tensor | None
    k_norm: Tensor | None

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
        ops.rotate(
            q, step.cos_sin, batch.positions, rows, self.head_dim, self.q_norm, self.residual.eps
        )
        attended = ops.attention(
            q,
            rows,
            batch.positions,
            batch.seq_ids,
            batch.block_tables,
            keys,
            values,
            self.head_dim,
            self.head_dim**-0.5,
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
        step.ops.append(
            kv,
            step.cos_sin,
            positions,
            slots,
            keys,
            values,
            self.head_dim,
            self.k_norm,
            self.residual.eps,
        )
