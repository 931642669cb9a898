"""Prefill calls over a corpus: what the model says, what it executes, how long it takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pyruntime.engine.runtime import Runtime, full_batch
from pyruntime.format.spec import DecoderSpec
from pyruntime.gates.policy import BRANCHES, ComputePolicy
from pyruntime.gates.routing import Router, Rule
from pyruntime.gates.trace import Trace
from pyruntime.layers.batch import Batch
from pyruntime.layers.kv import PagedKV

Progress = Callable[[int, int], None]  # (done, total)
_LOSS_ROWS = 512  # a vocabulary of 128k makes the loss of all rows at once too large


class Ticker:
    """Counts finished passes for a caller's progress function."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def __call__(self, passes: int = 1) -> None:
        self._done += passes
        if self._progress is not None:
            self._progress(self._done, self._total)


class Call:
    """Some sequences that are prefilled in one call, on a cache of their own.

    Attributes:
        batch: their N rows; the logits wanted are those of every row that has a next token.
        targets: int64 [M], the next tokens.
        valid: bool [N], False for padding and end tokens: they never skip and are not counted.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], spec: DecoderSpec) -> None:
        batch, self._blocks = full_batch(sequences)
        self._spec = spec
        self._ends = torch.tensor([len(s) for s in sequences]).cumsum(0) - 1
        scored = torch.ones(batch.num_rows, dtype=torch.bool)
        scored[self._ends] = False
        rows = torch.nonzero(scored)[:, 0]
        self.batch = replace(batch, logit_rows=rows)
        self.targets = batch.tokens[rows + 1]
        special = [t for t in (*spec.eos_token_ids, spec.pad_token_id) if t is not None]
        self.valid = ~torch.isin(batch.tokens, torch.tensor(special, dtype=torch.int64))

    @property
    def num_sequences(self) -> int:
        """B."""
        return self._ends.shape[0]

    def prefill(self) -> Batch:
        """The same rows as a server runs them: logits of each sequence's last row only."""
        return replace(self.batch, logit_rows=self._ends)

    def silent(self) -> Batch:
        """The same rows without any logits."""
        return replace(self.batch, logit_rows=self._ends[:0])

    def cache(self) -> PagedKV:
        """An empty cache with room for the call."""
        return PagedKV(self._spec, self._blocks)


@dataclass(frozen=True, slots=True)
class Quality:
    """How well a policy predicts next tokens, and what that took.

    Attributes:
        tokens: predictions made.
        perplexity: exp of the mean loss, in nats, of a prediction.
        accuracy: share of predictions whose most likely token was right.
        skipped_share: GateSkip's own metric: mean, over calls and gated branches, of the share of
            valid rows that were skipped.
        macs_executed, macs_dense: multiply-accumulates of it, and of the ungated dense model with
            all its experts.
        experts_per_token: mean number of routed experts a valid row ran in an expert layer; None
            without such layers.
    """

    tokens: int
    perplexity: float
    accuracy: float
    skipped_share: float
    macs_executed: int
    macs_dense: int
    experts_per_token: float | None = None


def calls_of(sequences: Sequence[Sequence[int]], spec: DecoderSpec, rows: int) -> list[Call]:
    """The sequences in calls of about `rows` rows, dealt like cards: each call is a fair sample."""
    total = sum(map(len, sequences))
    count = min(max(1, round(total / rows)), len(sequences))
    return [Call(sequences[i::count], spec) for i in range(count)]


def run(
    runtime: Runtime,
    call: Call,
    batch: Batch,
    policy: ComputePolicy,
    cache: PagedKV,
    rule: Rule | None = None,
) -> tuple[Tensor, Router]:
    """One pass over the call's rows; `rule` decides in place of the policy's own.

    Returns float32 [M, V] for the batch's logit rows and the router that decided. Mutates the
    cache. Raises InvalidInput when the model cannot honour the policy.
    """
    router = runtime.router(batch, [policy] * call.num_sequences)
    if rule is not None:
        router.rule = rule
    return runtime.model.forward(batch, cache, router), router


def trace_of(
    runtime: Runtime, call: Call, batch: Batch, policy: ComputePolicy, router: Router
) -> Trace:
    """What a pass by `run` executed."""
    return runtime.trace(router, batch, [policy] * call.num_sequences)


def evaluate(
    runtime: Runtime,
    calls: Sequence[Call],
    policy: ComputePolicy,
    tick: Ticker,
) -> Quality:
    """Next-token quality over all calls; `tick` is called after each.

    Raises:
        InvalidInput: the model cannot honour the policy.
    """
    loss, correct, count, executed, dense, used, choosing = 0.0, 0, 0, 0, 0, 0, 0
    skipped: list[float] = []
    for call in calls:
        logits, router = run(runtime, call, call.batch, policy, call.cache())
        trace = trace_of(runtime, call, call.batch, policy, router)
        for some, targets in zip(
            logits.split(_LOSS_ROWS), call.targets.split(_LOSS_ROWS), strict=True
        ):
            loss += float(F.cross_entropy(some, targets, reduction="sum"))
            correct += int((some.argmax(-1) == targets).sum())
        count += call.targets.shape[0]
        executed += trace.macs_executed
        dense += trace.macs_dense
        skipped.append(_skipped(runtime, call, trace))
        if trace.experts is not None:
            ran = trace.experts[:, call.valid] >= 0  # [M, valid, K]
            used += int(ran.sum())
            choosing += ran.shape[0] * ran.shape[1]
        tick()
    return Quality(
        tokens=count,
        perplexity=math.exp(loss / count),
        accuracy=correct / count,
        skipped_share=sum(skipped) / len(skipped),
        macs_executed=executed,
        macs_dense=dense,
        experts_per_token=used / choosing if choosing else None,
    )


def time_prefill(runtime: Runtime, call: Call, policy: ComputePolicy, cache: PagedKV) -> float:
    """Seconds of one prefill, routing included; the accounting, which serves us only, is not."""
    batch = call.prefill()
    start = time.perf_counter()
    run(runtime, call, batch, policy, cache)
    return time.perf_counter() - start


def _skipped(runtime: Runtime, call: Call, trace: Trace) -> float:
    if runtime.gates is None or not bool(call.valid.any()):
        return 0.0
    gated = [BRANCHES.index(name) for name in runtime.gates.branches]
    return 1.0 - float(trace.kept[:, gated][:, :, call.valid].float().mean())
