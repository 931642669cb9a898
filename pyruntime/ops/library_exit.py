"""``torch.ops.pyruntime.plan_exit``; `pyruntime.ops.library` imports this module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from pyruntime import ops
from pyruntime.ops.exit import Composition, Criterion, ExitHead, ExitRule
from pyruntime.ops.library import _fake_index, _index, _op
from pyruntime.ops.weight import Weight


def _fake_exit(
    x: Tensor,
    state: Tensor,
    limits: Tensor,
    criterion: str,
    strict: bool = False,
    gate: Sequence[float] | None = None,
    composition: str = "mass_sum",
    rows: Tensor | None = None,
    weight: Tensor | None = None,
    out_features: int = 0,
    *_: object,
) -> tuple[Tensor, ...]:
    count = state.shape[0]
    classes = x.shape[1] if weight is None else out_features - (criterion == "learned")
    sizes = [(count, classes), (count,), (count, 3)]
    kept, offsets, inverse = _fake_index(x, count, 1, 1)
    logits, confidence, after = (x.new_empty(size, dtype=torch.float32) for size in sizes)
    return logits, confidence, after, kept, offsets, inverse


@_op(_fake_exit)
def plan_exit(
    x: Tensor,
    state: Tensor,
    limits: Tensor,
    criterion: str,
    strict: bool = False,
    gate: Sequence[float] | None = None,
    composition: str = "mass_sum",
    rows: Tensor | None = None,
    weight: Tensor | None = None,
    out_features: int = 0,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logits [N, C], confidence [N], the new state [N, 3], rows [N], offsets [2], inverse [N, 1]).

    Of a rule's and a head's fields; ``weight`` is a `Weight`'s data. The new total is the logits.
    """
    rule = ExitRule(
        cast(Criterion, criterion),
        strict,
        None if gate is None else cast(tuple[float, float, float, float, float], tuple(gate)),
        cast(Composition, composition),
    )
    head = None
    if weight is not None:
        layout = "dense" if weight.dim() == 3 else "panel"
        matrix = Weight(weight, out_features, x.shape[1], layout)
        head = ExitHead(matrix, bias, norm_weight, norm_bias, eps)
    after = state.clone(memory_format=torch.contiguous_format)
    added = None if total is None else total.clone(memory_format=torch.contiguous_format)
    given = x.contiguous()
    logits, confidence, plan = ops.plan_exit(
        given, rule, after, limits.contiguous(), head, rows, added
    )
    if logits is given:
        logits = logits.clone()  # no result of an op may be its argument
    return logits, confidence, after, *_index(plan, state.shape[0])
