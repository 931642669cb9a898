"""Modules of adaptive width: every token runs the first k of N small networks and adds them up."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch.nn.functional as F
from torch import Tensor

from pyruntime.gates.width import WidthGate, plan_prefix
from pyruntime.layers.mlp import FeedForward


@dataclass(frozen=True, slots=True, eq=False)
class Meter:
    """Multiply-accumulates of the learners that ran, int64 [n] per image; mutated."""

    macs: Tensor

    def add(self, counts: Tensor, ends: Tensor, each: int) -> None:
        """Learners int64 [T] of the rows of the images that `ends` int32 [n + 1] cuts."""
        self.macs.add_(F.pad(counts.cumsum(0), (1, 0))[ends.long()].diff(), alpha=each)


@dataclass(frozen=True, slots=True, eq=False)
class Adaptive:
    """h(x, k), the sum of the first k learners (Adaptive Computation Modules, arXiv 2312.10193).

    Attributes:
        gate: chooses k.
        network: the learners as segments. Of output biases learner 0's includes `nothing`.
        nothing: float32 [d] that a token without learners adds, or None for nothing at all.
    """

    gate: WidthGate
    network: FeedForward
    nothing: Tensor | None = None

    @property
    def macs(self) -> int:
        """Of one learner and row."""
        up, down = self.network.up.weight, self.network.down.weight
        return up.in_features * up.out_features + down.in_features * down.out_features

    def add(
        self, ops: ModuleType, x: Tensor, out: Tensor, ends: Tensor, meter: Meter | None
    ) -> None:
        """out [T, d] += h(x [T, d]) (out is mutated); rows with k = 0 keep their bits.

        Args:
            ends: int32 [n + 1], cuts the rows into images, for `meter`.
        """
        counts = self.gate.count(ops, x)
        if meter is not None:
            meter.add(counts, ends, self.macs)
        plan = plan_prefix(ops, counts, self.gate.learners)
        if plan.kept:
            ops.combine(self.network(ops, x, plan), plan, out)
        if self.nothing is not None:
            out[counts == 0] += self.nothing.to(out.dtype)
