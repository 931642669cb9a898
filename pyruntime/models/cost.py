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


@dataclass(frozen=True, slots=True, eq=False)
class Cost:
    """Multiply-accumulates of one row in one layer, and of the head.

    Attributes:
        gates: of the residual gates of both branches together.
        kv: key and value projection.
        attention: query and output projection; `scores` more for every cache entry a row sees.
        mlp: int64 [L], feed-forward of each layer: its network, or router and shared network.
        expert: of one routed expert; an expert layer runs as many as its plan says.
        chosen: routed experts of a token over all layers, when none is cut.
        window: int64 [L], cache entries a row sees at most.
        head: logits of one row.
    """

    gates: int
    kv: int
    attention: int
    scores: int
    mlp: Tensor
    expert: int
    chosen: int
    window: Tensor
    head: int

    @staticmethod
    def of(spec: DecoderSpec, gates: GateSpec | None) -> Cost:
        """The costs of a model."""
        d, layers = spec.hidden_size, spec.num_layers
        one = 0
        if gates is not None:
            wide = 1 if gates.mlp_scalar else d
            one = {"scalar": d, "vector": d * d, "mlp": 2 * d * (d + wide)}[gates.gate_type]
        kv, attention, scores = _attention(spec)
        mlp = torch.full((layers,), 3 * d * spec.intermediate_size)
        experts = spec.experts
        if experts is not None:
            shared = 3 * d * experts.shared_size + (d if experts.shared_gate else 0)
            mlp[list(experts.layers)] = d * experts.num_experts + shared
        window = torch.full((layers,), spec.max_positions)
        if spec.window is not None:
            window[list(spec.window_layers)] = spec.window
        return Cost(
            gates=one * (len(gates.branches) if gates is not None else 0),
            kv=kv,
            attention=attention,
            scores=scores,
            mlp=mlp,
            expert=3 * d * experts.intermediate_size if experts is not None else 0,
            chosen=experts.experts_per_token * len(experts.layers) if experts is not None else 0,
            window=window,
            head=d * spec.vocab_size,
        )

    def executed(self, ran: Tensor, context: Tensor, used: Tensor | int = 0) -> Tensor:
        """int64 [N] of all layers of the gated model, without the head; every row has its own K/V.

        Args:
            ran: bool [L, 2, N], rows that attention (0) and the MLP (1) were computed for.
            context: int64 [N], cache entries up to a row and itself.
            used: int64 [N], routed experts of a row over all layers.
        """
        attention, mlp = ran.long().unbind(1)
        seen = (attention * torch.minimum(context, self.window[:, None])).sum(0)
        total = attention.sum(0) * self.attention + self.scores * seen + self.mlp @ mlp
        return total + self.expert * used + ran.shape[0] * (self.kv + self.gates)

    def dense(self, layers: int, context: Tensor) -> Tensor:
        """int64 [N] of all layers of the ungated model with all its experts, without the head."""
        seen = torch.minimum(context, self.window[:, None]).sum(0)
        fixed = layers * (self.kv + self.attention) + int(self.mlp.sum())
        return fixed + self.scores * seen + self.expert * self.chosen


def _attention(spec: DecoderSpec) -> tuple[int, int, int]:
    """(kv, attention, scores) of `Cost`."""
    d, latent = spec.hidden_size, spec.latent
    if latent is None:
        inner = spec.num_heads * spec.head_dim
        return 2 * d * spec.num_kv_heads * spec.head_dim, 2 * d * inner, 2 * inner
    query = latent.nope_dim + latent.rope_dim
    if latent.q_rank is None:
        query *= d * spec.num_heads
    else:
        query = latent.q_rank * (d + query * spec.num_heads)
    heads = spec.num_heads
    down, up = heads * latent.nope_dim * latent.kv_rank, heads * latent.kv_rank * latent.value_dim
    out = heads * latent.value_dim * d
    cached = latent.kv_rank + latent.rope_dim
    return d * cached, query + down + up + out, heads * (cached + latent.kv_rank)


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
    ran, used = kept, _experts_used(router, rows)
    if router.ran_dense:
        ran = kept.clone()
        for layer, branch in router.ran_dense:
            ran[layer, branch] = True
    # A row's keys and values follow its decision, not the path its branch took.
    executed = cost.executed(ran, context, used)
    if router.copy_kv:
        executed -= (num_layers - 1 - kept[1:, 0].sum(0)) * cost.kv
    dense = cost.dense(num_layers, context)
    executed[logit_rows] += cost.head
    dense[logit_rows] += cost.head
    kv_mode = "copy" if router.copy_kv else "dense"
    return Trace(kept, executed, dense, paths, mode, kv_mode, budgets, dict(router.expert_plans))


def _experts_used(router: Router, rows: int) -> Tensor | int:
    """int64 [N], routed experts of each row over all layers."""
    if not router.expert_plans:
        return 0
    total = torch.zeros(rows, dtype=torch.int64)
    for plan, reached in router.expert_plans.values():
        used = (plan.inverse >= 0).sum(1)
        if reached is None:
            total += used
        else:
            total[reached] += used
    return total
