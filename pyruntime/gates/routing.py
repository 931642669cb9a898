"""The router: asked once per layer and branch, answers with a Plan and remembers it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from pyruntime.gates.budget import NEVER, batch_quantile, exact_k, seq_quantile
from pyruntime.gates.experts import Gate
from pyruntime.gates.policy import ComputePolicy
from pyruntime.plan import Plan

# scores [N] of (layer, branch) -> thresholds float32 [] or [N], or a keep mask bool [N].
Rule = Callable[[int, int, Tensor], Tensor]


@dataclass(slots=True, eq=False)
class Router:
    """Decides which rows of a step run each branch.

    Attributes:
        ops: implementation of the planners.
        num_rows: N.
        rule: None lets every row run.
        copy_kv: keys and values of skipped rows come from the layer below.
        packed_below: kept share from which running every row is measured to be faster than packing;
            the plan, and so the result, is the same either way.
        plans: what was decided, by (layer, branch) in order of execution; filled as the model runs.
        ran_dense: the (layer, branch) pairs that ran every row although some were skipped.
        limits: of a layer, how many of its chosen experts each row may use: float32 [N, 3], see
            `ops.plan_topk`. None leaves every choice to the gate.
        repeated: choices to repeat in place of the gates' own, by layer: int32 and float32 [N, K].
        expert_plans: by expert layer, the plan over the R rows that reached it, and those rows,
            int64 [R], or None for all.
    """

    ops: ModuleType
    num_rows: int
    rule: Rule | None = None
    copy_kv: bool = False
    packed_below: float = 1.0
    plans: dict[tuple[int, int], Plan] = field(default_factory=dict)
    ran_dense: set[tuple[int, int]] = field(default_factory=set)
    limits: Callable[[int], Tensor] | None = None
    repeated: Mapping[int, tuple[Tensor, Tensor]] | None = None
    expert_plans: dict[int, tuple[Plan, Tensor | None]] = field(default_factory=dict)
    every_row: Plan = field(init=False)

    def __post_init__(self) -> None:
        self.every_row = Plan.all(self.num_rows)

    def plan(self, layer: int, branch: int, scores: Tensor | None, weighted: bool) -> Plan:
        """Plan of branch 0 (attention) or 1 (MLP); scores float32 [N], None for an ungated branch.

        Args:
            weighted: the score of a row is the combine weight of its result.
        """
        everyone = self.every_row
        if scores is None:
            plan = everyone
        elif self.rule is None:
            plan = everyone
            if weighted:
                plan = Plan(
                    everyone.rows, everyone.offsets, scores, everyone.inverse, self.num_rows,
                    self.num_rows,
                )  # fmt: skip
        else:
            decision = self.rule(layer, branch, scores)
            if decision.dtype == torch.bool:  # said row by row: no score, even NaN, overrules it
                plan = self.ops.plan_partition(torch.where(decision, 0, -1).int(), 1)
                if weighted:
                    plan = dataclasses.replace(plan, weights=scores[decision])
            else:
                plan = self.ops.plan_threshold(scores, decision, weighted)
        self.plans[layer, branch] = plan
        return plan

    def experts(
        self, layer: int, gate: Gate, x: Tensor, run: Plan, tokens: Tensor, sequences: Tensor
    ) -> Plan:
        """Plan of an expert layer over its R rows.

        Args:
            x: [R, d], the rows that reach the layer.
            run: which of the N source rows they are.
            tokens, sequences: int64 and int32 [N], of the source rows.
        """
        everyone = x.shape[0] == self.num_rows
        rows = None if everyone else run.rows.long()

        def of(source: Tensor) -> Tensor:
            return source if rows is None else source[rows]

        if self.repeated is not None:
            ids, weights = self.repeated[layer]
            plan: Plan = self.ops.plan_partition(of(ids), gate.num_experts, of(weights))
        else:
            plan = gate.plan(
                self.ops,
                x,
                tokens=of(tokens),
                sequences=of(sequences),
                limits=None if self.limits is None else of(self.limits(layer)),
            )
        self.expert_plans[layer] = plan, rows
        return plan

    def packs(self, layer: int, branch: int, plan: Plan) -> bool:
        """Whether to run packed rows only; otherwise every row runs and the plan picks results."""
        kept = plan.kept
        if kept == self.num_rows or kept < self.packed_below * self.num_rows:
            return True
        self.ran_dense.add((layer, branch))
        return False


def calibrated_rule(tau: Tensor) -> Rule:
    """Fixed thresholds, float32 [L, 2] for all rows or [L, 2, N]: causal and batch-invariant."""
    rows = tau.contiguous()
    table = [list(layer.unbind(0)) for layer in rows.unbind(0)]
    return lambda layer, branch, scores: table[layer][branch]


def replay_rule(kept: Tensor) -> Rule:
    """Decisions recorded before, bool [L, 2, N], whatever the scores say."""
    return lambda layer, branch, scores: kept[layer, branch]


def quantile_rule(
    ops: ModuleType,
    policy: ComputePolicy,
    skip: float,
    valid: Tensor | None,
    sequences: Tensor,
    fallback: Tensor | None,
) -> Rule:
    """The published non-causal rules over the rows of one call.

    Args:
        policy: its mode is batch_quantile, seq_quantile or exact_k.
        skip: skip ratio.
        valid: bool [N], False for protected rows; None when every row is valid.
        sequences: int32 [N].
        fallback: calibrated thresholds float32 [L, 2] for single-row sequences of seq_quantile;
            None never skips them.
    """

    def rule(layer: int, branch: int, scores: Tensor) -> Tensor:
        if not policy.may_skip(layer, branch):
            return NEVER
        if policy.mode == "exact_k":
            return exact_k(scores, valid, skip)
        if policy.mode == "seq_quantile":
            single = NEVER if fallback is None else fallback[layer, branch]
            return seq_quantile(ops, scores, valid, skip, sequences, single)
        return batch_quantile(ops, scores, valid, skip)

    return rule
