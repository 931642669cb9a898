"""What compute policies mean for a model with early exits: the limits of every exit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.format.spec import ExitSpec
from pyruntime.gates.calibration import Calibration
from pyruntime.gates.exit import NEVER, own_limits
from pyruntime.gates.policy import BRANCHES, ComputePolicy, ExitPolicy

_MOST_TABLES = 64  # kept ready; a budget is any number, so there is no natural bound


class ExitLimits:
    """Policies to limits, for one model. Safe to use from several threads."""

    def __init__(
        self,
        exits: Sequence[ExitSpec],
        calibration: Calibration | None,
        has_scales: bool = False,
    ) -> None:
        """
        Args:
            has_scales: budgets mean something to this model even without exits.
        """
        self.exits = tuple(exits)
        self.calibration = calibration
        self._has_scales = has_scales
        self._tables: dict[ComputePolicy, Tensor] = {}

    def resolve(self, policy: ComputePolicy | None) -> Tensor:
        """Limits of one image, float32 [G, 2]: threshold (NaN: never) and 1 / tau of every exit.
        They are shared: not to be written to.

        Without a policy the calibration's default budget holds, and where there is none the
        checkpoint's own rule.

        Raises:
            InvalidInput: the model cannot honour it.
        """
        policy = policy or ComputePolicy()
        table = self._tables.get(policy)
        if table is None:
            table = self._table(policy)
            if len(self._tables) >= _MOST_TABLES:
                self._tables.clear()
            self._tables[policy] = table
        return table

    def rows(self, policies: Sequence[ComputePolicy | None]) -> Tensor:
        """Limits of n images, float32 [n, G, 2].

        Raises:
            InvalidInput: as `resolve`.
        """
        tables = [self.resolve(policy) for policy in policies]
        return torch.stack(tables) if tables else torch.empty(0, len(self.exits), 2)

    def forced(self, limits: Tensor, levels: Tensor) -> Tensor:
        """Limits under which every image leaves where it is told to.

        Args:
            limits: float32 [n, G, 2].
            levels: integers [n] in [0, G].

        Raises:
            InvalidInput: levels of another shape or dtype, or out of range.
        """
        count, exits = limits.shape[:2]
        if levels.dtype not in (torch.int32, torch.int64) or list(levels.shape) != [count]:
            raise InvalidInput(
                f"replay: expected int32 [{count}], got {levels.dtype} {list(levels.shape)}"
            )
        if count and not 0 <= int(levels.min()) <= int(levels.max()) <= exits:
            raise InvalidInput(f"replay: levels must be in [0, {exits}], are {levels.tolist()}")
        here = torch.arange(exits) == levels[:, None]
        threshold = torch.where(here, -math.inf, NEVER)
        return torch.stack([threshold, limits[..., 1]], dim=2)

    def _table(self, policy: ComputePolicy) -> Tensor:
        self._refuse_others(policy)
        chosen, budget = policy.exit_policy, policy.budget
        if chosen is not None:
            if budget is not None:
                raise InvalidInput("budget and exit both say when images leave: give one of them")
            return self._chosen(chosen)
        if budget is None and self.calibration is not None:
            budget = self.calibration.default_budget
        limits = own_limits(self.exits)
        if budget is None:
            return limits
        if budget == 1.0:
            limits[:, 0] = NEVER
            return limits
        if not self.exits and not self._has_scales:
            raise InvalidInput(
                f"budget {budget} needs a model with exits or mixed scales; this one has neither"
            )
        if self.calibration is None:
            raise InvalidInput(
                f"budget {budget} needs calibrated thresholds; run `pyruntime calibrate` first"
            )
        found = self.calibration.confidence(budget)
        limits[:, 0] = torch.where(found == math.inf, NEVER, found)
        return limits

    def _chosen(self, chosen: ExitPolicy) -> Tensor:
        limits = own_limits(self.exits)
        if chosen.never:
            limits[:, 0] = NEVER
            return limits
        if not self.exits:
            raise InvalidInput("exit is set, but this model has none to choose from")
        if chosen.threshold is not None:
            limits[:, 0] = chosen.threshold
        if chosen.tau is not None:
            if all(exit_.criterion != "jei_dnn" for exit_ in self.exits):
                raise InvalidInput("exit: tau belongs to JEI-DNN gates; this model has none")
            limits[:, 1] = 1.0 / chosen.tau
        if chosen.level is not None:
            if chosen.level >= len(self.exits):
                raise InvalidInput(
                    f"exit: level {chosen.level} asked for, this model has exits 0 to "
                    f"{len(self.exits) - 1}"
                )
            if chosen.threshold is None and chosen.tau is None:
                limits[:, 0] = NEVER
            limits[chosen.level :, 0] = -math.inf
        return limits

    @staticmethod
    def _refuse_others(policy: ComputePolicy) -> None:
        """What other kinds of models spend compute on."""
        default = ComputePolicy()
        if policy.mode not in (None, "calibrated"):
            raise InvalidInput(f"mode {policy.mode} is a rule of residual gates; this model has "
                               "none")  # fmt: skip
        if policy.experts is not None:
            raise InvalidInput("experts is set, but this model has none to choose from")
        if policy.kv_mode is not None:
            raise InvalidInput("kv_mode is set, but this model keeps no keys and values")
        if policy.branches != BRANCHES or policy.every_second_layer != default.every_second_layer:
            raise InvalidInput(
                "branches and every_second_layer belong to residual gates; this model has none"
            )
