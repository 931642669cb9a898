"""What the policies of a step mean for a model: the router that carries them out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.format.spec import DecoderSpec, ExpertSpec, GateSpec
from pyruntime.gates.calibration import Calibration
from pyruntime.gates.policy import ComputePolicy, ExpertPolicy
from pyruntime.gates.routing import Router, Rule, calibrated_rule, quantile_rule, replay_rule
from pyruntime.gates.trace import Trace
from pyruntime.layers.batch import Batch

_MOST_RULES = 64  # thresholds kept ready; a budget is any number, so there is no natural bound


class Decisions:
    """Policies to routers, for one model.

    Attributes:
        packed_below: kept share from which running every row was measured to be faster.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        gates: GateSpec | None,
        calibration: Calibration | None,
        ops: ModuleType,
        packed_below: float,
    ) -> None:
        self.spec = spec
        self.gates = gates
        self.calibration = calibration
        self.ops = ops
        self.packed_below = packed_below
        self._rules: dict[tuple[ComputePolicy | None, float], Rule] = {}
        self._limit_tables: dict[tuple[ComputePolicy | None, float], Tensor] = {}

    def resolve(self, policy: ComputePolicy | None) -> tuple[str, float]:
        """Mode and budget of a policy, defaults filled in.

        Raises:
            InvalidInput: the model cannot honour it.
        """
        policy = policy or ComputePolicy()
        # The published rules are not causal: a folder may record one, a request must name it.
        mode = policy.mode or "calibrated"
        budget = policy.budget
        if budget is None:
            budget = 1.0 if policy.experts is not None else self._default_budget(mode)
        experts = self.spec.experts
        if self.gates is None and experts is None and budget < 1.0:
            raise InvalidInput(
                f"budget {budget} needs a model with gates or experts; this one has neither"
            )
        if self.gates is None and mode != "calibrated" and budget < 1.0:
            raise InvalidInput(f"mode {mode} is a rule of residual gates; this model has none")
        self._check_experts(policy)
        for name in ("exit", "scales"):
            if getattr(policy, name) is not None:
                raise InvalidInput(f"{name} is set, but this model has none to choose from")
        if mode == "calibrated" and budget < 1.0 and self.calibration is None:
            raise InvalidInput(
                f"budget {budget} needs calibrated thresholds; run `pyruntime calibrate` first"
            )
        if self.calibration is not None and budget < self.calibration.least:
            raise InvalidInput(
                f"budget {budget}: the smallest of this model is {self.calibration.least:g}"
            )
        return mode, budget

    def router(
        self,
        batch: Batch,
        policies: Sequence[ComputePolicy | None],
        replay: Tensor | Trace | None = None,
    ) -> Router:
        """The router of one step.

        Args:
            policies: one per sequence of the batch. Quantile modes rule over the whole call, so
                they must then all be equal; calibrated policies may differ.
            replay: decisions to repeat: a trace, or its `kept`, bool [L, 2, N], without experts.

        Raises:
            InvalidInput: a policy the model cannot honour, or a mixture that has no meaning.
        """
        resolved = [self.resolve(policy) for policy in policies]
        kv_modes = {self._copies(policy) for policy in policies}
        if len(kv_modes) > 1:
            raise InvalidInput("kv_mode must be the same for every sequence of a step")
        router = Router(
            self.ops,
            batch.num_rows,
            copy_kv=kv_modes.pop() if kv_modes else False,
            packed_below=self.packed_below,
        )
        router.limits = self._limits(batch, policies, resolved)
        valid = self._valid(batch.tokens)
        if isinstance(replay, Trace):
            router.repeated = _repeated(replay)
            replay = replay.kept
        if replay is not None:
            expected = [self.spec.num_layers, 2, batch.num_rows]
            if list(replay.shape) != expected or replay.dtype != torch.bool:
                raise InvalidInput(
                    f"replay: expected bool {expected}, got {replay.dtype} {list(replay.shape)}"
                )
            router.rule = replay_rule(replay)
        elif self.gates is not None and any(budget < 1.0 for _, budget in resolved):
            modes = {mode for mode, _ in resolved}
            if modes == {"calibrated"}:
                router.rule = self._calibrated(batch, policies, resolved, valid)
            elif len(set(policies)) == 1:
                mode, budget = resolved[0]
                policy = replace(policies[0] or ComputePolicy(), mode=mode)
                fallback = self.calibration.tau(budget) if self.calibration else None
                router.rule = quantile_rule(
                    self.ops, policy, 1.0 - budget, valid, batch.seq_ids, fallback
                )
            else:
                raise InvalidInput(
                    f"the rules {sorted(modes)} decide over a whole call: all its sequences must "
                    "have the same policy"
                )
        return router

    def _default_budget(self, mode: str) -> float:
        if mode != "calibrated":
            return 1.0 - self.gates.skip_ratio if self.gates else 1.0
        default = self.calibration.default_budget if self.calibration else None
        return 1.0 if default is None else default

    def _copies(self, policy: ComputePolicy | None) -> bool:
        wanted = policy.kv_mode if policy is not None else None
        stored = self.gates.kv_mode if self.gates is not None else "dense"
        return (wanted or stored) == "copy"

    def _valid(self, tokens: Tensor) -> Tensor | None:
        """bool [N], False for padding and end-of-sequence tokens, which never skip; None if all."""
        special = {*self.spec.eos_token_ids, self.spec.pad_token_id} - {None}
        if not special:
            return None
        valid = torch.ones_like(tokens, dtype=torch.bool)
        for token in special:
            valid &= tokens != token
        return None if bool(valid.all()) else valid

    def _calibrated(
        self,
        batch: Batch,
        policies: Sequence[ComputePolicy | None],
        resolved: Sequence[tuple[str, float]],
        valid: Tensor | None,
    ) -> Rule:
        """The rule of fixed thresholds: [L, 2] for one policy, [L, 2, N] when rows differ."""
        distinct = list(dict.fromkeys(zip(policies, resolved, strict=True)))
        if len(distinct) == 1 and valid is None:
            # The common step, above all when decoding: its thresholds are looked up, not made.
            ((policy, (_, budget)),) = distinct
            key = (policy, budget)
            if key not in self._rules:
                if len(self._rules) >= _MOST_RULES:
                    self._rules.clear()
                self._rules[key] = calibrated_rule(self._table(policy, budget))
            return self._rules[key]
        tables = torch.stack([self._table(policy, budget) for policy, (_, budget) in distinct], -1)
        which = [distinct.index(pair) for pair in zip(policies, resolved, strict=True)]
        tau = tables[..., torch.tensor(which)[batch.seq_ids.long()]]
        return calibrated_rule(tau if valid is None else torch.where(valid, tau, -torch.inf))

    def _table(self, policy: ComputePolicy | None, budget: float) -> Tensor:
        if self.calibration is None:
            return torch.full((self.spec.num_layers, 2), -torch.inf)
        tau = self.calibration.tau(budget)
        for layer in range(self.spec.num_layers):
            for branch in (0, 1):
                if policy is not None and not policy.may_skip(layer, branch):
                    tau[layer, branch] = -torch.inf
        return tau

    def _check_experts(self, policy: ComputePolicy) -> None:
        if policy.experts is None:
            return
        experts = self.spec.experts
        if experts is None:
            raise InvalidInput("experts is set, but this model has none to choose from")
        slots = ExpertPolicy.of(policy.experts).slots
        if slots is not None and slots > experts.experts_per_token:
            raise InvalidInput(
                f"experts: {slots} per token asked for, this model runs at most "
                f"{experts.experts_per_token}"
            )

    def _limits(
        self,
        batch: Batch,
        policies: Sequence[ComputePolicy | None],
        resolved: Sequence[tuple[str, float]],
    ) -> Callable[[int], Tensor] | None:
        """How many of its chosen experts each row may use, by layer; None when nothing is cut."""
        experts = self.spec.experts
        if experts is None:
            return None
        pairs = [(policy, budget) for policy, (_, budget) in zip(policies, resolved, strict=True)]
        if not any(self._cuts_experts(*pair) for pair in pairs):
            return None
        distinct = list(dict.fromkeys(pairs))
        tables = [self._limit_table(experts, *pair) for pair in distinct]
        if len(tables) == 1:  # the common step, above all when decoding
            rows = tables[0][:, None].expand(-1, batch.num_rows, -1).contiguous()
        else:
            which = torch.tensor([distinct.index(pair) for pair in pairs])
            rows = torch.stack(tables, dim=1)[:, which[batch.seq_ids.long()]]
        return dict(zip(experts.layers, rows.unbind(0), strict=True)).__getitem__  # [N, 3] each

    def _cuts_experts(self, policy: ComputePolicy | None, budget: float) -> bool:
        """Whether it limits experts: by itself, or by a budget that residual gates do not spend."""
        limited = policy is not None and policy.experts is not None
        return limited or (budget < 1.0 and self.gates is None)

    def _limit_table(
        self, experts: ExpertSpec, policy: ComputePolicy | None, budget: float
    ) -> Tensor:
        """float32 [M, 3] of one policy; of several limits the strictest holds."""
        key = (policy, budget)
        if key not in self._limit_tables:
            if len(self._limit_tables) >= _MOST_RULES:
                self._limit_tables.clear()
            own = None if policy is None else policy.expert_policy
            row = _unlimited(experts) if own is None else own.limits_row(experts.experts_per_token)
            table = torch.tensor(row).repeat(len(experts.layers), 1)
            if self.gates is None and self.calibration is not None:
                table[:, 2] = torch.minimum(table[:, 2], self.calibration.mass(budget))
            self._limit_tables[key] = table
        return self._limit_tables[key]


def _unlimited(experts: ExpertSpec) -> tuple[float, float, float]:
    return float(experts.experts_per_token), math.inf, math.inf


def _repeated(trace: Trace) -> dict[int, tuple[Tensor, Tensor]] | None:
    ids, weights = trace.experts, trace.expert_weights
    if ids is None or weights is None:
        return None
    return dict(zip(trace.expert_plans, zip(ids, weights, strict=True), strict=True))
