"""What every residual branch shares: norm, gate and plan on the way in, the add on the way out.

Norm and gate run for every row, the branch only for the rows its plan keeps. A row that is not kept
is not touched: its residual is the same bits before and after.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from pyruntime.gates.routing import Router
from pyruntime.gates.token_gate import GateValue, TokenGate
from pyruntime.layers.batch import Batch
from pyruntime.layers.kv import PagedKV
from pyruntime.layers.norm import Norm
from pyruntime.ops.weight import Weight
from pyruntime.plan import Plan


class Linear(NamedTuple):
    """A matrix in kernel layout and its optional float32 bias."""

    weight: Weight
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What the layers of one forward pass share."""

    ops: ModuleType
    batch: Batch
    kv: PagedKV
    router: Router
    cos_sin: Tensor  # float32 [positions, head_dim]


class Entry(NamedTuple):
    """The rows of a branch, before it runs."""

    x: Tensor  # [N, d], normalised (and scaled, for an entry gate)
    gate: GateValue | None
    plan: Plan  # rows whose result is wanted
    run: Plan  # rows to compute: `plan`, or every row where packing does not pay


@dataclass(frozen=True, slots=True, eq=False)
class Residual:
    """The frame around a branch.

    Attributes:
        layer, branch: its place; branch 0 is attention, 1 the MLP.
        gate: None for a branch that has none.
        scale: multiplies what the branch adds (Granite's residual multiplier).
    """

    layer: int
    branch: int
    norm: Norm
    gate: TokenGate | None
    scale: float = 1.0

    def enter(self, h: Tensor, step: Step) -> Entry:
        """Norm, gate and plan of h [N, d]."""
        gate, router = self.gate, step.router
        if gate is None:
            x, _ = self.norm(step.ops, h)
            plan = router.plan(self.layer, self.branch, None, False)
            return Entry(x, None, plan, plan)
        x, scores = self.norm(step.ops, h, gate.probe, gate.probe_bias)
        value = gate.evaluate(step.ops, x, scores)
        plan = router.plan(self.layer, self.branch, value.scores, gate.weighted)
        if gate.entry:
            x = gate.scale_input(x, value)
        run = plan if router.packs(self.layer, self.branch, plan) else router.every_row
        return Entry(x, value, plan, run)

    def leave(self, y: Tensor, entry: Entry, h: Tensor, step: Step) -> None:
        """Add the branch's result y [rows of `entry.run`, d] to h (mutated) where it is wanted."""
        if entry.run is not entry.plan:
            y = step.ops.gather(y, entry.plan)
        channels = None if entry.gate is None else entry.gate.channels
        step.ops.combine(y, self.scaled(entry.plan), h, channels)

    def scaled(self, plan: Plan) -> Plan:
        """The plan with its combine weights times `scale`."""
        if self.scale == 1.0:
            return plan
        weights = plan.weights
        if weights is None:
            weights = torch.ones(plan.rows.shape[0], device=plan.rows.device)
        return dataclasses.replace(plan, weights=weights * self.scale)
