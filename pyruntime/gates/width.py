"""Adaptive width (Adaptive Computation Modules, arXiv 2312.10193): k of every token to a plan."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from pyruntime.gates.experts.logits import Linear
from pyruntime.plan import Plan

Rule = Literal["paper", "official", "kminus"]


@dataclass(frozen=True, slots=True, eq=False)
class WidthGate:
    """Chooses how many of its learners, the first ones, a module runs for a token.

    Attributes:
        logits: of the choices; float32, and read by argmax: the lowest of equal ones wins.
        learners: N.
        least: learners of the first choice: 0 in a residual branch, 1 in q, k, v and o.
        rule: what a choice of k runs, see `pyruntime.format.spec.WidthSpec`.
    """

    logits: Linear
    learners: int
    least: int
    rule: Rule = "paper"

    def count(self, ops: ModuleType, x: Tensor) -> Tensor:
        """Learners that each row of x [N, d] runs, int64 [N]."""
        chosen = self.logits.logits(ops, x).argmax(1) + self.least
        return executed(chosen, self.learners, self.rule)


def executed(chosen: Tensor, learners: int, rule: Rule) -> Tensor:
    """What tokens that chose `chosen` int64 [N] of N learners run under a rule, int64 [N].

    ``official`` looks at all tokens of the call: bartwojcik/adaptive_computation_modules
    acm.py, forward_gated, stops its loop before the largest k of the batch.
    """
    if rule == "paper" or chosen.numel() == 0:
        return chosen
    last = learners - 1 if rule == "kminus" else int(chosen.max()) - 1
    return chosen.clamp(max=max(last, 0))


def plan_prefix(ops: ModuleType, counts: Tensor, learners: int) -> Plan:
    """Learner i is segment i and takes the rows with counts[n] > i, int64 [N]."""
    order = torch.arange(learners, dtype=torch.int32)
    labels = torch.where(order < counts[:, None], order, -1)
    plan: Plan = ops.plan_partition(labels, learners)
    return plan
