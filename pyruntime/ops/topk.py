"""The rule by which a token picks its experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import Final, Literal, get_args

from pyruntime.errors import InvalidInput

Score = Literal["none", "softmax", "sigmoid", "sqrt_softplus"]
GroupScore = Literal["max", "sum2"]

SCORES: Final[tuple[str, ...]] = get_args(Score)
GROUP_SCORES: Final[tuple[str, ...]] = get_args(GroupScore)


@dataclass(frozen=True, slots=True)
class TopK:
    """How `plan_topk` turns the logits of a row into at most k weighted segments.

    Attributes:
        k: slots of a row.
        score: what is made of the logits before segments are compared.
        over_chosen: segments are chosen by their logits, and ``score``, which must be softmax, runs
            over the chosen ones alone (GraniteMoE, gpt-oss).
        normalize: divide the weights by ``epsilon`` plus their sum.
        epsilon: see ``normalize``.
        scale: multiplies the weights.
        groups: segments form this many groups of neighbours (DeepSeek); 1 for none.
        top_groups: segments of the other groups are not chosen.
        group_score: the worth of a group: its best segment, or the sum of its two best.
        round_weights: the weights are rounded to bfloat16, as code does that casts them.
        renormalize_used: sums of weights run over the slots that limits leave; else over all k.
        flags: all but the numbers, as the kernels read them; derived.
    """

    k: int
    score: Score = "none"
    over_chosen: bool = False
    normalize: bool = False
    epsilon: float = 0.0
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_score: GroupScore = "max"
    round_weights: bool = False
    renormalize_used: bool = True
    flags: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse what no row could be planned by.

        Raises:
            InvalidInput: naming the field, what it may be and what it is.
        """
        if self.score not in SCORES:
            raise InvalidInput(f"TopK: score must be one of {SCORES}, got {self.score!r}")
        if self.group_score not in GROUP_SCORES:
            raise InvalidInput(
                f"TopK: group_score must be one of {GROUP_SCORES}, got {self.group_score!r}"
            )
        if self.k < 1:
            raise InvalidInput(f"TopK: k must be at least 1, got {self.k}")
        if not 1 <= self.top_groups <= self.groups:
            raise InvalidInput(
                f"TopK: top_groups must lie in [1, groups={self.groups}], got {self.top_groups}"
            )
        if self.over_chosen and self.score != "softmax":
            raise InvalidInput(f"TopK: over_chosen needs score='softmax', got {self.score!r}")
        if not (isfinite(self.epsilon) and self.epsilon >= 0 and isfinite(self.scale)):
            raise InvalidInput(
                "TopK: epsilon must be finite and not negative, and scale finite, got "
                f"{self.epsilon} and {self.scale}"
            )
        # Bit by bit as csrc/ops.h and csrc/cuda/topk.cuh have it.
        flags = SCORES.index(self.score)
        switches = (
            self.over_chosen,
            self.normalize,
            self.group_score == "sum2",
            self.round_weights,
            self.renormalize_used,
        )
        for bit, on in enumerate(switches, start=2):
            flags |= on << bit
        object.__setattr__(self, "flags", flags)

    def check(self, segments: int) -> None:
        """Refuse a number of segments that the rule cannot choose from.

        Raises:
            InvalidInput: k or the groups do not fit ``segments``.
        """
        if not self.k <= segments:
            raise InvalidInput(f"plan_topk: k must lie in [1, {segments}], got {self.k}")
        if self.groups == 1:
            return
        size = segments // self.groups
        if segments % self.groups or (self.group_score == "sum2" and size < 2):
            raise InvalidInput(
                f"plan_topk: {segments} segments do not form {self.groups} groups for "
                f"group_score={self.group_score!r}"
            )
        if self.k > self.top_groups * size:
            raise InvalidInput(
                f"plan_topk: k={self.k} segments cannot come from {self.top_groups} groups "
                f"of {size}"
            )
