"""Gates by name, and the gate that a model folder describes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.format.spec.experts import ExpertSpec, RouterSpec
from pyruntime.gates.experts import topk
from pyruntime.gates.experts.base import AuctionGate, base_greedy
from pyruntime.gates.experts.dselect import DSelectGate, StaticGate
from pyruntime.gates.experts.expert_choice import ExpertChoiceGate
from pyruntime.gates.experts.gate import Gate
from pyruntime.gates.experts.hash import HashGate
from pyruntime.gates.experts.hierarchical import HierarchicalGate, PrototypeGate
from pyruntime.gates.experts.logits import Linear
from pyruntime.gates.experts.sparse_mixer import SparseMixerGate
from pyruntime.gates.experts.threshold import ThresholdGate
from pyruntime.gates.experts.topk import TopKGate
from pyruntime.ops.topk import TopK
from pyruntime.ops.weight import Weight

GATES: dict[str, Callable[..., Gate]] = {
    "switch": topk.switch,
    "topk": topk.top_k,
    "softmax_of_chosen": topk.softmax_of_chosen,
    "sigmoid_of_chosen": topk.sigmoid_of_chosen,
    "noisy_topk": topk.softmax_of_chosen,
    "adaptive": topk.adaptive,
    "grouped": topk.grouped,
    "ktop1": PrototypeGate,
    "sam": HierarchicalGate,
    "base_greedy": base_greedy,
    "base_auction": AuctionGate,
    "hash": HashGate,
    "dts": ThresholdGate,
    "dselect_k": DSelectGate,
    "dselect_static": StaticGate.dselect,
    "sparse_mixer": SparseMixerGate,
    "expert_choice": ExpertChoiceGate,
}


def constructor_of(kind: str) -> Callable[..., Gate]:
    """What makes a gate of that kind.

    Raises:
        InvalidInput: an unknown kind, with those that are known.
    """
    if kind not in GATES:
        raise InvalidInput(f"gate: unknown kind {kind!r}; known are {', '.join(sorted(GATES))}")
    return GATES[kind]


def gate_of(
    spec: ExpertSpec, weight: Weight, bias: Tensor | None, selection_bias: Tensor | None
) -> Gate:
    """The gate of a layer, as the runtime format describes it.

    Args:
        weight: the router matrix [E, H], in the model's dtype.
        bias: float32 [E] or None.
        selection_bias: float32 [E] or None.

    Raises:
        InvalidInput: a kind the format does not have, or tensors that contradict the spec.
    """
    rule = spec.router
    if weight.out_features != spec.num_experts:
        raise InvalidInput(
            f"router: the matrix has {weight.out_features} rows for {spec.num_experts} experts"
        )
    for name, wanted, given in (
        ("bias", rule.bias, bias),
        ("selection_bias", rule.selection_bias, selection_bias),
    ):
        if wanted != (given is not None):
            raise InvalidInput(
                f"router: {name} is {'missing' if wanted else 'given, but the spec has none'}"
            )
    router = Linear(weight, bias)
    if rule.kind == "sparse_mixer":
        return SparseMixerGate(router, rule.epsilon)
    if rule.kind != "topk":
        raise InvalidInput(f"router: unknown kind {rule.kind!r}; known are topk, sparse_mixer")
    return TopKGate(router, _top_k(spec.experts_per_token, rule, weight.dtype), selection_bias)


def _top_k(k: int, rule: RouterSpec, dtype: torch.dtype) -> TopK:
    return TopK(
        k=k,
        score=rule.score,
        over_chosen=rule.over_chosen,
        normalize=rule.normalize,
        epsilon=rule.epsilon,
        scale=rule.scale,
        groups=rule.groups,
        top_groups=rule.top_groups,
        group_score=rule.group_score,
        round_weights=rule.round_weights and dtype == torch.bfloat16,
    )
