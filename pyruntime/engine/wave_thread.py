"""The thread that owns a vision model: requests come in one by one and leave when they are done.

Callers and thread share an inbox under a lock, and futures. Waves, queues and the model belong to
the thread.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from pyruntime.engine.classification import Classification, best_labels
from pyruntime.engine.patches import Patches, Seen
from pyruntime.engine.refill import Queues
from pyruntime.engine.vision import VisionRuntime
from pyruntime.engine.wave import Leavers, Wave, advance, run_dense
from pyruntime.errors import InvalidInput, Unavailable
from pyruntime.gates.policy import ComputePolicy
from pyruntime.gates.scale import ScaleRule
from pyruntime.ops.pixels import Pixels

log = logging.getLogger("pyruntime.engine")

Mode = Literal["refill", "compact", "lock_step", "dense"]
MODES: tuple[Mode, ...] = ("refill", "compact", "lock_step", "dense")


@dataclass(frozen=True, slots=True)
class ClassifierConfig:
    """How requests share the model.

    Attributes:
        mode: ``refill``: who stays at an exit may wait for others to run on with; ``compact``:
            a batch shrinks and is finished before the next one starts. For benchmarks:
            ``lock_step``: a batch keeps its size until its last image has left; ``dense``: no
            exits and no coarser patches at all, whatever the policy.
        max_batch: images that run together.
        max_wait_ms: how long a lone request may wait for a fuller first batch; only where nothing
            else can run.
        capacity: images that may wait between stages; None: four batches. New ones are not started
            beyond it.
        max_age: batches that an image may wait for at one exit.
    """

    mode: Mode = "refill"
    max_batch: int = 32
    max_wait_ms: float = 0.0
    capacity: int | None = None
    max_age: int = 8

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InvalidInput(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if not self.max_wait_ms >= 0:
            raise InvalidInput(f"max_wait_ms must be 0 or more, got {self.max_wait_ms}")


@dataclass(frozen=True, slots=True)
class ClassifierStats:
    """What a classifier has done so far.

    Attributes:
        images: answered.
        failed: images whose batch ended in an error.
        waves: batches that were formed; when refilling, each runs one stage.
        macs: multiply-accumulates executed, those of images that were carried on included.
        macs_dense: those of the answered images without exits, all patches fine.
    """

    images: int = 0
    failed: int = 0
    waves: int = 0
    macs: int = 0
    macs_dense: int = 0


@dataclass(slots=True, eq=False)
class Request:
    """One image on its way.

    Attributes:
        image: float32 [C, H, W], normalised.
        limits: float32 [G, 2].
        rule: of its patches; None in a model of one scale.
        seen: what it is looked at as, from its first batch on.
    """

    image: Tensor
    limits: Tensor
    rule: ScaleRule | None
    policy: ComputePolicy
    future: Future[Classification] = field(default_factory=Future)
    submitted: float = field(default_factory=time.perf_counter)
    started: float = 0.0
    seen: Seen | None = None


class WaveThread:
    """Starts at once; `submit`, `stop` and `join` may be called from any thread.

    Every request that `submit` accepts gets an answer or an error, also when the thread is told to
    stop, and when the process ends.
    """

    def __init__(self, runtime: VisionRuntime, config: ClassifierConfig, top: int) -> None:
        self.runtime = runtime
        self.config = config
        self.stats = ClassifierStats()
        self._top = top
        self._wake = threading.Condition()
        self._inbox: deque[Request] = deque()
        self._stopping = False
        self._fault: BaseException | None = None
        self._running: dict[int, Request] = {}
        self._next_id = 0
        self._queues: Queues[Wave] = Queues(
            len(runtime.model.stages),
            config.max_batch,
            4 * config.max_batch if config.capacity is None else config.capacity,
            config.max_age,
            lambda stage: runtime.times.target(stage, config.max_batch),
        )
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="classifier", daemon=True)
        # A daemon: an idle classifier must not keep a process alive. What was accepted is answered
        # all the same.
        atexit.register(self.join)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InvalidInput: after `stop`.
            Unavailable: the thread has failed.
        """
        with self._wake:
            if self._fault is not None:
                raise Unavailable(f"the classifier has failed: {self._fault}")
            if self._stopping:
                raise InvalidInput("the classifier is closed")
            self._inbox.append(request)
            self._wake.notify()

    def stop(self) -> None:
        """Accept nothing more; the thread ends when all is answered."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def join(self) -> None:
        """`stop`, and wait for the end; returns at once on the thread itself, in a callback."""
        self.stop()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # ---- on the thread ----

    def _run(self) -> None:
        # Torch and OpenMP keep the number of threads per calling thread: the creator's holds.
        torch.set_num_threads(self._threads)
        try:
            while (fresh := self._wait()) is not None:
                stage = self._queues.choose(fresh)
                if stage == 0:
                    self._start(self._admit(fresh))
                elif stage is not None:
                    self._resume(self._queues.take(stage))
        except BaseException as error:
            # The one fault barrier, for SystemExit in a callback too: nobody must wait for a thread
            # that is gone.
            log.critical("classifier stopped", exc_info=error)
            self._give_up(error)
        finally:
            atexit.unregister(self.join)

    def _wait(self) -> int | None:
        """Fresh images there are, once there is anything to do; None when all is done."""
        with self._wake:
            while not self._inbox and not self._queues.images:
                if self._stopping:
                    return None
                self._wake.wait()
            return len(self._inbox)

    def _admit(self, fresh: int) -> list[Request]:
        """The requests of a fresh wave, without those cancelled before."""
        self._queues.take(0)
        with self._wake:
            if not self._queues.images:
                until = self._inbox[0].submitted + self.config.max_wait_ms / 1e3
                while len(self._inbox) < self.config.max_batch and not self._stopping:
                    left = until - time.perf_counter()
                    if left <= 0:
                        break
                    self._wake.wait(left)
                fresh = len(self._inbox)
            requests = [self._inbox.popleft() for _ in range(self._queues.admits(fresh))]
        return [request for request in requests if request.future.set_running_or_notify_cancel()]

    def _start(self, requests: list[Request]) -> None:
        if not requests:
            return
        ids = range(self._next_id, self._next_id + len(requests))
        self._next_id = ids.stop
        now = time.perf_counter()
        for number, request in zip(ids, requests, strict=True):
            request.started = now
            self._running[number] = request
        with self._failing(ids):
            images = _batch([request.image for request in requests])
            numbers = torch.tensor(ids)
            model, dense = self.runtime.model, self.config.mode == "dense"
            rules = [request.rule for request in requests if request.rule is not None]
            patches = Patches.of(model, images, None if dense or not rules else rules)
            for request, seen in zip(requests, patches.seen(model), strict=True):
                request.seen = seen
            if dense:
                logits, macs = run_dense(model, patches)
                self._count(int(macs.sum()))
                self._answer(Leavers(self.runtime.exits, numbers, logits, macs))
                return
            limits = torch.stack([request.limits for request in requests])
            self._go(Wave.start(model, patches, limits, numbers))

    def _resume(self, waves: list[Wave]) -> None:
        with self._failing([number for wave in waves for number in wave.ids.tolist()]):
            self._go(Wave.join(self.runtime.model.ops, waves))

    def _go(self, wave: Wave) -> None:
        """Through one stage and into the next queue; without refilling, through all of them."""
        mode, runtime = self.config.mode, self.runtime
        rest: Wave | None = wave
        while rest is not None:
            macs, before = rest.macs, int(rest.macs.sum()) if rest.stage else 0
            left, rest = advance(runtime.model, rest)
            self._count(int(macs.sum()) - before)
            self._answer(left)
            if rest is None:
                return
            rest = runtime.compacted(rest, "never" if mode == "lock_step" else "measured")
            if mode == "refill":
                rest = rest.trimmed(runtime.model.ops)
                self._queues.push(rest.stage, rest, runtime.live_work(rest))
                return

    def _answer(self, left: Leavers | None) -> None:
        if left is None:
            return
        numbers = left.ids.tolist()
        runtime, now = self.runtime, time.perf_counter()
        # Tensors of the model are inference tensors, which autograd does not take; users may.
        rows = left.logits.clone()
        tops = best_labels(left.logits, runtime.spec.labels, self._top)
        requests = [self._running[number] for number in numbers]
        views = [request.seen for request in requests if request.seen is not None]
        stats = self.stats
        self.stats = replace(
            stats,
            images=stats.images + len(numbers),
            macs_dense=stats.macs_dense + sum(seen.macs_dense for seen in views),
        )
        answers = zip(requests, views, tops, rows, left.macs.tolist(), strict=True)
        for number, (request, seen, top, logits, macs) in zip(numbers, answers, strict=True):
            del self._running[number]
            request.future.set_result(
                Classification(
                    top=top,
                    logits=logits,
                    level=left.level,
                    exits=runtime.exits,
                    tokens=seen.tokens,
                    tokens_dense=seen.tokens_dense,
                    grid=seen.grid,
                    stops=seen.stops,
                    macs=macs,
                    macs_dense=seen.macs_dense,
                    policy=request.policy,
                    queue_seconds=request.started - request.submitted,
                    run_seconds=now - request.started,
                )
            )

    def _count(self, macs: int) -> None:
        stats = self.stats
        self.stats = replace(stats, waves=self._queues.waves, macs=stats.macs + macs)

    @contextmanager
    def _failing(self, numbers: Iterable[int]) -> Iterator[None]:
        """An error inside fails the requests of this wave that are not answered yet, no others."""
        try:
            yield
        except Exception as error:
            requests = [self._running.pop(n) for n in numbers if n in self._running]
            self.stats = replace(self.stats, failed=self.stats.failed + len(requests))
            for request in requests:
                request.future.set_exception(error)

    def _give_up(self, error: BaseException) -> None:
        with self._wake:
            self._fault = error
            requests = list(self._inbox)
            self._inbox.clear()
        requests = [r for r in requests if r.future.set_running_or_notify_cancel()]
        for request in [*self._running.values(), *requests]:
            request.future.set_exception(error)
        self._running.clear()


def _batch(images: Sequence[Tensor]) -> Tensor | Pixels:
    """Images float32 [C, H, W] as the model takes them."""
    if len({image.shape for image in images}) == 1:
        return torch.stack(list(images))
    return Pixels.of_list(images)
