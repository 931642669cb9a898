"""Gates that are a score and a top-k rule: most of the field. One op decides for all of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.gates.experts.choice import Choice, weighted
from pyruntime.gates.experts.gate import Gate, RouterGate, Step
from pyruntime.gates.experts.logits import Router
from pyruntime.ops.topk import TopK
from pyruntime.plan import Plan


@dataclass(frozen=True, slots=True, eq=False)
class TopKGate(RouterGate):
    """Router logits under a `TopK` rule.

    Attributes:
        rule: how they become choices and weights.
        selection_bias: float32 [E] that is added to the scores for choosing only, or None.
        gap: a row stops at the first slot that leads the next one by more (adaptive gating).
        sigmoid: the weight is the sigmoid of a chosen logit. Choosing goes by the logit itself:
            sigmoids saturate, and then differ no more.
    """

    rule: TopK
    selection_bias: Tensor | None = None
    gap: float | None = None
    sigmoid: bool = False
    weights_input: bool = False
    identity_experts: int = 0

    def __post_init__(self) -> None:
        if self.rule.k > self.num_experts:
            raise InvalidInput(f"gate: cannot choose {self.rule.k} of {self.num_experts} experts")
        if not 0 <= self.identity_experts < self.num_experts:
            raise InvalidInput(
                f"gate: {self.identity_experts} identity experts of {self.num_experts} leave none"
            )

    @property
    def choices(self) -> int:
        return self.rule.k

    def decide(self, ops: ModuleType, x: Tensor, step: Step) -> Plan:
        if self.sigmoid:
            return Gate.decide(self, ops, x, step)
        return self._plan(ops, x, step.limits)

    def choose(self, ops: ModuleType, x: Tensor, step: Step) -> Choice:
        plan = self._plan(ops, x, None if self.sigmoid else step.limits)
        ids, weights = plan.choices(), plan.slot_weights()
        if not self.sigmoid:
            return Choice(ids, weights)
        return weighted(ops, ids, weights, TopK(self.choices, "sigmoid"), step.limits)

    def _plan(self, ops: ModuleType, x: Tensor, limits: Tensor | None) -> Plan:
        logits = self.router.logits(ops, x)
        if self.gap is not None:
            own = torch.tensor([torch.inf, self.gap, torch.inf], device=x.device).expand(len(x), 3)
            # fmin: a limit that is NaN is none.
            limits = (own if limits is None else torch.fmin(limits, own)).contiguous()
        plan: Plan = ops.plan_topk(logits, self.rule, self.selection_bias, limits)
        return plan


def switch(router: Router) -> TopKGate:
    """Switch Transformers: the most probable expert, weighted by its probability."""
    return TopKGate(router, TopK(1, "softmax"))


def top_k(
    router: Router,
    k: int,
    normalize: bool = True,
    scale: float = 1.0,
    selection_bias: Tensor | None = None,
    identity_experts: int = 0,
) -> TopKGate:
    """The k most probable experts: Mixtral (normalized), OLMoE (not), GShard, Tutel.

    Args:
        normalize: divide the k probabilities by their sum.
        scale: multiplies every weight.
        selection_bias, identity_experts: LongCat-Flash, whose last experts return their input.
    """
    rule = TopK(k, "softmax", normalize=normalize, scale=scale)
    return TopKGate(router, rule, selection_bias, identity_experts=identity_experts)


def softmax_of_chosen(router: Router, k: int) -> TopKGate:
    """The k largest logits and the softmax of these alone: gpt-oss, GraniteMoE.

    It is noisy top-k gating (arXiv 1701.06538) as well: its noise is for training only.
    """
    return TopKGate(router, TopK(k, "softmax", over_chosen=True))


def sigmoid_of_chosen(router: Router, k: int = 1, weights_input: bool = True) -> TopKGate:
    """The k largest logits, weighted by their sigmoids; Llama-4 weighs the experts' inputs."""
    return TopKGate(router, TopK(k), sigmoid=True, weights_input=weights_input)


def adaptive(router: Router, threshold: float, renormalize: bool) -> TopKGate:
    """Adaptive gating (EMNLP 2023): one expert where p_1 - p_2 > threshold, else two.

    Args:
        renormalize: weights are divided by the sum of those used; else probabilities as they are.
    """
    rule = TopK(2, "softmax", normalize=renormalize)
    return TopKGate(router, rule, gap=threshold)


def grouped(
    router: Router,
    k: int,
    groups: int,
    top_groups: int,
    scale: float = 1.0,
    selection_bias: Tensor | None = None,
    normalize: bool = True,
) -> TopKGate:
    """DeepSeek's group-limited routing: V3 with a selection bias, V2 without.

    Args:
        selection_bias: float32 [E]. V3: sigmoid scores, a group is worth its two best. None is V2:
            softmax scores, a group is worth its best, weights are never normalized.
        normalize: V3's norm_topk_prob.
    """
    limited = TopK(k, "softmax", scale=scale, groups=groups, top_groups=top_groups)
    if selection_bias is not None:
        limited = dataclasses.replace(
            limited, score="sigmoid", group_score="sum2", normalize=normalize, epsilon=1e-20
        )
    return TopKGate(router, limited, selection_bias)
