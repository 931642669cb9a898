"""Which rows run in the next step.

First come, first served; decoding rows first, then prompt chunks, under one budget of tokens per
step. Admission reserves the whole context of a request, so nothing admitted is ever preempted.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from pyruntime.engine.kv import BlockManager
from pyruntime.engine.request import FinishReason, InvalidRequest, Request, Status
from pyruntime.gates.policy import QUANTILE_MODES, ComputePolicy


@dataclass(frozen=True, slots=True)
class Slice:
    """Positions start … start+count-1 of one request; samples if that ends its tokens."""

    request: Request
    start: int
    count: int

    @property
    def samples(self) -> bool:
        return self.start + self.count == len(self.request.tokens)


# Requests that may share a step: causal ones need only agree on the kv mode; quantile rules are
# defined on the rows of one call, so theirs holds one policy, and prompts or decode rows.
Group = tuple[str | None, ComputePolicy | None, bool]


class Scheduler:
    def __init__(self, kv: BlockManager, max_num_seqs: int, max_step_tokens: int) -> None:
        if max_num_seqs < 1:
            raise InvalidRequest("max_num_seqs", f"expected 1 or more, got {max_num_seqs}")
        if max_step_tokens < max_num_seqs:
            raise InvalidRequest(
                "max_step_tokens",
                f"expected at least max_num_seqs={max_num_seqs}, got {max_step_tokens}",
            )
        self.kv = kv
        self.max_num_seqs = max_num_seqs
        self.max_step_tokens = max_step_tokens
        self.waiting: deque[Request] = deque()
        self.running: dict[str, Request] = {}
        self.steps = 0

    def add(self, request: Request) -> None:
        """Queues a request. Raises InvalidRequest when it could never be admitted."""
        if _room(request) > self.kv.capacity:
            raise InvalidRequest(
                "max_tokens",
                f"prompt and output need {_room(request)} cached tokens; the cache holds "
                f"{self.kv.capacity}",
            )
        request.last_step = self.steps
        self.waiting.append(request)

    def schedule(self) -> list[Slice]:
        """The slices of the next step; empty only when there is no request at all."""
        first = self._longest_unserved()
        if first is None:
            return []
        self.steps += 1
        group = _group(first)
        mates = [r for r in self.running.values() if _group(r) == group]
        slices = [Slice(r, r.computed, 1) for r in mates if _todo(r) == 1]
        budget = self.max_step_tokens - len(slices)
        prefilling = False
        for request in mates:
            if _todo(request) > 1 and (count := _chunk(request, budget, prefilling)):
                slices.append(Slice(request, request.computed, count))
                budget, prefilling = budget - count, True
        while self._admissible() and _group(self.waiting[0]) == group:
            request = self.waiting[0]
            count = _chunk(request, budget, prefilling)
            if not count:
                break
            self._admit(self.waiting.popleft())
            slices.append(Slice(request, 0, count))
            budget, prefilling = budget - count, True
        for s in slices:
            s.request.last_step = self.steps
        return slices

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Ends a request wherever it is: running, waiting, or not added yet. Frees its blocks."""
        if request.status is Status.RUNNING:
            del self.running[request.id]
            self.kv.free(request.id)
        elif request in self.waiting:
            self.waiting.remove(request)
        request.status = Status.FINISHED
        request.finish_reason = reason

    def check(self) -> None:
        """Raises RuntimeError when a block or a request is not exactly where it belongs."""
        self.kv.check(set(self.running))
        waiting = {r.id for r in self.waiting}
        if waiting & set(self.running) or len(waiting) != len(self.waiting):
            raise RuntimeError("Scheduler: a request is queued twice")

    def _longest_unserved(self) -> Request | None:
        # Groups take turns: the request that has waited for the most steps picks the next one, so
        # no group starves another.
        candidates = list(self.running.values())
        if self._admissible():
            candidates.append(self.waiting[0])
        return min(candidates, key=lambda r: r.last_step, default=None)

    def _admissible(self) -> bool:
        return (
            bool(self.waiting)
            and len(self.running) < self.max_num_seqs
            and self.kv.can_allocate(_room(self.waiting[0]))
        )

    def _admit(self, request: Request) -> None:
        self.kv.allocate(request.id, _room(request))
        request.status = Status.RUNNING
        self.running[request.id] = request


def _room(request: Request) -> int:
    # The last sampled token is never fed back, so it needs no place in the cache.
    return len(request.prompt_token_ids) + request.max_tokens - 1


def _todo(request: Request) -> int:
    return len(request.tokens) - request.computed


def _chunk(request: Request, budget: int, prefilling: bool) -> int:
    todo = _todo(request)
    if request.policy.mode not in QUANTILE_MODES:
        return min(todo, budget)
    # These rules look at the whole prompt: cutting it in chunks would change what they decide.
    # A whole prompt may exceed the budget when it is the step's only one: else it would never run.
    return todo if todo <= budget or not prefilling else 0


def _group(request: Request) -> Group:
    policy = request.policy
    if policy.mode not in QUANTILE_MODES:
        return (policy.kv_mode, None, False)
    return (policy.kv_mode, policy, request.prefilling)
