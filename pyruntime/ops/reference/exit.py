"""Early exit: class rows to logits, a confidence, and the plan of those that go on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.ops.exit import ExitHead, ExitRule, exit_shape
from pyruntime.ops.reference.plan import plan_partition
from pyruntime.ops.reference.score import exp, lane_sum, log, score
from pyruntime.plan import Plan

_LOWEST = -88.0  # exp is 0 there, and a product with it is not NaN


def plan_exit(
    x: Tensor,
    rule: ExitRule,
    state: Tensor,
    limits: Tensor,
    head: ExitHead | None = None,
    rows: Tensor | None = None,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor, Plan]:
    """What every row would answer, how sure it is of it, and which rows continue.

    A row leaves when its confidence reaches its threshold: at ``c >= t``, or ``c > t`` of a strict
    rule. NaN is no confidence and no threshold, so that a threshold of NaN means never; a row whose
    outputs are not all finite has the confidence NaN and leaves its state as it was, save that it
    agrees with no other head. With p the softmax of the logits, H the entropy in nats and p1, p2
    the two largest of p (p2 is 0 where there is one class), the confidence is

    ==========  =================================================================================
    max_prob    p1
    max_logit   the largest logit (the networkslab/dynn baselines compare it unscaled)
    entropy     -H(p) (BranchyNet arXiv 1709.01686, DeeBERT arXiv 2004.12993)
    margin      p1 - p2 (FREE arXiv 2310.05424)
    patience    how many heads in a row named the same class as the one before, this one included
                (PABEE arXiv 2006.04152); the first head compares with none and counts 0
    learned     sigmoid of the head's last output, which is no logit
    jei_dnn     of g = sigmoid(gate . [p1, H(p), p1 - p2, H(p^2 / sum p^2)] + bias), see below
    ==========  =================================================================================

    JEI-DNN (arXiv 2310.09163) makes g a share of a row's whole mass. ``mass_sum`` has the
    confidence S + g / tau, with S the sum of g of the gates before: at tau 0.5 and threshold 1 it
    leaves where the official recurrence does. ``independent`` has clip(g / P, 0, 1) * 0.5 / tau,
    with P the product of 1 - clip(g / P, 0, 1) of the gates before, and the threshold 0.5.

    Statistics and decision are single float32 operations in the order of
    `pyruntime.ops.reference.score`: equal logits are equal bits on every backend.

    Args:
        x: with a head, float32 or bfloat16 [T, D]; else the logits themselves, float32 [N, C].
        rule: see `ExitRule`.
        state: float32 [N, 3], zeros before the first head, mutated: S or 1 - P; the patience
            counter; 1 + the class that the head before named. Only what the rule reads is written.
        limits: float32 [N, 2]: the threshold, and 1 / tau of jei_dnn.
        head: see `ExitHead`.
        rows: int32 [N], the class row of each row's x; None where x has N rows. Needs a head.
        total: float32 [N, C], added to the logits first and then set to them (boosted networks add
            heads up); mutated. A learned score is not added to.

    Returns:
        logits float32 [N, C] (x itself without head and total), confidence float32 [N], and the
        plan of the rows that continue: one segment, ascending.

    Raises:
        InvalidInput: a shape does not fit.
    """
    count, classes = exit_shape(x, rule, head, rows)
    for name, tensor, width in (
        ("state", state, 3),
        ("limits", limits, 2),
        ("total", total, classes),
    ):
        if tensor is not None and tensor.shape != (count, width):
            raise InvalidInput(
                f"plan_exit: {name} must be [{count}, {width}], got {list(tensor.shape)}"
            )
    logits, learned = (x, None) if head is None else _outputs(x, rule, head, rows)
    if total is not None:
        logits = total.add_(logits).clone()
    finite = logits.isfinite().all(1)
    if learned is not None:
        finite &= learned.isfinite()
        learned = torch.where(finite, learned, 0.0)
    z = torch.where(finite[:, None], logits, 0.0)
    mass, counter, before = state.unbind(1)
    if rule.gate is not None:
        confidence = _jei_dnn(z, finite, rule.gate, rule, mass, limits[:, 1])
    elif rule.criterion == "patience":
        confidence = _patience(z, finite, counter, before)
    else:
        confidence = _of_one_head(z, learned, rule)
    confidence = torch.where(finite, confidence, torch.nan)
    threshold = limits[:, 0]
    leaves = confidence > threshold if rule.strict else confidence >= threshold
    return logits, confidence, plan_partition(torch.where(leaves, -1, 0).int(), 1)


def _outputs(
    x: Tensor, rule: ExitRule, head: ExitHead, rows: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Logits [N, C], and of a learned rule the scores [N]."""
    if rows is not None:
        outside = rows[(rows < 0) | (rows >= x.shape[0])]
        if outside.numel():
            raise InvalidInput(
                f"plan_exit: rows must lie in [0, {x.shape[0]}), got {int(outside[0])}"
            )
        x = x[rows.long()]
    wide = x.float()
    if head.norm_weight is not None:
        wide = F.layer_norm(wide, wide.shape[1:], head.norm_weight, head.norm_bias, head.eps)
    out = wide @ head.weight.dense()[0].T
    if head.bias is not None:
        out = out + head.bias
    return (out[:, :-1].contiguous(), out[:, -1]) if rule.learned else (out, None)


