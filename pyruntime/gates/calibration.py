"""Calibrated thresholds: one table per model, any budget by interpolation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class _Kind:
    """What the thresholds of one kind of record mean.

    Attributes:
        never: threshold that never cuts; null in the record.
        always: threshold that cuts all that may be cut, at the smallest budget; None: the grid's
            last entry is the smallest budget as it stands.
        least: the smallest budget; None: the last one of the grid.
        steps: a budget takes the next smaller entry of the grid as it stands; no interpolation.
    """

    never: float
    always: float | None
    least: float | None
    steps: bool = False


# A row of a gate is skipped iff its score is <= tau; a token runs its best experts until their
# share of the k experts' scores is >= mass; an image leaves at an exit whose confidence reaches the
# threshold. Entries of "scales" hold what decides about patches, then the thresholds of exits: two
# neighbours may save in different places, and nothing in between has been measured.
_KINDS: Mapping[str, _Kind] = MappingProxyType({
    "gateskip": _Kind(never=-torch.inf, always=torch.inf, least=0.0),
    "experts": _Kind(never=torch.inf, always=0.0, least=None),
    "exits": _Kind(never=torch.inf, always=None, least=None),
    "scales": _Kind(never=torch.inf, always=None, least=None, steps=True),
})  # fmt: skip


class Calibration:
    """Thresholds of every place that may be cut over a grid of budgets (falling, 1.0 first).

    The places are layers and branches of residual gates (kind "gateskip"), expert layers (kind
    "experts"), exits (kind "exits"), or mixed scales and then exits (kind "scales"). The grid's
    entry at budget 1.0 is the threshold at which cutting begins, so that budgets between it and the
    next entry interpolate; a budget of exactly 1.0 cuts nothing. The smallest there can be
    (`least`) cuts all, except of exits and scales, where it is the grid's last entry as it stands.
    With scales a budget takes the costliest entry that it allows, as it stands.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = dict(record)
        kind = record["kind"]
        if kind not in _KINDS:
            raise InvalidInput(f"calibration: kind {kind!r} is not one of {', '.join(_KINDS)}")
        self._kind = _KINDS[kind]
        self.budgets = [float(budget) for budget in record["budgets"]]
        tables = record["thresholds"]
        if len(self.budgets) != len(tables) or sorted(self.budgets, reverse=True) != self.budgets:
            raise InvalidInput("calibration: budgets must fall, with one threshold table each")
        self.thresholds = torch.tensor(_filled(tables, self._kind.never), dtype=torch.float32)

    @property
    def default_budget(self) -> float | None:
        """Budget of a request that names none; None: the checkpoint's own rule (exits, scales)."""
        budget = self.record.get("default_budget", 1.0)
        return None if budget is None else float(budget)

    @property
    def least(self) -> float:
        """The smallest budget: no branch of a gated model, one of a token's k experts (1 / k), the
        grid's last one of exits and scales."""
        return self.budgets[-1] if self._kind.least is None else self._kind.least

    def tau(self, budget: float) -> Tensor:
        """Thresholds of residual gates, float32 [L, 2]; a row is skipped iff its score is <= tau.

        Raises:
            InvalidInput: the budget lies where the record holds nothing to interpolate.
        """
        return self._at(budget)

    def mass(self, budget: float) -> Tensor:
        """Thresholds of expert layers, float32 [M]; see `ExpertPolicy.mass`.

        Raises:
            InvalidInput: the budget lies where the record holds nothing to interpolate, or is less
                than one expert per token.
        """
        return self._at(budget)

    def confidence(self, budget: float) -> Tensor:
        """Thresholds of exits, float32 [G], on the confidence of each; inf: no image leaves.

        Raises:
            InvalidInput: the budget lies where the record holds nothing to interpolate.
        """
        found = self._at(budget)
        return found[1:] if self.record["kind"] == "scales" else found

    def scale(self, budget: float) -> float:
        """Threshold of the model's scale source; inf: all is fine, whatever the source.

        Raises:
            InvalidInput: less than the smallest budget.
        """
        return float(self._at(budget)[0])

    def _at(self, budget: float) -> Tensor:
        never, last = self._kind.never, self.thresholds[-1]
        if budget >= 1.0:
            return torch.full_like(last, never)
        if budget < self.least:
            raise InvalidInput(f"budget {budget}: the smallest of this model is {self.least:g}")
        if budget == self.least:
            always = self._kind.always
            return last.clone() if always is None else torch.where(last == never, last, always)
        if self._kind.steps:
            allowed = next(i for i, grid in enumerate(self.budgets) if grid <= budget)
            return self.thresholds[allowed].clone()
        if not self.budgets[-1] <= budget <= self.budgets[0]:
            raise InvalidInput(
                f"budget {budget}: thresholds are stored from {self.budgets[0]} to "
                f"{self.budgets[-1]}; run `pyruntime calibrate`"
            )
        above = max(i for i, grid in enumerate(self.budgets) if grid >= budget)
        below = min(above + 1, len(self.budgets) - 1)
        span = self.budgets[above] - self.budgets[below]
        part = (self.budgets[above] - budget) / span if span > 0 else 0.0
        start, end = self.thresholds[above], self.thresholds[below]
        if part == 0.0:
            return start.clone()
        if bool(((start == never) & (end != never)).any()):
            raise InvalidInput(
                f"budget {budget}: no thresholds are stored between {self.budgets[above]} and "
                f"{self.budgets[below]}; run `pyruntime calibrate`"
            )
        mixed = start + (end - start) * part
        return torch.where(start == never, start, mixed)  # a place that is never cut


def _filled(table: Any, never: float) -> Any:
    """Nested lists with a number for every null."""
    if isinstance(table, list | tuple):
        return [_filled(entry, never) for entry in table]
    return never if table is None else table
