"""The queues alone: who runs next, and that nobody waits for ever."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyruntime.engine.refill import Queues
from pyruntime.errors import InvalidInput


@dataclass
class Piece:
    """Images with the stages they are going to run."""

    stops: list[int]
    born: int = 0
    numbers: list[int] = field(default_factory=list)

    @property
    def live_count(self) -> int:
        return len(self.stops)


def queues(stages: int = 4, **options: int) -> Queues[Piece]:
    given = {"max_batch": 8, "capacity": 32, "max_age": 3, "target": 8} | options
    target = given.pop("target")
    return Queues(stages, target=lambda stage: target, **given)


def test_nothing_to_run() -> None:
    assert queues().choose(0) is None


def test_fresh_images_run_while_the_others_wait_for_company() -> None:
    q = queues()
    q.push(1, Piece([3] * 5))
    assert q.choose(fresh=4) == 0
    q.push(1, Piece([3] * 3))  # together a full wave
    assert q.choose(fresh=4) == 1
    assert [piece.live_count for piece in q.take(1)] == [5, 3]
    assert q.images == 0


def test_nothing_waits_when_nothing_else_can_run() -> None:
    q = queues()
    q.push(1, Piece([3]))
    q.push(2, Piece([3]))
    assert q.choose(fresh=0) == 2
    q.take(2)
    assert q.choose(fresh=0) == 1


def test_the_deepest_ready_queue_runs_first() -> None:
    q = queues()
    for stage in (1, 2, 3):
        q.push(stage, Piece([3] * 8))
    assert q.choose(fresh=8) == 3
    q.take(3)
    q.push(3, Piece([3]))  # deeper, but not ready
    assert q.choose(fresh=8) == 2


def test_the_old_run_however_few_they_are() -> None:
    q = queues(max_age=3)
    q.push(2, Piece([3]))
    for _ in range(3):
        assert q.choose(fresh=8) == 0
        q.take(0)
    assert q.choose(fresh=8) == 2


def test_whole_pieces_make_a_wave() -> None:
    q = queues()
    for size in (5, 2, 4, 1):
        q.push(1, Piece([3] * size))
    assert [piece.live_count for piece in q.take(1)] == [5, 2]
    assert [piece.live_count for piece in q.take(1)] == [4, 1]
    assert q.take(1) == [] and q.images == 0


def test_no_more_are_admitted_than_find_room() -> None:
    q = queues(capacity=12)
    q.push(1, Piece([3] * 5))
    assert q.admits(8) == 0 and q.admits(7) == 7 and q.admits(100) == 0
    assert q.choose(fresh=100) == 1
    assert queues().admits(100) == 8


def test_targets_are_of_work_and_waves_of_images() -> None:
    q = queues(target=4)
    q.push(1, Piece([3] * 5), 2.5)  # images of half the work
    assert q.choose(fresh=4) == 0
    q.push(1, Piece([3] * 2), 1.5)
    assert q.choose(fresh=4) == 1
    assert [piece.live_count for piece in q.take(1)] == [5, 2] and q.images == 0
    q.push(1, Piece([3] * 8), 0.5)  # a whole wave, however little work
    assert q.choose(fresh=4) == 1


def test_targets_are_asked_only_where_there_is_a_choice() -> None:
    asked: list[int] = []

    def target(stage: int) -> int:
        asked.append(stage)
        return 8

    q: Queues[Piece] = Queues(4, max_batch=8, capacity=32, max_age=3, target=target)
    q.push(1, Piece([3]))
    assert q.choose(fresh=0) == 1 and asked == []
    assert q.choose(fresh=1) == 0 and asked == [1]


@pytest.mark.parametrize(
    "options", [{"max_batch": 0}, {"capacity": 7}, {"max_age": -1}, {"max_batch": 64}]
)
def test_options_that_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(InvalidInput, match="expected max_batch"):
        queues(**options)


@given(
    stages=st.integers(1, 7),
    max_batch=st.integers(1, 9),
    room=st.integers(0, 30),
    max_age=st.integers(0, 6),
    target=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_image_is_done_after_a_bounded_number_of_waves(
    stages: int, max_batch: int, room: int, max_age: int, target: int, seed: int
) -> None:
    """While fresh images never stop coming, and leave wherever they like."""
    draw = random.Random(seed)
    capacity = max_batch + room
    q: Queues[Piece] = Queues(stages, max_batch, capacity, max_age, lambda stage: target)
    arrived = done = 0
    longest = 0
    backlog: list[Piece] = []
    for step in range(400):
        coming = draw.choice([0, 1, max_batch, 2 * max_batch]) if step < 300 else 0
        backlog += [Piece([draw.randrange(stages)], q.waves) for _ in range(coming)]
        arrived += coming
        stage = q.choose(len(backlog))
        if stage is None:
            assert not backlog and q.images == 0
            continue
        if stage == 0:
            taken, backlog = backlog[: q.admits(len(backlog))], backlog[q.admits(len(backlog)) :]
            assert taken
            q.take(0)
            wave = [(piece.stops[0], q.waves) for piece in taken]
        else:
            wave = [(stop, piece.born) for piece in q.take(stage) for stop in piece.stops]
        assert 0 < len(wave) <= max_batch
        leaving = [born for stop, born in wave if stop == stage]
        longest = max([longest, *(q.waves - born for born in leaving)])
        done += len(leaving)
        # Images of one piece are as old as its oldest.
        stay = [(stop, born) for stop, born in wave if stop != stage]
        if stay:
            q.push(stage + 1, Piece([s for s, _ in stay], min(born for _, born in stay)))
        assert q.images <= capacity
    while (stage := q.choose(len(backlog))) is not None:
        if stage == 0:
            count = q.admits(len(backlog))
            wave = [(piece.stops[0], q.waves) for piece in backlog[:count]]
            backlog = backlog[count:]
            q.take(0)
        else:
            wave = [(stop, piece.born) for piece in q.take(stage) for stop in piece.stops]
        done += sum(stop == stage for stop, _ in wave)
        stay = [(stop, born) for stop, born in wave if stop != stage]
        if stay:
            q.push(stage + 1, Piece([s for s, _ in stay], min(born for _, born in stay)))
    assert done == arrived
    # In front of each stage at most max_age waves, then those of deeper stages and of its queue.
    assert longest <= stages * (max_age + capacity * stages + 1)
