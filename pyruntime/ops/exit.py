"""The rule by which a row leaves early, and the head that its logits come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.ops.weight import Weight

Criterion = Literal["jei_dnn", "max_prob", "max_logit", "entropy", "margin", "patience", "learned"]
Composition = Literal["mass_sum", "independent"]

CRITERIA: Final[tuple[str, ...]] = get_args(Criterion)
COMPOSITIONS: Final[tuple[str, ...]] = get_args(Composition)


@dataclass(frozen=True, slots=True)
class ExitRule:
    """How `plan_exit` turns the logits of a row into a confidence, and compares it.

    Attributes:
        criterion: what the confidence is made of; see `pyruntime.ops.reference.plan_exit`.
        strict: a row leaves above its threshold, and not already at it.
        gate: of jei_dnn alone: four weights, of the largest probability, the entropy, the margin
            and the entropy of the squared probabilities, then the bias.
        composition: of jei_dnn alone: what the gates that a row passed before do to this one.
        flags: all but the numbers, as the kernels read them; derived.
    """

    criterion: Criterion
    strict: bool = False
    gate: tuple[float, float, float, float, float] | None = None
    composition: Composition = "mass_sum"
    flags: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse what no row could be judged by.

        Raises:
            InvalidInput: naming the field, what it may be and what it is.
        """
        if self.criterion not in CRITERIA:
            raise InvalidInput(
                f"ExitRule: criterion must be one of {CRITERIA}, got {self.criterion!r}"
            )
        if self.composition not in COMPOSITIONS:
            raise InvalidInput(
                f"ExitRule: composition must be one of {COMPOSITIONS}, got {self.composition!r}"
            )
        if (self.gate is None) == (self.criterion == "jei_dnn"):
            raise InvalidInput(
                f"ExitRule: jei_dnn has a gate and no other criterion has one, got {self.gate} for "
                f"{self.criterion!r}"
            )
        if self.gate is not None and not (len(self.gate) == 5 and all(map(isfinite, self.gate))):
            raise InvalidInput(f"ExitRule: gate must be five finite numbers, got {self.gate}")
        # Bit by bit as csrc/ops.h and csrc/cuda/exit.cu have it.
        flags = CRITERIA.index(self.criterion)
        flags |= self.strict << 3 | (self.composition == "independent") << 4
        object.__setattr__(self, "flags", flags)

    @property
    def learned(self) -> bool:
        """Whether the last output of the head is a score and no logit."""
        return self.criterion == "learned"


@dataclass(frozen=True, slots=True, eq=False)
class ExitHead:
    """Layer norm and linear layer from a class row to its logits, all in float32.

    Attributes:
        weight: one float32 matrix [N, D]; N is C, or C + 1 where the rule is learned: the last
            output is its score.
        bias: float32 [N], or None for 0.
        norm_weight: float32 [D], or None: rows are multiplied as they are.
        norm_bias: float32 [D], or None for 0; needs ``norm_weight``.
        eps: of the norm, added to the variance.
    """

    weight: Weight
    bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    eps: float = 1e-5

    def __post_init__(self) -> None:
        """Refuse a head that no kernel could run.

        Raises:
            InvalidInput: naming the field, what it may be and what it is.
        """
        weight = self.weight
        if weight.dtype != torch.float32 or weight.segments != 1 or weight.interleaved:
            raise InvalidInput(
                f"ExitHead: weight must be one float32 matrix, got {weight.segments} of "
                f"{weight.dtype}, interleaved={weight.interleaved}"
            )
        if not weight.data.is_contiguous():
            raise InvalidInput("ExitHead: weight must be contiguous")
        outputs, width = weight.out_features, weight.in_features
        named = {"bias": outputs, "norm_weight": width, "norm_bias": width}
        for name, size in named.items():
            vector = getattr(self, name)
            if vector is not None and (
                vector.dtype != torch.float32
                or vector.shape != (size,)
                or not vector.is_contiguous()
                or vector.device != weight.data.device
            ):
                raise InvalidInput(
                    f"ExitHead: {name} must be contiguous torch.float32 [{size}] on "
                    f"{weight.data.device}, got {vector.dtype} {list(vector.shape)} on "
                    f"{vector.device}"
                )
        if self.norm_bias is not None and self.norm_weight is None:
            raise InvalidInput("ExitHead: norm_bias needs norm_weight, got None")
        if not (isfinite(self.eps) and self.eps > 0):
            raise InvalidInput(f"ExitHead: eps must be positive and finite, got {self.eps}")


def exit_shape(
    x: Tensor, rule: ExitRule, head: ExitHead | None, rows: Tensor | None
) -> tuple[int, int]:
    """N and C of a call of `plan_exit`.

    Raises:
        InvalidInput: the logits cannot come from x.
    """
    if head is not None:
        outputs, width = head.weight.out_features, head.weight.in_features
        if x.dim() != 2 or x.shape[1] != width:
            raise InvalidInput(f"plan_exit: x must be [T, {width}], got {list(x.shape)}")
        if outputs <= rule.learned:
            raise InvalidInput(
                f"plan_exit: {rule.criterion} needs a head of more outputs, got {outputs}"
            )
        return (x if rows is None else rows).shape[0], outputs - rule.learned
    if (
        x.dim() != 2
        or x.dtype != torch.float32
        or x.shape[1] < 1
        or rows is not None
        or rule.learned
    ):
        raise InvalidInput(
            f"plan_exit: without a head x must be float32 [N, C], rows None and the rule not "
            f"learned, got {x.dtype} {list(x.shape)}, "
            f"{None if rows is None else list(rows.shape)} and {rule.criterion}"
        )
    return x.shape[0], x.shape[1]
