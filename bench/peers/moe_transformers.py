"""transformers' Qwen3MoeSparseMoeBlock as a peer: router and experts, "eager" and "grouped_mm".

    PEER_PYTHON bench/peers/moe_transformers.py THREADS

The third implementation, batched_mm, copies a whole expert per token and choice on a CPU: it is no
baseline. See moe_server for the commands.
"""

from __future__ import annotations

import torch
import transformers
from moe_case import Call, Shape, Weights
from moe_server import About, TorchThreads, serve
from torch import Tensor
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock


class Block:
    """One block; its experts run as the configuration says at the call."""

    def __init__(self, shape: Shape, weights: Weights) -> None:
        config = Qwen3MoeConfig(
            hidden_size=shape.hidden, moe_intermediate_size=shape.inner,
            num_experts=shape.experts, num_experts_per_tok=shape.top_k, norm_topk_prob=True,
            experts_implementation="eager",
        )  # fmt: skip
        with torch.device("meta"):
            self._block = Qwen3MoeSparseMoeBlock(config)
        state = {
            "gate.weight": weights.router,
            "experts.gate_up_proj": torch.cat([weights.gate, weights.up], dim=1),
            "experts.down_proj": weights.down,
        }
        self._block.load_state_dict(state, assign=True)
        self._block.eval()

    def prepare(self, arm: str, part: str, x: Tensor) -> Call:
        """See Layer."""
        copy = x.clone()
        if part == "router":
            return lambda: self._block.gate(copy)

        def run() -> Tensor:
            found: Tensor = self._block(copy[None])
            return found

        self._block.experts.config._experts_implementation = arm
        return run


class Transformers(TorchThreads):
    """Qwen3-MoE blocks."""

    def __init__(self, threads: int) -> None:
        super().__init__()
        self.about = About(
            {"transformers": transformers.__version__, "torch": torch.__version__},
            {"eager": "bfloat16", "grouped_mm": "bfloat16"},
            ("layer", "router"),
            "router, softmax, top-k, experts, weighted sum: the module's forward",
        )

    def load(self, shape: Shape, weights: Weights) -> Block:
        """See Engine."""
        return Block(shape, weights)


if __name__ == "__main__":
    serve(Transformers)
