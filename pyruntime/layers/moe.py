"""Mixture of experts: a router sends every token to a few of many feed-forward networks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from pyruntime.gates.experts import Gate, split_identity
from pyruntime.layers.mlp import FeedForward
from pyruntime.layers.residual import Residual, Step
from pyruntime.ops.weight import Weight
from pyruntime.plan import Plan


@dataclass(frozen=True, slots=True, eq=False)
class MoE:
    """One expert branch. Each token's weighted results are added in the order of its choices.

    Attributes:
        gate: what chooses.
        experts: what it chooses from.
        shared: a network every token runs as well, or None.
        shared_gate: [1, d], whose sigmoid multiplies the shared result of a token, or None.
    """

    residual: Residual
    gate: Gate
    experts: FeedForward
    shared: FeedForward | None = None
    shared_gate: Weight | None = None

    def __call__(self, h: Tensor, step: Step) -> None:
        """h [N, d] += experts(norm(h)) for the rows the router keeps (h is mutated)."""
        ops = step.ops
        entry = self.residual.enter(h, step)
        run = entry.run
        if run.rows.shape[0] == 0:
            return
        packed = run.rows.shape[0] != h.shape[0]
        x = ops.gather(entry.x, run) if packed else entry.x
        batch = step.batch
        plan = step.router.experts(
            self.residual.layer, self.gate, x, run, batch.tokens, batch.seq_ids
        )
        # Without a residual gate there is nothing between the experts and the residual.
        direct = entry.gate is None and not packed
        out = h if direct else torch.zeros_like(x)
        scaled = self.residual.scaled if direct else _unchanged
        if self.gate.identity_experts:
            plan, own = split_identity(ops, plan, self.gate.identity_experts)
            ops.combine(x, scaled(replace(Plan.all(x.shape[0]), weights=own)), out)
        y, plan = self._run(ops, x, plan)
        ops.combine(y, scaled(plan), out)
        if self.shared is not None:
            y = self.shared(ops, x)
            ops.combine(y, scaled(self._shared_plan(ops, x)), out)
        if not direct:
            self.residual.leave(out, entry, h, step)

    def _run(self, ops: ModuleType, x: Tensor, plan: Plan) -> tuple[Tensor, Plan]:
        """Packed results of the experts, and the plan that brings them home."""
        if not self.gate.weights_input or plan.weights is None:
            return self.experts(ops, x, plan), plan
        packed = ops.gather(x, plan)
        packed = (packed.float() * plan.weights[:, None]).to(x.dtype)
        return self.experts(ops, packed, plan, gather=False), replace(plan, weights=None)

    def _shared_plan(self, ops: ModuleType, x: Tensor) -> Plan:
        everyone = Plan.all(x.shape[0], x.device)
        if self.shared_gate is None:
            return everyone
        logits = ops.segment_matmul(x, self.shared_gate, out_dtype=torch.float32)
        return replace(everyone, weights=ops.gate(logits))


def _unchanged(plan: Plan) -> Plan:
    return plan
