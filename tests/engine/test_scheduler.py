from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyruntime.engine.detokenize import TextStream
from pyruntime.engine.kv import BlockManager
from pyruntime.engine.request import InvalidRequest, Request, SamplingParams, Status
from pyruntime.engine.scheduler import Scheduler, Slice
from pyruntime.gates.policy import ComputePolicy


def make(
    name: str,
    prompt: int,
    output: int,
    mode: str = "calibrated",
    budget: float = 1.0,
    kv_mode: str = "dense",
) -> Request:
    return Request(
        id=name,
        prompt=None,
        prompt_token_ids=list(range(prompt)),
        sampling=SamplingParams(max_tokens=output),
        policy=ComputePolicy(budget=budget, mode=mode, kv_mode=kv_mode),
        max_tokens=output,
        stop_ids=frozenset(),
        text=TextStream(None),
    )


def run(scheduler: Scheduler, slices: list[Slice]) -> None:
    """What the runner and the engine do, without a model."""
    for s in slices:
        sampled = s.samples
        s.request.computed += s.count
        if sampled:
            s.request.tokens.append(0)
            if s.request.num_output == s.request.max_tokens:
                scheduler.finish(s.request, "length")


modes = st.sampled_from(["calibrated", "seq_quantile", "batch_quantile", "exact_k"])
arrivals = st.lists(
    st.tuples(
        st.integers(1, 90),  # prompt
        st.integers(1, 40),  # output
        modes,
        st.sampled_from([0.5, 1.0]),
        st.sampled_from(["dense", "dense", "copy"]),
        st.integers(0, 12),  # step of arrival
        st.none() | st.integers(0, 20),  # step of cancellation
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(arrivals, st.integers(1, 4), st.integers(4, 64))
def test_nothing_is_lost_and_every_block_comes_back(
    plan: list[Any], max_num_seqs: int, max_step_tokens: int
) -> None:
    scheduler = Scheduler(BlockManager(8), max_num_seqs, max_step_tokens)
    requests = {}
    for step in range(3000):
        for i, (prompt, output, mode, budget, kv_mode, arrives, _) in enumerate(plan):
            if arrives == step:
                requests[i] = make(str(i), prompt, output, mode, budget, kv_mode)
                scheduler.add(requests[i])
        for i, (*_, cancelled) in enumerate(plan):
            if cancelled == step and i in requests:
                if requests[i].status is not Status.FINISHED:
                    scheduler.finish(requests[i], "abort")
        slices = scheduler.schedule()
        check_step(scheduler, slices)
        run(scheduler, slices)
        scheduler.check()
        if len(requests) == len(plan) and not slices:
            break
    assert all(r.status is Status.FINISHED for r in requests.values())
    assert not scheduler.waiting and not scheduler.running
    assert scheduler.kv.num_free == scheduler.kv.num_blocks
    for i, (_, output, *_rest) in enumerate(plan):
        if requests[i].finish_reason == "length":
            assert requests[i].num_output == output


def check_step(scheduler: Scheduler, slices: list[Slice]) -> None:
    ids = [s.request.id for s in slices]
    assert len(ids) == len(set(ids))
    assert len(scheduler.running) <= scheduler.max_num_seqs
    groups = {
        (s.request.policy, s.request.prefilling)
        for s in slices
        if s.request.policy.mode != "calibrated"
    }
    if groups:  # the "batch" of a quantile rule holds one policy, prompts or decode rows
        assert len(groups) == 1 and all(s.request.policy.mode != "calibrated" for s in slices)
    assert len({s.request.policy.kv_mode for s in slices}) <= 1
    whole = [s for s in slices if s.request.policy.mode != "calibrated" and s.request.prefilling]
    for s in whole:
        assert (s.start, s.count) == (0, len(s.request.prompt_token_ids))
    total = sum(s.count for s in slices)
    oversized = max((s.count for s in whole), default=0)
    assert total <= max(scheduler.max_step_tokens, 0) or total - oversized < max(
        scheduler.max_step_tokens, scheduler.max_num_seqs
    )


def test_first_come_first_served_and_decode_first() -> None:
    scheduler = Scheduler(BlockManager(100), max_num_seqs=2, max_step_tokens=10)
    a, b, c = make("a", 4, 8), make("b", 20, 2), make("c", 1, 1)
    for request in (a, b, c):
        scheduler.add(request)
    steps = []
    for _ in range(4):
        slices = scheduler.schedule()
        steps.append([(s.request.id, s.start, s.count) for s in slices])
        run(scheduler, slices)
    assert steps == [
        [("a", 0, 4), ("b", 0, 6)],  # b's prompt in chunks; c waits for a seat
        [("a", 4, 1), ("b", 6, 9)],
        [("a", 5, 1), ("b", 15, 5)],
        [("a", 6, 1), ("b", 20, 1)],
    ]
    assert [s.request.id for s in scheduler.schedule()] == ["a", "c"]


def test_waits_when_blocks_are_short_and_keeps_the_order() -> None:
    scheduler = Scheduler(BlockManager(4), max_num_seqs=8, max_step_tokens=64)
    big, bigger, small = make("big", 60, 5), make("bigger", 90, 5), make("small", 1, 1)
    for request in (big, bigger, small):
        scheduler.add(request)
    assert [s.request.id for s in scheduler.schedule()] == ["big"]  # small does not overtake
    scheduler.finish(big, "abort")
    assert [s.request.id for s in scheduler.schedule()] == ["bigger"]


def test_what_can_never_fit_is_refused_at_once() -> None:
    scheduler = Scheduler(BlockManager(2), 1, 8)
    scheduler.add(make("fits", 64, 1))
    with pytest.raises(InvalidRequest, match="need 65 cached tokens; the cache holds 64"):
        scheduler.add(make("never", 64, 2))


def test_groups_of_a_coupled_mode_take_turns() -> None:
    scheduler = Scheduler(BlockManager(100), 8, 64)
    for name, mode, budget in [
        ("q1", "batch_quantile", 0.5),
        ("c1", "calibrated", 0.5),
        ("q2", "batch_quantile", 0.5),
        ("q3", "batch_quantile", 0.8),
        ("s1", "seq_quantile", 0.8),
    ]:
        scheduler.add(make(name, 4, 20, mode, budget))
    scheduler.add(make("k1", 4, 20, kv_mode="copy"))
    served: dict[str, int] = {}
    for _ in range(60):
        slices = scheduler.schedule()
        check_step(scheduler, slices)
        for s in slices:
            served[s.request.id] = served.get(s.request.id, 0) + 1
        run(scheduler, slices)
    assert min(served.values()) >= 8 and len(served) == 6


def test_limits_are_checked() -> None:
    with pytest.raises(InvalidRequest, match="max_step_tokens: expected at least max_num_seqs=8"):
        Scheduler(BlockManager(1), 8, 4)
    with pytest.raises(InvalidRequest, match="max_num_seqs"):
        Scheduler(BlockManager(1), 0, 4)
