"""What images carry from exit to exit, and the limits that decide who leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyruntime.format.spec import ExitSpec
from pyruntime.plan import Plan

NEVER = float("nan")  # no comparison with it is true


@dataclass(slots=True, eq=False)
class ExitState:
    """Of n images that are still in the network; `plan_exit` mutates it.

    Attributes:
        counters: float32 [n, 3], see `ops.plan_exit`.
        total: float32 [n, C], running sum of logits where exits add to it, else None.
        history: float32 [n, j, C], logits of the j exits passed, where a later one reads them, else
            None.
    """

    counters: Tensor
    total: Tensor | None = None
    history: Tensor | None = None

    @staticmethod
    def start(count: int, classes: int, exits: Sequence[ExitSpec]) -> ExitState:
        """Before the first exit."""
        sums = any(exit_.outputs == "sum" for exit_ in exits)
        reads = any(e.cascade or e.outputs in ("geometric", "arithmetic") for e in exits)
        return ExitState(
            torch.zeros(count, 3),
            torch.zeros(count, classes) if sums else None,
            torch.zeros(count, 0, classes) if reads else None,
        )

    def select(self, plan: Plan) -> ExitState:
        """Of the images a plan over the n images keeps, in order."""
        if plan.is_all:
            return self
        kept = plan.rows.long()
        return ExitState(
            self.counters[kept],
            None if self.total is None else self.total[kept],
            None if self.history is None else self.history[kept],
        )

    @staticmethod
    def join(parts: Sequence[ExitState]) -> ExitState:
        """Of all images of `parts`, which have passed the same exits, in order."""
        if len(parts) == 1:
            return parts[0]
        return ExitState(
            torch.cat([part.counters for part in parts]),
            _joined([part.total for part in parts]),
            _joined([part.history for part in parts]),
        )


def own_limits(exits: Sequence[ExitSpec]) -> Tensor:
    """The checkpoint's own rule, float32 [G, 2]: threshold (NaN: never) and 1 / tau of exits."""
    rows = [
        (NEVER if exit_.threshold is None else exit_.threshold, 1.0 / exit_.tau) for exit_ in exits
    ]
    return torch.tensor(rows, dtype=torch.float32).reshape(len(rows), 2)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    held = [part for part in parts if part is not None]
    return torch.cat(held) if held else None
