"""Our own MoE layer, called as the peers are."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bench.peers.moe_case import Call, Shape, Weights
from pyruntime.ops import TopK, Weight
from pyruntime.ops.backend import backend
from pyruntime.plan import Plan

ops = backend("cpu")  # as a model holds it


def mapped(weights: dict[str, Weight]) -> dict[str, Weight]:
    """The same weights in a mapped file, which is where the loader of a model has them."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        path = Path(folder) / "weights.safetensors"
        save_file({name: weight.data for name, weight in weights.items()}, path)
        with safe_open(path, framework="pt") as file:  # the mapping outlives the name
            return {n: replace(w, data=file.get_tensor(n)) for n, w in weights.items()}


class Ours:
    """Our layer, bfloat16 and int8; see Layer of peers/moe_server."""

    def __init__(self, shape: Shape, weights: Weights) -> None:
        self._shape = shape
        self._rule = TopK(k=shape.top_k, score="softmax", normalize=True)
        wide = {"up": Weight.pack_gate_up(weights.gate, weights.up)}
        wide["down"] = Weight.pack(weights.down)
        narrow = {f"{name} int8": weight.quantize() for name, weight in wide.items()}
        placed = mapped({**wide, **narrow, "router": Weight.pack(weights.router)})
        self._router = placed["router"]
        self.experts = {
            "bfloat16": (placed["up"], placed["down"]),
            "int8": (placed["up int8"], placed["down int8"]),
        }

    def prepare(self, arm: str, part: str, x: Tensor, limit: Tensor | None = None) -> Call:
        """Copy x; the call runs a part: layer or router (with the plan)."""
        copy, (gate_up, down) = x.clone(), self.experts[arm]

        def plan() -> Plan:
            logits = ops.segment_matmul(copy, self._router, out_dtype=torch.float32)
            chosen: Plan = ops.plan_topk(logits, self._rule, None, limit)
            return chosen

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
