"""One step on the model: schedule → tensors → logits → tokens.

The only module of the engine that knows how the model is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pyruntime.engine.kv import BlockManager
from pyruntime.engine.sampling import sample
from pyruntime.engine.scheduler import Slice
from pyruntime.layers.batch import Batch
from pyruntime.layers.kv import PagedKV

if TYPE_CHECKING:
    from pyruntime.engine.runtime import Runtime


class Runner:
    """Owns the cached keys and values; `blocks` says whose they are."""

    def __init__(self, runtime: Runtime, blocks: BlockManager) -> None:
        self._runtime = runtime
        self._blocks = blocks
        self._kv = PagedKV(runtime.spec, blocks.num_blocks, blocks.block_size)

    @torch.inference_mode()
    def run(self, slices: Sequence[Slice]) -> list[int]:
        """Runs the rows; returns one token per slice that samples, in order.

        Mutates the cache and, in each request, computed, its counts of compute and its generator.
        """
        batch = build_batch(slices, self._blocks)
        self._kv.clear(_half_filled(slices, self._blocks))
        policies = [s.request.policy for s in slices]
        router = self._runtime.router(batch, policies)
        logits = self._runtime.model.forward(batch, self._kv, router)
        if self._runtime.gates is None and router.limits is None:  # nothing decides
            compute = [1.0] * batch.num_rows
        else:
            trace = self._runtime.trace(router, batch, policies)
            compute = trace.per_token_compute().tolist()
        _account(slices, compute)
        sampling = [s.request for s in slices if s.samples]
        for s in slices:
            s.request.computed += s.count
        if not sampling:
            return []
        return sample(logits, [r.sampling for r in sampling], [r.generator for r in sampling])


def build_batch(slices: Sequence[Slice], blocks: BlockManager) -> Batch:
    """The rows of a step; sequences in slice order, positions ascending inside each."""
    size = blocks.block_size
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    seq_ids: list[int] = []
    tables: list[list[int]] = []
    logit_rows: list[int] = []
    for i, s in enumerate(slices):
        end = s.start + s.count
        table = blocks.table(s.request.id)
        tokens += s.request.tokens[s.start : end]
        positions += range(s.start, end)
        slots += [table[p // size] * size + p % size for p in range(s.start, end)]
        seq_ids += [i] * s.count
        # Attention never looks past a row's own position: later blocks would only widen the table.
        tables.append(table[: blocks.blocks_for(end)])
        if s.samples:
            logit_rows.append(len(tokens) - 1)
    width = max(len(table) for table in tables)
    return Batch(
        tokens=torch.tensor(tokens, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int32),
        slots=torch.tensor(slots, dtype=torch.int32),
        seq_ids=torch.tensor(seq_ids, dtype=torch.int32),
        block_tables=torch.tensor(
            [table + [0] * (width - len(table)) for table in tables], dtype=torch.int32
        ),
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
    )


def _half_filled(slices: Sequence[Slice], blocks: BlockManager) -> list[int]:
    """Blocks that this step enters and does not fill: the only ones whose old content is read."""
    size = blocks.block_size
    return [
        blocks.table(s.request.id)[end // size]
        for s in slices
        if (end := s.start + s.count) % size and end // size * size >= s.start
    ]


def _account(slices: Sequence[Slice], compute: Sequence[float]) -> None:
    end = 0
    for s in slices:
        begin, end = end, end + s.count
        s.request.rows += s.count
        s.request.rows_compute += sum(compute[begin:end])
        if s.samples:
            s.request.compute.append(compute[end - 1])
