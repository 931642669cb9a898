"""What every residual branch shares: norm, gate and plan on the way in, the add on the way out.

Norm and gate run for every row, the branch only for the rows its plan keeps. A row that is not kept
is not touched: its residual is the same bits before and after.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from pyruntime.gates.routing import Router
from pyruntime.gates.token_gate import GateValue, TokenGate
from pyruntime.layers.batch import Batch
from pyruntime.layers.kv import PagedKV
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
        norm: float32 [d].
        gate: None for a branch that has none.
    """

    layer: int
    branch: int
    norm: Tensor
    eps: float
    gate: TokenGate | None

    def enter(self, h: Tensor, step: Step) -> Entry:
        """Norm, gate and plan of h [N, d]."""
        gate, router = self.gate, step.router
        if gate is None:
            x, _ = step.ops.rms_norm(h, self.norm, self.eps)
            plan = router.plan(self.layer, self.branch, None, False)
            return Entry(x, None, plan, plan)
        x, scores = step.ops.rms_norm(h, self.norm, self.eps, gate.probe, gate.probe_bias)
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
        step.ops.combine(y, entry.plan, h, channels)
