"""Zero-compute experts (LongCat-Flash): those of a plan that return their input."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from pyruntime.gates.experts.choice import slot_sum
from pyruntime.plan import Plan


def split_identity(ops: ModuleType, plan: Plan, identity_experts: int) -> tuple[Plan, Tensor]:
    """The plan of the experts that compute, and the weight of the input itself, float32 [N].

    Args:
        plan: of a gate whose last `identity_experts` experts return their input.
    """
    computing = plan.num_segments - identity_experts
    ids, weights = plan.choices(), plan.slot_weights()
    own = slot_sum(torch.where(ids >= computing, weights, 0.0))
    ids = ids.masked_fill(ids >= computing, -1)
    rest: Plan = ops.plan_partition(ids, computing, weights)
    return rest, own
