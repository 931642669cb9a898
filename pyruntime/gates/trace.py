"""What was executed: decisions, exact multiply-accumulates, and the paths taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyruntime.plan import Plan


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Record of one forward pass over N rows of L layers.

    Attributes:
        kept: bool [L, 2, N], whether a row ran attention (0) and the MLP (1); replayable.
        macs_per_row: int64 [N], multiply-accumulates executed for each row, gates and K/V included.
        macs_dense_per_row: int64 [N], those of the same model without gates, every branch run.
        paths: how many branches ran "all" rows, "packed" ones, "none", or "dense" (every row,
            because packing was measured not to pay).
        mode: the routing rule.
        kv_mode: "dense", or "copy" where skipped rows took keys and values of the layer below.
        budgets: float32 [N], the compute budget each row was given.
        expert_plans: by expert layer, the plan over the rows that reached it, and those rows,
            int64 [R], or None for all N.
    """

    kept: Tensor
    macs_per_row: Tensor
    macs_dense_per_row: Tensor
    paths: dict[str, int]
    mode: str
    kv_mode: str
    budgets: Tensor
    expert_plans: Mapping[int, tuple[Plan, Tensor | None]] = field(default_factory=dict)

    @property
    def macs_executed(self) -> int:
        """Multiply-accumulates of the whole pass."""
        return int(self.macs_per_row.sum())

    @property
    def macs_dense(self) -> int:
        """Multiply-accumulates of the ungated dense model on the same rows."""
        return int(self.macs_dense_per_row.sum())

    @property
    def skipped_share(self) -> float:
        """GateSkip's own metric: mean over branches of the share of rows that were skipped."""
        return 1.0 - float(self.kept.float().mean()) if self.kept.numel() else 0.0

    def per_token_compute(self) -> Tensor:
        """Executed over dense multiply-accumulates of each row, float32 [N].

        Above 1 where gates cost more than they save.
        """
        return self.macs_per_row.float() / self.macs_dense_per_row.float()

    @property
    def experts(self) -> Tensor | None:
        """int32 [M, N, K], experts of each row in each of the M expert layers, best first; -1 where
        fewer ran. None without expert layers."""
        return self._choices(Plan.choices, -1)

    @property
    def expert_weights(self) -> Tensor | None:
        """float32 [M, N, K], combine weights of `experts`; 0 where none ran."""
        return self._choices(Plan.slot_weights, 0.0)

    @property
    def experts_per_token(self) -> float | None:
        """Mean number of routed experts a row ran in an expert layer; None without such layers."""
        if not self.expert_plans:
            return None
        rows = len(self.expert_plans) * self.budgets.shape[0]
        return sum(plan.kept for plan, _ in self.expert_plans.values()) / max(rows, 1)

    def _choices(self, read: Callable[[Plan], Tensor], empty: float) -> Tensor | None:
        layers = []
        for plan, rows in self.expert_plans.values():
            choices = read(plan)
            if rows is not None:
                full = choices.new_full((self.budgets.shape[0], choices.shape[1]), empty)
                full[rows] = choices
                choices = full
            layers.append(choices)
        return torch.stack(layers) if layers else None
