"""Our own side of a whole-model benchmark: forward passes, and the engine around them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pyruntime.engine.engine import Engine, EngineConfig
from pyruntime.engine.request import Request, SamplingParams
from pyruntime.engine.runtime import Runtime, full_batch
from pyruntime.layers.batch import Batch
from pyruntime.layers.kv import BLOCK, PagedKV

STEP_TOKENS = 8192  # of one step: no prompt here is cut


@dataclass(slots=True)
class Forward:
    """Our forward passes; a cache per context, no engine."""

    runtime: Runtime
    kv: PagedKV | None = None
    contexts: list[list[int]] = field(default_factory=list)

    def logits(self, tokens: list[int]) -> Tensor:
        """Logits [V] after the tokens."""
        batch, blocks = full_batch([tokens])
        batch = replace(batch, logit_rows=torch.tensor([len(tokens) - 1]))
        kv = PagedKV(self.runtime.spec, blocks)
        router = self.runtime.router(batch, [None])
        return self.runtime.model.forward(batch, kv, router)[0]

    def context(self, contexts: list[list[int]], steps: int) -> None:
        """Cache the contexts, with room for the steps."""
        self.contexts = contexts
        self.kv = PagedKV(self.runtime.spec, self._blocks(steps) * len(contexts))
        self._run(contexts, 0, steps)

    def decode(self, tokens: list[int], steps: int) -> float:
        """Seconds of some steps; token i is appended to context i in each."""
        start, rows = time.perf_counter(), [[token] for token in tokens]
        for step in range(steps):
            self._run(rows, len(self.contexts[0]) + step, steps)
        return time.perf_counter() - start

    def _blocks(self, steps: int) -> int:
        return -(-(len(self.contexts[0]) + steps) // BLOCK)

    def _run(self, rows: list[list[int]], first: int, steps: int) -> None:
        assert self.kv is not None
        count, length, blocks = len(rows), len(rows[0]), self._blocks(steps)
        positions = torch.arange(first, first + length, dtype=torch.int32).repeat(count)
        sequences = torch.arange(count, dtype=torch.int32).repeat_interleave(length)
        tables = torch.arange(count * blocks, dtype=torch.int32).view(count, blocks)
        batch = Batch(
            tokens=torch.tensor([token for row in rows for token in row]),
            positions=positions,
            slots=sequences * blocks * BLOCK + positions,
            seq_ids=sequences,
            block_tables=tables[:, : -(-(first + length) // BLOCK)].contiguous(),
            logit_rows=torch.arange(1, count + 1) * length - 1,
        )
        router = self.runtime.router(batch, [None] * count)
        self.runtime.model.forward(batch, self.kv, router)


@dataclass(slots=True)
class Served:
    """Our engine, step by step: scheduler and sampler included."""

    runtime: Runtime

    def prefill(self, tokens: list[int]) -> float:
        """Seconds from a request to its first token."""
        engine = self._engine()
        start = time.perf_counter()
        engine.add_request(engine.request(tokens, _greedy(1)))
        engine.step()
        return time.perf_counter() - start

    def decode(self, contexts: list[list[int]], tokens: list[int], steps: int) -> float:
        """Seconds of some steps after the contexts were prefilled."""
        engine = self._engine()
        requests = [engine.request(context, _greedy(steps + 1)) for context in contexts]
        for request in requests:
            engine.add_request(request)
        while not all(request.num_output for request in requests):
            self._step(engine, requests, tokens)
        seconds = 0.0
        while engine.has_unfinished():
            start = time.perf_counter()
            self._step(engine, requests, tokens)
            seconds += time.perf_counter() - start
        return seconds

    def _engine(self) -> Engine:
        return Engine(self.runtime, EngineConfig(max_step_tokens=STEP_TOKENS))

    @staticmethod
    def _step(engine: Engine, requests: list[Request], tokens: list[int]) -> None:
        engine.step()
        for request, token in zip(requests, tokens, strict=True):
            if request.num_output:
                request.tokens[-1] = token


def _greedy(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
