"""The feed-forward network, down(activation(up x)), and a branch that is just one."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from pyruntime.layers.residual import Linear, Residual, Step
from pyruntime.plan import Plan


@dataclass(frozen=True, slots=True, eq=False)
class FeedForward:
    """One network, or the S networks of an expert layer.

    Attributes:
        up: of each network [I, d], or the interleaved pair (gate, up) of a gated activation.
        down: of each network [d, I].
        epilogue: activation between them, an epilogue of `ops.segment_matmul`.
        alpha, limit: of the clamped one.
    """

    up: Linear
    down: Linear
    epilogue: str = "silu_mul"
    alpha: float = 1.702
    limit: float = 7.0

    def __call__(
        self, ops: ModuleType, x: Tensor, plan: Plan | None = None, gather: bool = True
    ) -> Tensor:
        """Results of the planned rows of x [N, d], packed [R, d]; without a plan, of every row.

        Args:
            gather: False when x holds the packed rows [R, d] already.
        """
        inner = ops.segment_matmul(
            x,
            self.up.weight,
            plan,
            gather=gather and plan is not None,
            epilogue=self.epilogue,
            bias=self.up.bias,
            alpha=self.alpha,
            limit=self.limit,
        )
        y: Tensor = ops.segment_matmul(inner, self.down.weight, plan, bias=self.down.bias)
        return y


@dataclass(frozen=True, slots=True, eq=False)
class MLP:
    """One feed-forward branch."""

    residual: Residual
    network: FeedForward

    def __call__(self, h: Tensor, step: Step) -> None:
        """h [N, d] += mlp(norm(h)) for the rows the router keeps (h is mutated)."""
        entry = self.residual.enter(h, step)
        run = entry.run
        if run.rows.shape[0] == 0:
            return
        packed = run.rows.shape[0] != h.shape[0]
        y = self.network(step.ops, entry.x, run if packed else None)
        self.residual.leave(y, entry, h, step)
