"""Exact multiply-accumulates of a decoder, per row, from what was executed.

Counted: every matrix product, the gates, keys and values, attention scores and their weighted sum,
the output head. Not counted, like everywhere in the field: norms, rotations, activations, adds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyruntime.format.spec import DecoderSpec, GateSpec
from pyruntime.gates.routing import Router
from pyruntime.gates.trace import Trace


@dataclass(frozen=True, slots=True)
class Cost:
    """Multiply-accumulates of one row in one layer, and of the head.

    Attributes:
        gates: of the gates of both branches together.
        kv: key and value projection.
        attention: query and output projection; `scores` more for every cache entry a row sees.
        mlp: the feed-forward branch.
        head: logits of one row.
    """

    gate_attention: int
    gate_mlp: int
    kv: int
    attention: int
    scores: int
    mlp: int
    head: int

    @staticmethod
    def of(spec: DecoderSpec, gates: GateSpec | None) -> Cost:
        """The costs of a model."""
        d = spec.hidden_size
        inner = spec.num_heads * spec.head_dim
        one = 0
        if gates is not None:
            wide = 1 if gates.mlp_scalar else d
            one = {"scalar": d, "vector": d * d, "mlp": 2 * d * (d + wide)}[gates.gate_type]
        return Cost(
            gate_attention=one if gates is not None and gates.gate_attention else 0,
            gate_mlp=one if gates is not None and gates.gate_mlp else 0,
            kv=2 * d * spec.num_kv_heads * spec.head_dim,
            attention=2 * d * inner,
            scores=2 * inner,
            mlp=3 * d * spec.intermediate_size,
            head=d * spec.vocab_size,
        )

    def layer(self, kept: Tensor, context: Tensor, kv_rows: Tensor | None = None) -> Tensor:
        """int64 [N] of one gated layer.

        Args:
            kept: bool [2, N].
            context: int64 [N], cache entries a row sees.
            kv_rows: bool [N], rows whose keys and values were computed; None for all.
        """
        fixed = self.gate_attention + self.gate_mlp
        total = kept[0] * (self.attention + self.scores * context) + kept[1] * self.mlp + fixed
        return total + (self.kv if kv_rows is None else kv_rows * self.kv)

    def dense_layer(self, context: Tensor) -> Tensor:
        """int64 [N] of one layer of the ungated model."""
        return self.kv + self.attention + self.mlp + self.scores * context


def trace_of(
    router: Router,
    cost: Cost,
    num_layers: int,
    positions: Tensor,
    logit_rows: Tensor,
    mode: str,
    budgets: Tensor,
) -> Trace:
    """The record of a finished pass.

    Args:
        positions: int32 [N].
        logit_rows: int64 [M].
        budgets: float32 [N].
    """
    rows = positions.shape[0]
    context = positions.long() + 1
    kept = torch.ones(num_layers, 2, rows, dtype=torch.bool)
    paths = {"all": 0, "packed": 0, "dense": 0, "none": 0}
    executed = torch.zeros(rows, dtype=torch.int64)
    dense = cost.dense_layer(context) * num_layers
    for layer in range(num_layers):
        ran = torch.ones(2, rows, dtype=torch.bool)
        for branch in (0, 1):
            plan = router.plans[layer, branch]
            mask = plan.inverse[:, 0] >= 0
            kept[layer, branch] = mask
            if (layer, branch) in router.ran_dense:
                paths["dense"] += 1
                continue
            ran[branch] = mask
            share = "all" if plan.kept == rows else "packed" if plan.kept else "none"
            paths[share] += 1
        copied = router.copy_kv and layer > 0
        executed += cost.layer(ran, context, kept[layer, 0] if copied else None)
    head = torch.zeros(rows, dtype=torch.int64)
    head[logit_rows] = cost.head
    return Trace(kept, executed + head, dense + head, paths, mode, budgets)
