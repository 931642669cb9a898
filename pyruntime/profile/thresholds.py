"""Thresholds at which a pass keeps a given share, found in that very pass.

A threshold found on a whole pass is wrong once earlier layers cut, because they change what later
gates see. So each budget has a pass of its own, in which the layers below already cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from pyruntime.engine.runtime import Runtime
from pyruntime.errors import InvalidInput
from pyruntime.format.spec import ExpertSpec
from pyruntime.gates.budget import NEVER
from pyruntime.gates.experts import Gate
from pyruntime.gates.policy import ComputePolicy
from pyruntime.gates.routing import Router
from pyruntime.plan import Plan
from pyruntime.profile.measure import Call, Quality, run

BUDGETS = tuple(round(1 - step / 20, 2) for step in range(21))
_EVERYTHING = ComputePolicy(budget=1.0, mode="calibrated")


class Thresholds(Protocol):
    """How one kind of model is cut.

    Attributes:
        kind: of the calibration record.
        budgets: the grid, falling from 1.0 to the smallest there is.
        never: the threshold that never cuts.
    """

    kind: str
    budgets: tuple[float, ...]
    never: float

    def begin(self, calls: Sequence[Call]) -> Tensor:
        """The thresholds of budget 1.0, at which cutting begins; one pass over each call."""
        ...

    def find(self, call: Call, budget: float) -> Tensor:
        """The thresholds of one pass that cuts by them, after `begin`."""
        ...

    def kept(self, quality: Quality) -> float:
        """The share that a budget kept."""
        ...


def thresholds_of(runtime: Runtime) -> Thresholds:
    """What decides over compute in this model.

    Raises:
        InvalidInput: nothing does.
    """
    if runtime.gates is not None:
        return GateThresholds(runtime)
    experts = runtime.spec.experts
    if experts is None:
        raise InvalidInput("this model has no gates and no experts: there is nothing to calibrate")
    if experts.experts_per_token == 1:
        raise InvalidInput("this model runs 1 expert per token: there is nothing to calibrate")
    return ExpertThresholds(runtime, experts)


class GateThresholds:
    """Residual gates: scores up to which rows are skipped, float32 [L, 2]."""

    kind = "gateskip"
    budgets: tuple[float, ...] = BUDGETS
    never = -torch.inf

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        # -inf: branches that never skip, those without a gate and those whose gate is saturated,
        # which the official code leaves alone too.
        self._begin = torch.full((runtime.spec.num_layers, 2), torch.inf)

    def begin(self, calls: Sequence[Call]) -> Tensor:
        lowest = torch.stack([self._pass(call, 0.0) for call in calls]).amin(0)
        self._begin = lowest.masked_fill(lowest >= 1.0, -torch.inf)
        return self._begin

    def find(self, call: Call, budget: float) -> Tensor:
        return self._pass(call, 1.0 - budget)

    def kept(self, quality: Quality) -> float:
        return 1.0 - quality.skipped_share

    def _pass(self, call: Call, skip: float) -> Tensor:
        found = torch.full_like(self._begin, -torch.inf)

        def rule(layer: int, branch: int, scores: Tensor) -> Tensor:
            if self._begin[layer, branch] == -torch.inf:
                return NEVER
            tau = self._runtime.model.ops.quantile(scores[call.valid], skip)
            found[layer, branch] = tau
            return torch.where(call.valid, tau, NEVER) if skip > 0 else NEVER

        run(self._runtime, call, call.silent(), _EVERYTHING, call.cache(), rule)
        return found


class ExpertThresholds:
    """Experts: the share of the k experts' scores that suffices (mass), float32 [M].

    It is the same in every layer: so the budget goes to the layers that are least sure.

    A row runs one expert, and one more for each of the first k - 1 cumulative shares of its scores
    that lies below the mass. So (budget * k - 1) / (k - 1) of all these shares must.
    """

    kind = "experts"
    never = torch.inf

    def __init__(self, runtime: Runtime, experts: ExpertSpec) -> None:
        self._runtime = runtime
        self._layers = len(experts.layers)
        self._k = experts.experts_per_token
        self._mass = torch.inf
        one = 1 / self._k
        self.budgets = (*(b for b in BUDGETS if b > one + 0.01), one)

    def begin(self, calls: Sequence[Call]) -> Tensor:
        return torch.stack([self._pass(call, 1.0) for call in calls]).amax(0)

    def find(self, call: Call, budget: float) -> Tensor:
        # The layers below are cut by the mass found just before, in another call or for the budget
        # above: it is near, and shares change little.
        found = self._pass(call, budget)
        self._mass = float(found[0])
        return found

    def kept(self, quality: Quality) -> float:
        used = quality.experts_per_token
        return 1.0 if used is None else used / self._k

    def _pass(self, call: Call, budget: float) -> Tensor:
        router = _Cutter(self._runtime, call, self._mass)
        self._runtime.model.forward(call.silent(), call.cache(), router)
        below = (budget * self._k - 1) / (self._k - 1)
        mass: Tensor = router.ops.quantile(torch.cat(router.shares), below)
        return mass.repeat(self._layers)


class _Cutter(Router):
    """Cuts by one mass, and remembers the shares it saw.

    Attributes:
        shares: of every expert layer, the first k - 1 cumulative shares of its valid rows, float32.
    """

    def __init__(self, runtime: Runtime, call: Call, mass: float) -> None:
        super().__init__(runtime.model.ops, call.batch.num_rows)
        self.shares: list[Tensor] = []
        self._valid = call.valid
        self._mass = mass

    def experts(
        self, layer: int, gate: Gate, x: Tensor, run: Plan, tokens: Tensor, sequences: Tensor
    ) -> Plan:
        self.limits = None
        plan = super().experts(layer, gate, x, run, tokens, sequences)
        self.shares.append(_shares(plan)[self._valid, :-1].flatten())
        row = torch.tensor([gate.choices, torch.inf, self._mass])
        limits = row.expand(self.num_rows, 3).contiguous()
        self.limits = lambda _: limits
        return super().experts(layer, gate, x, run, tokens, sequences)


def _shares(plan: Plan) -> Tensor:
    """Cumulative shares of each row's weights, float32 [N, K]; 1 where a row has no weight.

    Weights are proportional to scores, up to how a model rounds them.
    """
    sums = plan.slot_weights().cumsum(-1)
    whole = sums[:, -1:]
    return torch.where(whole > 0, sums / whole, 1.0)