def _of_one_head(z: Tensor, learned: Tensor | None, rule: ExitRule) -> Tensor:
    """The confidence [N] of the criteria that know no other head."""
    if learned is not None:
        return score("sigmoid", learned)
    if rule.criterion == "max_logit":
        return z.amax(1)
    if rule.criterion == "entropy":
        return -_entropy(_below(z))
    largest, margin = _best_two(_below(z))
    return largest if rule.criterion == "max_prob" else margin


def _jei_dnn(
    z: Tensor,
    finite: Tensor,
    gate: tuple[float, float, float, float, float],
    rule: ExitRule,
    mass: Tensor,
    factor: Tensor,
) -> Tensor:
    """The confidence [N]; mass [N] is mutated."""
    below = _below(z)
    largest, margin = _best_two(below)
    logit = largest * gate[0] + _entropy(below) * gate[1]
    logit = logit + margin * gate[2]
    logit = logit + _entropy(below + below) * gate[3]
    share = score("sigmoid", logit + gate[4])
    if rule.composition == "mass_sum":
        confidence, after = mass + share * factor, mass + share
    else:
        left = 1.0 - mass
        hazard = (share / left).clamp(max=1.0)
        confidence, after = hazard * (0.5 * factor), 1.0 - left * (1.0 - hazard)
    mass.copy_(torch.where(finite, after, mass))
    return confidence


def _patience(z: Tensor, finite: Tensor, counter: Tensor, before: Tensor) -> Tensor:
    """The confidence [N]; counter and before [N] are mutated."""
    named = torch.where(finite, z.argmax(1) + 1.0, 0.0)
    counter.copy_(torch.where(finite & (named == before), counter + 1.0, 0.0))
    before.copy_(named)
    return counter.clone()


def _below(z: Tensor) -> Tensor:
    """Finite z [N, C] minus the largest of its row, no lower than what exp makes 0 of."""
    return (z - z.amax(1, keepdim=True)).clamp(min=_LOWEST)


def _best_two(below: Tensor) -> tuple[Tensor, Tensor]:
    """The largest probability and its lead on the second, both [N]; below as `_below` has it."""
    total = lane_sum(exp(below))[:, 0]
    second = below.topk(2).values[:, 1] if below.shape[1] > 1 else torch.full_like(total, _LOWEST)
    return 1.0 / total, (1.0 - exp(second)) / total


def _entropy(below: Tensor) -> Tensor:
    """Nats of the softmax of below, [N]."""
    values = exp(below)
    total = lane_sum(values)
    return (log(total) - lane_sum(below * values) / total)[:, 0]
