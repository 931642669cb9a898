"""The gated feed-forward branch: silu(gate x) * up x, then down."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pyruntime.layers.residual import Linear, Residual, Step


@dataclass(frozen=True, slots=True, eq=False)
class MLP:
    """One feed-forward branch.

    Attributes:
        gate_up: the interleaved pair of [I, d].
        down: [d, I].
    """

    residual: Residual
    gate_up: Linear
    down: Linear

    def __call__(self, h: Tensor, step: Step) -> None:
        """h [N, d] += mlp(norm(h)) for the rows the router keeps (h is mutated)."""
        entry = self.residual.enter(h, step)
        run = entry.run
        if run.rows.shape[0] == 0:
            return
        packed = run.rows.shape[0] != h.shape[0]
        inner = step.ops.segment_matmul(
            entry.x,
            self.gate_up.weight,
            run if packed else None,
            gather=packed,
            epilogue="silu_mul",
            bias=self.gate_up.bias,
        )
        y = step.ops.segment_matmul(inner, self.down.weight, bias=self.down.bias)
        self.residual.leave(y, entry, h, step)
