"""What the tests of early exit share: arguments of plan_exit, and whole networks of heads."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from pyruntime.ops import ExitHead, ExitRule, Weight
from pyruntime.ops.exit import COMPOSITIONS, CRITERIA
from pyruntime.plan import Plan
from tests.ops.strategies import F32, dtypes, generator, normal, seeds

GATE = (1.5, -0.75, 0.5, 0.25, -1.0)
OFFICIAL = {"mass_sum": 1.0, "independent": 0.5}
Result = tuple[Tensor, Tensor, Plan]


def rule_of(criterion: str, composition: str = "mass_sum", strict: bool = False) -> ExitRule:
    gate = GATE if criterion == "jei_dnn" else None
    return ExitRule(criterion, strict, gate, composition)  # type: ignore[arg-type]


def limits_of(count: int, threshold: float, tau: float = 0.5) -> Tensor:
    return torch.tensor([[threshold, 1.0 / tau]]).repeat(count, 1)


@dataclass(frozen=True)
class ExitCase:
    """Arguments of plan_exit."""

    x: Tensor
    rule: ExitRule
    state: Tensor
    limits: Tensor
    head: ExitHead | None = None
    rows: Tensor | None = None
    total: Tensor | None = None

    @property
    def count(self) -> int:
        return self.state.shape[0]

    def run(self, ops: ModuleType) -> tuple[Result, Tensor, Tensor | None]:
        """Results, state and total; the case itself is left as it was."""
        state, total = self.state.clone(), None if self.total is None else self.total.clone()
        result = ops.plan_exit(self.x, self.rule, state, self.limits, self.head, self.rows, total)
        return result, state, total

    def to(self, device: str) -> ExitCase:
        head = self.head
        if head is not None:  # a GPU takes the matrix as it is
            vectors = {
                name: None if (v := getattr(head, name)) is None else v.to(device)
                for name in ("bias", "norm_weight", "norm_bias")
            }
            matrix = head.weight.dense().contiguous().to(device)
            size = head.weight.out_features, head.weight.in_features
            head = ExitHead(Weight(matrix, *size, "dense"), **vectors, eps=head.eps)
        named = {
            name: None if (v := getattr(self, name)) is None else v.to(device)
            for name in ("x", "state", "limits", "rows", "total")
        }
        return ExitCase(rule=self.rule, head=head, **named)  # type: ignore[arg-type]

    def take(self, ids: Tensor) -> ExitCase:
        """The same rows in another batch."""
        ids = ids.long()
        rows = torch.arange(self.count).int() if self.rows is None else self.rows
        return replace(
            self,
            x=self.x[ids] if self.head is None else self.x,
            state=self.state[ids],
            limits=self.limits[ids],
            rows=None if self.head is None else rows[ids],
            total=None if self.total is None else self.total[ids],
        )


def head_of(seed: int, outputs: int, width: int, bias: bool, norm: int) -> ExitHead:
    """norm: none, weights alone, or weights and biases."""
    weight = Weight.pack(normal(seed, outputs, width) / width**0.5 * 3)
    return ExitHead(
        weight,
        normal(seed + 1, outputs) if bias else None,
        1 + normal(seed + 2, width) / 4 if norm else None,
        normal(seed + 3, width) / 4 if norm == 2 else None,
        1e-5,
    )


@st.composite
def exit_cases(draw: st.DrawFn, headless: bool | None = None, most: int = 12) -> ExitCase:
    """Any rule; half of the bare logits have ties and all that breaks comparisons."""
    criterion = draw(st.sampled_from(CRITERIA))
    bare = draw(st.booleans()) if headless is None else headless
    if bare and criterion == "learned":
        criterion = "max_prob"
    rule = rule_of(criterion, draw(st.sampled_from(COMPOSITIONS)), draw(st.booleans()))
    count, classes = draw(st.integers(0, most)), draw(st.sampled_from([1, 2, 3, 10, 31, 33, 100]))
    seed = draw(seeds)
    state = torch.rand(count, 3, generator=generator(seed))
    state[:, 1:] = (state[:, 1:] * 4).floor()
    threshold = draw(st.sampled_from([math.nan, -math.inf, 0.0, 0.3, 0.5, 0.9, 1.0, 3.0, -0.6]))
    limits = torch.where(
        torch.rand(count, 1, generator=generator(seed + 1)) < 0.3,
        torch.rand(count, 2, generator=generator(seed + 2)) * 2,
        limits_of(count, threshold),
    )
    total = normal(seed + 3, count, classes) if draw(st.booleans()) else None
    spread = draw(st.sampled_from([0.0, 1.0, 6.0, 60.0, 1e30]))
    if bare:
        logits = normal(seed + 4, count, classes) * spread
        if draw(st.booleans()):
            values = [0.0, -0.0, 1.0, 3.0, -3e38, 3e38, math.nan, math.inf, -math.inf, 1e-40]
            special = torch.tensor(values[: draw(st.integers(3, 10))])
            pick = torch.randint(special.numel(), logits.shape, generator=generator(seed))
            logits = special[pick]
        return ExitCase(logits, rule, state, limits, total=total)
    width, length = draw(st.sampled_from([1, 16, 33, 100])), draw(st.integers(1, 20))
    gathered = draw(st.booleans())
    x = normal(seed + 5, length if gathered else count, width, dtype=draw(dtypes))
    rows = torch.randint(length, (count,), generator=generator(seed + 6)).int()
    head = head_of(
        seed + 7, classes + rule.learned, width, draw(st.booleans()), draw(st.integers(0, 2))
    )
    return ExitCase(x, rule, state, limits, head, rows if gathered else None, total)


def levels(
    ops: ModuleType, rule: ExitRule | list[ExitRule], logits: Tensor, limits: Tensor
) -> Tensor:
    """Head at which every row leaves, int64 [N]; G for none.

    Args:
        logits: [G, N, C], what head g says to row n.
        limits: [N, 2]. Rows that left are gone: states are compacted as an engine does.
    """
    heads, count, _ = logits.shape
    out = torch.full((count,), heads)
    alive, state = torch.arange(count), torch.zeros(count, 3, dtype=F32)
    for g in range(heads):
        at = rule[g] if isinstance(rule, list) else rule
        plan = ops.plan_exit(logits[g, alive].contiguous(), at, state, limits[alive].contiguous())[
            2
        ]
        out[alive[plan.inverse[:, 0] < 0]] = g
        kept = plan.rows[: int(plan.offsets[1])].long()
        alive, state = alive[kept], state[kept].contiguous()
    return out


def share_rules(shares: list[float], composition: str) -> list[ExitRule]:
    """jei_dnn gates that say these shares whatever they see."""
    return [
        ExitRule("jei_dnn", False, (0, 0, 0, 0, math.log(g / (1 - g))), composition)  # type: ignore[arg-type]
        for g in shares
    ]


# Spec vectors, run by every backend: features of logits, order p1, H, margin, H of the squares.
FEATURES: list[tuple[list[float], list[float]]] = [
    ([2, 1, 0, -1], [0.64391428, 0.94753695, 0.40703145, 0.45542863]),
    ([0, 0, 0, 0], [0.25, 1.3862944, 0, 1.3862944]),
    ([10, -10, 0, 0], [0.99990916, 9.9879899e-4, 0.99986374, 8.2446e-8]),
]
# Gates' shares, the level, and the sum of the shares of the gates that were passed.
SHARES: list[tuple[list[float], int]] = [
    ([0.05, 0.2, 0.1, 0.3, 0.1, 0.2], 5),
    ([0.45, 0.05, 0.55, 0.1, 0.1, 0.1], 2),
    ([0.3] * 6, 2),
    ([0.4] * 6, 1),
    ([0.9] * 6, 0),
    ([0.02, 0.03, 0.04, 0.05, 0.06, 0.9], 5),
    ([0.1] * 6, 6),
]
# What every head names, the patience, the level.
PATIENCE: list[tuple[str, int, int]] = [
    ("aaab", 2, 2),
    ("abbb", 2, 3),
    ("abab", 2, 4),
    ("aa", 1, 1),
    ("aaaa", 3, 3),
]


def features(ops: ModuleType, logits: list[float], **place: Any) -> list[float]:
    """p1, H, margin and H of the squares, the last by the gate that sees nothing else."""
    device = place.get("device", "cpu")
    x = torch.tensor([logits], dtype=F32, device=device)
    out = []
    for criterion in ("max_prob", "entropy", "margin"):
        state = torch.zeros(1, 3, device=device)
        confidence = ops.plan_exit(x, rule_of(criterion), state, limits_of(1, math.nan).to(device))[
            1
        ]
        out.append(float(confidence[0]))
    out[1] = -out[1]
    rule, state = ExitRule("jei_dnn", gate=(0, 0, 0, 1, 0)), torch.zeros(1, 3, device=device)
    share = float(ops.plan_exit(x, rule, state, limits_of(1, math.nan, 1.0).to(device))[1][0])
    return [*out, math.log(share / (1 - share))]


def patience_logits(named: str) -> Tensor:
    """[G, 1, 3]: head g is for the g-th letter."""
    return torch.eye(3)[[ord(letter) - ord("a") for letter in named]][:, None]
