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

    def executed(self, ran: Tensor, context: Tensor) -> Tensor:
        """int64 [N] of all layers of the gated model, without the head; every row has its own K/V.

        Args:
            ran: bool [L, 2, N], rows that attention (0) and the MLP (1) were computed for.
            context: int64 [N], cache entries a row sees.
        """
        layers = ran.shape[0]
        attention, mlp = ran.sum(0).unbind()
        total = attention * (self.attention + self.scores * context) + mlp * self.mlp
        return total + layers * (self.kv + self.gate_attention + self.gate_mlp)

    def dense(self, layers: int, context: Tensor) -> Tensor:
        """int64 [N] of all layers of the ungated model, without the head."""
        return layers * (self.kv + self.attention + self.mlp + self.scores * context)


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
    places = [(layer, branch) for layer in range(num_layers) for branch in (0, 1)]
    plans = [router.plans[place] for place in places]
    kept = torch.stack([plan.inverse for plan in plans]).view(num_layers, 2, rows) >= 0
    paths = {"all": 0, "packed": 0, "dense": 0, "none": 0}
    for place, plan in zip(places, plans, strict=True):
        share = "all" if plan.kept == rows else "packed" if plan.kept else "none"
        paths["dense" if place in router.ran_dense else share] += 1
    ran = kept
    if router.ran_dense:
        ran = kept.clone()
        for layer, branch in router.ran_dense:
            ran[layer, branch] = True
    # A row's keys and values follow its decision, not the path its branch took.
    executed = cost.executed(ran, context)
    if router.copy_kv:
        executed -= (num_layers - 1 - kept[1:, 0].sum(0)) * cost.kv
    dense = cost.dense(num_layers, context)
    executed[logit_rows] += cost.head
    dense[logit_rows] += cost.head
    return Trace(kept, executed, dense, paths, mode, "copy" if router.copy_kv else "dense", budgets)
