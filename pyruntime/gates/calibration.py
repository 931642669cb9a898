"""Calibrated thresholds: one table per model, any budget by interpolation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput


class Calibration:
    """Thresholds of every layer and branch over a grid of budgets (falling, 1.0 first).

    The grid's entry at budget 1.0 is the smallest calibration score, so that budgets between it and
    the next entry interpolate; a budget of exactly 1.0 never skips, one of exactly 0.0 always does.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = dict(record)
        self.budgets = [float(budget) for budget in record["budgets"]]
        rows = [
            [[-torch.inf if tau is None else tau for tau in layer] for layer in table]
            for table in record["thresholds"]
        ]
        self.thresholds = torch.tensor(rows, dtype=torch.float32)  # [G, L, 2]
        if len(self.budgets) != len(rows) or sorted(self.budgets, reverse=True) != self.budgets:
            raise InvalidInput("calibration: budgets must fall, with one threshold table each")

    @property
    def default_budget(self) -> float:
        """Budget of a request that names none."""
        return float(self.record.get("default_budget", 1.0))

    def tau(self, budget: float) -> Tensor:
        """Thresholds at a budget, float32 [L, 2]; a row is skipped iff its score is <= tau.

        Raises:
            InvalidInput: the budget lies where the record holds nothing to interpolate.
        """
        last = self.thresholds[-1]
        if budget >= 1.0:
            return torch.full_like(last, -torch.inf)
        if budget <= 0.0:
            return torch.where(last == -torch.inf, last, torch.inf)
        if not self.budgets[-1] <= budget <= self.budgets[0]:
            raise InvalidInput(
                f"budget {budget}: thresholds are stored from {self.budgets[0]} to "
                f"{self.budgets[-1]}; run `pyruntime calibrate`"
            )
        above = max(i for i, grid in enumerate(self.budgets) if grid >= budget)
        below = min(above + 1, len(self.budgets) - 1)
        span = self.budgets[above] - self.budgets[below]
        part = (self.budgets[above] - budget) / span if span > 0 else 0.0
        low, high = self.thresholds[above], self.thresholds[below]
        if part == 0.0:
            return low.clone()
        if bool(((low == -torch.inf) & (high > -torch.inf)).any()):
            raise InvalidInput(
                f"budget {budget}: no thresholds are stored between {self.budgets[above]} and "
                f"{self.budgets[below]}; run `pyruntime calibrate`"
            )
        mixed = low + (high - low) * part
        return torch.where(low == -torch.inf, low, mixed)  # a branch that never skips
