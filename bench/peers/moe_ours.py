"""Our own MoE layer, called as the peers are."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.peers.moe_case import Call, Shape, Weights
from pyruntime import ops
from pyruntime.ops import TopK, Weight
from pyruntime.plan import Plan


def choose(logits: Tensor, shape: Shape, limit: Tensor | None = None) -> Plan:
    """Softmax, top-k, renormalise."""
    rule = TopK(k=shape.top_k, score="softmax", normalize=True)
    return ops.plan_topk(logits, rule, None, limit)


class Ours:
    """Our layer, bfloat16 and int8; see Layer of peers/moe_server."""

    def __init__(self, shape: Shape, weights: Weights) -> None:
        self._shape, self._router = shape, Weight.pack(weights.router)
        wide = Weight.pack_gate_up(weights.gate, weights.up), Weight.pack(weights.down)
        self.experts = {"bfloat16": wide, "int8": tuple(w.quantize() for w in wide)}

    def prepare(self, arm: str, part: str, x: Tensor, limit: Tensor | None = None) -> Call:
        """Copy x; the call runs a part: layer or router (with the plan)."""
        copy, (gate_up, down) = x.clone(), self.experts[arm]

        def plan() -> Plan:
            logits = ops.segment_matmul(copy, self._router, out_dtype=torch.float32)
            return choose(logits, self._shape, limit)

        def layer() -> Tensor:
            chosen = plan()
            inner = ops.segment_matmul(copy, gate_up, chosen, gather=True, epilogue="silu_mul")
            packed = ops.segment_matmul(inner, down, chosen)
            out = torch.zeros_like(copy)
            ops.combine(packed, chosen, out)
            return out

        return plan if part == "router" else layer

    def expert_bytes(self, arm: str) -> float:
        """Bytes of one expert, with its scales."""
        tensors = [t for w in self.experts[arm] for t in (w.data, w.scale) if t is not None]
        return float(sum(t.nbytes for t in tensors)) / self._shape.experts
