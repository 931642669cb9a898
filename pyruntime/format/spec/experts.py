"""Mixture-of-experts layers: how tokens choose experts, and what an expert computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pyruntime.errors import FormatError


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """How router logits become expert choices and weights, all in float32.

    Attributes:
        kind: ``topk``, or ``sparse_mixer`` (Phi-3.5-MoE, two experts).
        score: of the logits: softmax, sigmoid (DeepSeek-V3), or sqrt_softplus.
        over_chosen: choose by logits, then take the softmax of the chosen ones alone.
        normalize: divide the weights of a token by their sum plus `epsilon`.
        scale: multiplies every weight.
        bias: the router matrix has a bias.
        selection_bias: a float32 bias that is added to the scores for choosing only.
        groups, top_groups, group_score: experts lie in groups of equal size; only those of the best
            `top_groups` groups may be chosen, a group being worth its best score ("max") or the
            sum of its two best ("sum2").
        round_weights: weights are rounded to the model's dtype, as the original code does.
        epsilon: of `normalize`; jitter threshold of sparse_mixer.
    """

    kind: Literal["topk", "sparse_mixer"] = "topk"
    score: Literal["softmax", "sigmoid", "sqrt_softplus"] = "softmax"
    over_chosen: bool = False
    normalize: bool = False
    scale: float = 1.0
    bias: bool = False
    selection_bias: bool = False
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "sum2"] = "max"
    round_weights: bool = False
    epsilon: float = 0.0


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """The expert layers of a decoder.

    Attributes:
        num_experts: routed experts of a layer.
        experts_per_token: k.
        intermediate_size: width of one routed expert.
        layers: the layers that have experts; the others have one feed-forward network.
        router: how experts are chosen.
        bias: experts have biases.
        activation: silu(gate) * up, or gpt-oss's clamped form with `alpha` and `limit`.
        shared_size: width of the network every token also runs; 0 for none.
        shared_gate: its output is multiplied by a sigmoid of the token.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    layers: tuple[int, ...]
    router: RouterSpec
    bias: bool = False
    activation: Literal["silu_mul", "swiglu_oai"] = "silu_mul"
    alpha: float = 1.702
    limit: float = 7.0
    shared_size: int = 0
    shared_gate: bool = False

    def __post_init__(self) -> None:
        router = self.router
        problems = [
            f"{name} must be at least 1, is {getattr(self, name)}"
            for name in ("num_experts", "experts_per_token", "intermediate_size")
            if getattr(self, name) < 1
        ]
        if self.experts_per_token > self.num_experts:
            problems.append(
                f"experts_per_token {self.experts_per_token} exceeds num_experts {self.num_experts}"
            )
        if router.groups < 1 or self.num_experts % router.groups:
            problems.append(f"{self.num_experts} experts do not form {router.groups} groups")
        elif not 1 <= router.top_groups <= router.groups:
            problems.append(f"top_groups {router.top_groups} must lie in [1, {router.groups}]")
        elif router.top_groups * (self.num_experts // router.groups) < self.experts_per_token:
            problems.append(
                f"{router.top_groups} groups hold fewer than {self.experts_per_token} experts"
            )
        if router.kind == "sparse_mixer" and self.experts_per_token != 2:
            problems.append("sparse_mixer chooses 2 experts per token")
        if sorted(set(self.layers)) != list(self.layers):
            problems.append(f"layers must rise, are {list(self.layers)}")
        if self.shared_gate and not self.shared_size:
            problems.append("shared_gate needs a shared expert")
        if problems:
            raise FormatError("experts: " + "; ".join(problems))
