"""Which images run next: one queue in front of every stage, the deepest ready one first.

Bookkeeping alone: it knows neither the model nor the clock. Merging at the stages of a network is
LazyBatching's (arXiv 2010.13103); buffering those that stay at an exit, and draining the deep end
first, is what DREX does for language models.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from pyruntime.errors import InvalidInput


class Piece(Protocol):
    """Images that are kept together: a wave."""

    @property
    def live_count(self) -> int:
        """How many, at least 1."""


P = TypeVar("P", bound=Piece)


@dataclass(frozen=True, slots=True)
class _Waiting(Generic[P]):
    piece: P
    images: int
    work: float
    since: int


class Queues(Generic[P]):
    """Pieces that wait in front of stages 1 to S - 1. Fresh images wait elsewhere, uncounted.

    A queue is ready when it holds its target of work or a whole wave of images, or when its oldest
    piece has waited for `max_age` waves. Nothing waits when there is nothing else to run. A piece
    is therefore taken after at most `max_age` waves, and those of deeper stages, of which there are
    at most `capacity` images: every image is done after a bounded number of waves.

    Attributes:
        images: that wait, in all queues.
        waves: how many have been taken, fresh ones included.
    """

    def __init__(
        self,
        stages: int,
        max_batch: int,
        capacity: int,
        max_age: int,
        target: Callable[[int], int],
    ) -> None:
        """
        Args:
            stages: S, of the model.
            max_batch: images of a wave.
            capacity: images that may wait in all queues together.
            max_age: waves that a piece may wait for company.
            target: of a stage, the work that is worth a wave of its own, in images of full
                length; asked only when something else could run instead.

        Raises:
            InvalidInput: less room than for one wave.
        """
        if max_batch < 1 or max_age < 0 or capacity < max_batch:
            raise InvalidInput(
                "expected max_batch of 1 or more, max_age of 0 or more and capacity of max_batch "
                f"or more, got {max_batch}, {max_age} and {capacity}"
            )
        self.max_batch = max_batch
        self.capacity = capacity
        self.max_age = max_age
        self._target = target
        self._queues: list[deque[_Waiting[P]]] = [deque() for _ in range(stages)]
        self._sizes = [0] * stages
        self.images = 0
        self.waves = 0

    def push(self, stage: int, piece: P, work: float | None = None) -> None:
        """A piece that waits in front of a stage from now on.

        Args:
            work: in images of full length; None: all its images are.
        """
        images = piece.live_count
        work = images if work is None else work
        self._queues[stage].append(_Waiting(piece, images, work, self.waves))
        self._sizes[stage] += images
        self.images += images

    def choose(self, fresh: int) -> int | None:
        """The stage to run next, 0 for fresh images; None when there is nothing to run.

        Args:
            fresh: images that wait in front of stage 0.
        """
        waiting = [stage for stage, size in enumerate(self._sizes) if size]
        admits = self.admits(fresh) > 0
        if not waiting:
            return 0 if admits else None
        if len(waiting) > 1 or admits:
            for stage in reversed(waiting):
                if self._is_ready(stage):
                    return stage
        return 0 if admits else waiting[-1]

    def admits(self, fresh: int) -> int:
        """How many of the fresh images make the next wave: all that fit in it, or none where their
        survivors might not find room."""
        wanted = min(fresh, self.max_batch)
        return wanted if self.images + wanted <= self.capacity else 0

    def take(self, stage: int) -> list[P]:
        """Remove the oldest pieces of a queue, whole, as many as make a wave; none of stage 0,
        whose images are the caller's. Counts a wave either way."""
        self.waves += 1
        queue, images = self._queues[stage], 0
        taken: list[P] = []
        while queue and (not taken or images + queue[0].images <= self.max_batch):
            first = queue.popleft()
            taken.append(first.piece)
            images += first.images
        self._sizes[stage] -= images
        self.images -= images
        return taken

    def _is_ready(self, stage: int) -> bool:
        if self.waves - self._queues[stage][0].since >= self.max_age:
            return True
        if self._sizes[stage] >= self.max_batch:
            return True
        return sum(waiting.work for waiting in self._queues[stage]) >= self._target(stage)
