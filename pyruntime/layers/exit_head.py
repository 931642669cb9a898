"""One early exit: from hidden states to logits, a confidence and the plan of who continues."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.gates.exit import ExitState
from pyruntime.layers.norm import LayerNorm
from pyruntime.layers.packed import Packed
from pyruntime.layers.residual import Linear
from pyruntime.ops.exit import ExitHead, ExitRule
from pyruntime.ops.weight import Weight
from pyruntime.plan import Plan

CERTAIN = 100.0  # logit of the class that an exit of a constant class stands for; others have 0
_TINY = 1e-40  # see Ensemble


class Exit(NamedTuple):
    """What n images would answer at an exit, and which of them continue.

    Attributes:
        logits: float32 [n, C].
        confidence: float32 [n], see `pyruntime.ops.ExitRule`.
        plan: one segment over the n images: those that continue.
    """

    logits: Tensor
    confidence: Tensor
    plan: Plan


@dataclass(frozen=True, slots=True, eq=False)
class Ensemble:
    """Weighted mean of the answers of all exits so far (Zero Time Waste, arXiv 2106.05409).

    ``geometric``: sum of w_i log p_i, plus the bias. ``arithmetic``: the logarithm of sum of
    w_i p_i plus the bias, normalised. The weights are those that multiply: the ZTW code stores
    their logarithms (and the arithmetic bias's), and takes a mean in the geometric case.

    Attributes:
        weight: float32 [j + 1].
        bias: float32 [C].
    """

    kind: Literal["geometric", "arithmetic"]
    weight: Tensor
    bias: Tensor

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits float32 [n, C] of float32 [n, j + 1, C]."""
        logs = F.log_softmax(logits, dim=-1)
        weight = self.weight[:, None]
        if self.kind == "geometric":
            return (logs * weight).sum(1) + self.bias
        mean = (logs.exp() * weight).sum(1) + self.bias
        # The ZTW code adds it so that the logarithm stays finite.
        return (mean / mean.sum(1, keepdim=True) + _TINY).log()


@dataclass(frozen=True, slots=True, eq=False)
class VisionExit:
    """The head after one block and the rule by which images leave there.

    Attributes:
        head: of a row [D], or [D + C] behind a `cascade`; norms the row itself, if anything does.
        rule: see `pyruntime.ops.ExitRule`.
        mean_from: None reads the class row; P reads the mean of all rows but the first P.
        by_area: in that mean a row counts as often as the finest patches that it stands for.
        cascade: norm of the logits of the exit before, which the head also reads, or None.
        norm: of the row of a cascade, or None.
        sums: logits are added to those of the exit before.
        ensemble: what the rule reads in place of the head's own logits, or None.
        constant: (class, C) of all that leave here, or None: then the head has, before its score,
            one output of zeros, for a rule cannot do without a logit.
    """

    head: ExitHead
    rule: ExitRule
    mean_from: int | None = None
    by_area: bool = False
    cascade: LayerNorm | None = None
    norm: LayerNorm | None = None
    sums: bool = False
    ensemble: Ensemble | None = None
    constant: tuple[int, int] | None = None

    def __call__(self, ops: ModuleType, packed: Packed, state: ExitState, limits: Tensor) -> Exit:
        """Judge n images; `state` is mutated.

        Args:
            packed: their rows, read only.
            limits: float32 [n, 2], see `ops.plan_exit`.
        """
        x, rows = self._read(ops, packed, state)
        if self.ensemble is not None:
            own = _head_logits(ops, self.head, x, rows)
            state.history = torch.cat([_passed(state), own[:, None]], 1)
            x = self.ensemble(state.history)
            return Exit(*ops.plan_exit(x, self.rule, state.counters, limits))
        logits, confidence, plan = ops.plan_exit(
            x, self.rule, state.counters, limits, head=self.head, rows=rows,
            total=state.total if self.sums else None,
        )  # fmt: skip
        if self.constant is not None:
            number, classes = self.constant
            logits = torch.zeros(len(logits), classes)
            logits[:, number] = CERTAIN
        if state.history is not None:
            state.history = torch.cat([state.history, logits[:, None]], 1)
        return Exit(logits, confidence, plan)

    def _read(
        self, ops: ModuleType, packed: Packed, state: ExitState
    ) -> tuple[Tensor, Tensor | None]:
        """What the head reads: rows of the first result, all of them where the second is None."""
        x: Tensor = packed.x
        rows: Tensor | None = packed.first_rows
        if self.mean_from is not None:
            x, rows = mean_rows(packed, self.mean_from, self.by_area), None
        if self.cascade is None:
            return x, rows
        if self.norm is not None:
            row = self.norm(ops, x, rows=rows, out_dtype=torch.float32)
        else:
            row = (x if rows is None else x[rows.long()]).float()
        before = self.cascade(ops, _passed(state)[:, -1].contiguous())
        return torch.cat([row, before], 1), None


def _passed(state: ExitState) -> Tensor:
    """Logits of the exits before, float32 [n, j, C].

    Raises:
        InvalidInput: the state does not hold them.
    """
    if state.history is None:
        raise InvalidInput("exit: the head reads the logits of exits before, the state has none")
    return state.history


def _head_logits(ops: ModuleType, head: ExitHead, x: Tensor, rows: Tensor | None) -> Tensor:
    """Logits float32 [n, C] of the head on some rows of x, or on all."""
    if head.norm_weight is not None and head.norm_bias is not None:
        norm = LayerNorm(head.norm_weight, head.norm_bias, head.eps)
        x, rows = norm(ops, x, rows=rows, out_dtype=torch.float32), None
    if rows is not None:
        x = x[rows.long()]
    logits: Tensor = ops.segment_matmul(x.float(), head.weight, bias=head.bias)
    return logits


def mean_rows(packed: Packed, skip: int, by_area: bool = False) -> Tensor:
    """Mean of the rows of every image but its first `skip`, float32 [n, D].

    Image by image: the bits of one do not depend on how many there are.

    Args:
        by_area: a row counts as often as the finest patches that it stands for.
    """
    images = packed.x.split(packed.lengths)
    if by_area and packed.sizes is not None:
        shares = packed.sizes.split(packed.lengths)
        means = [
            (rows[skip:].float() * share[skip:, None]).sum(0) / share[skip:].sum()
            for rows, share in zip(images, shares, strict=True)
        ]
    else:
        means = [rows[skip:].float().mean(0) for rows in images]
    return torch.stack(means) if means else packed.x.new_empty(0, packed.x.shape[1]).float()


def constant_head(gate: Linear) -> tuple[Weight, Tensor]:
    """Weight and bias of an exit that only decides: an output of zeros, then the gate's."""
    row = gate.weight.dense()[0]
    weight = Weight.pack(torch.cat([torch.zeros_like(row), row]).contiguous())
    bias = torch.zeros(2)
    if gate.bias is not None:
        bias[1] = gate.bias[0]
    return weight, bias
