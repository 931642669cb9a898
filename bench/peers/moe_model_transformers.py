"""A whole Qwen3-MoE in transformers as a peer, experts "eager" and "grouped_mm".

    PEER_PYTHON bench/peers/moe_model_transformers.py FOLDER THREADS

See moe_model_server for the commands.
"""

from __future__ import annotations

import time

import torch
import transformers
from moe_model_server import About, serve
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache


class Transformers:
    """One model, and the cached context that decoding starts from."""

    def __init__(self, arguments: list[str]) -> None:
        folder, threads = arguments
        torch.set_num_threads(int(threads))
        torch.set_grad_enabled(False)
        transformers.utils.logging.set_verbosity_error()
        self._model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self._cache = DynamicCache()
        self.about = About(
            {"transformers": transformers.__version__, "torch": torch.__version__},
            {"eager": "bfloat16", "grouped_mm": "bfloat16"},
            "the model's forward, logits of the last rows",
        )

    @torch.inference_mode()
    def _forward(self, arm: str, ids: Tensor, cache: DynamicCache) -> tuple[float, Tensor]:
        self._model.set_experts_implementation(arm)
        start = time.perf_counter()
        out = self._model(ids, past_key_values=cache, logits_to_keep=1)
        return time.perf_counter() - start, out.logits

    def logits(self, arm: str, tokens: list[int]) -> list[float]:
        """See Engine."""
        _, found = self._forward(arm, torch.tensor([tokens]), DynamicCache())
        values: list[float] = found[0, -1].float().tolist()
        return values

    def prefill(self, arm: str, tokens: list[int]) -> float:
        """See Engine."""
        return self._forward(arm, torch.tensor([tokens]), DynamicCache())[0]

    def context(self, arm: str, tokens: list[list[int]]) -> None:
        """See Engine."""
        self._cache = DynamicCache()
        self._forward(arm, torch.tensor(tokens), self._cache)

    def decode(self, arm: str, tokens: list[int], steps: int) -> float:
        """See Engine."""
        ids = torch.tensor(tokens)[:, None]
        seconds = sum(self._forward(arm, ids, self._cache)[0] for _ in range(steps))
        self._cache.crop(-steps)
        return seconds


if __name__ == "__main__":
    serve(Transformers)
