"""One thread owns the engine; the event loop owns the streams. They exchange messages only.

Loop to thread: commands in a queue, read between steps. Thread to loop: one call per step.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pyruntime.engine.engine import Engine, EngineStats
from pyruntime.engine.request import Request, StepOutput
from pyruntime.errors import PyRuntimeError

log = logging.getLogger("pyruntime.serve")

_JOIN_SECONDS = 5.0


class EngineDead(Exception):
    """The engine stopped on an error; nothing can be answered any more."""


class QueueFull(Exception):
    """Too many requests wait already."""


@dataclass(frozen=True, slots=True)
class _Command:
    kind: Literal["add", "abort", "stop"]
    request: Request | None = None


class Stream:
    """The outputs of one request, read on the event loop. A slow reader gets them merged."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.finished = False
        self._pending: list[StepOutput] = []
        self._error: EngineDead | None = None
        self._wake = asyncio.Event()

    def push(self, output: StepOutput) -> None:
        self._pending.append(output)
        self.finished = output.finish_reason is not None
        self._wake.set()

    def fail(self, error: EngineDead) -> None:
        self._error = error
        self.finished = True
        self._wake.set()

    async def next(self) -> list[StepOutput]:
        """Every output since the last call, at least one. Raises EngineDead."""
        while not self._pending:
            if self._error is not None:
                raise self._error
            self._wake.clear()
            await self._wake.wait()
        outputs, self._pending = self._pending, []
        return outputs


class EngineThread:
    """Starts with `start`; `load` runs on the thread, so the server answers while a model loads.

    All methods belong to the event loop. `on_fault` is called there, once, after every waiting
    stream has been failed.
    """

    def __init__(
        self, load: Callable[[], Engine], max_waiting: int, on_fault: Callable[[], None]
    ) -> None:
        self._load = load
        self._max_waiting = max_waiting
        self._on_fault = on_fault
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._streams: dict[str, Stream] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._progress = time.monotonic()
        self.engine: Engine | None = None
        self.stats = EngineStats(0, 0, 0, 0, 0)
        self.error: Exception | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def in_flight(self) -> int:
        return len(self._streams)

    @property
    def step_age(self) -> float:
        """Seconds since the engine last finished a step, or last had nothing to do."""
        return time.monotonic() - self._progress

    @property
    def busy(self) -> bool:
        return bool(self._streams) or self.stats.running > 0

    def submit(self, request: Request) -> Stream:
        """Queues a request. Raises QueueFull or EngineDead."""
        if self.error is not None or self.engine is None:
            raise EngineDead("the engine has stopped")
        seats = self.engine.config.max_num_seqs + self._max_waiting
        # Two bounds: seats in all, and known waiters (requests wait with seats free when the
        # cache is short). Waiters not yet seen by the engine count under the first.
        if len(self._streams) >= seats or self.stats.waiting >= max(self._max_waiting, 1):
            raise QueueFull(f"{len(self._streams)} requests in flight")
        if not self.busy:
            self._progress = time.monotonic()
        stream = self._streams[request.id] = Stream(request)
        self._inbox.put(_Command("add", request))
        return stream

    def release(self, stream: Stream) -> None:
        """The reader is done; an unfinished request is aborted before the next step."""
        if self._streams.pop(stream.request.id, None) is not None and not stream.finished:
            self._inbox.put(_Command("abort", stream.request))

    def abort_all(self) -> None:
        """Ends every request; their readers get what there is, with finish_reason abort."""
        for stream in self._streams.values():
            self._inbox.put(_Command("abort", stream.request))

    def give_up(self) -> None:
        """Fails every request: the engine hangs in a step and will not end them itself."""
        self._fail_all("the engine does not answer")

    def stop(self) -> bool:
        """Ends the thread after the step it is in; False if it does not end."""
        self._inbox.put(_Command("stop"))
        self._thread.join(_JOIN_SECONDS)
        return not self._thread.is_alive()

    # ---- on the engine thread ----

    def _run(self) -> None:
        try:
            engine = self._load()
            self._post(self._loaded, engine)
            self._serve(engine)
        except Exception as error:  # the one fault barrier: whatever ended the engine is reported
            known = isinstance(error, PyRuntimeError)
            log.critical("engine stopped: %s", error, exc_info=None if known else error)
            self._post(self._fault, error)

    def _serve(self, engine: Engine) -> None:
        while True:
            idle = not engine.has_unfinished()
            if idle:
                # Nothing running: the moment to prove that every block came back.
                engine.scheduler.check()
                self._post(self._deliver, [], engine.stats())
            outputs: list[StepOutput] = []
            while idle or not self._inbox.empty():
                command = self._inbox.get()
                idle = False
                if command.kind == "stop":
                    return
                if command.request is None:
                    continue
                if command.kind == "add":
                    engine.add_request(command.request)
                elif (aborted := engine.abort(command.request)) is not None:
                    outputs.append(aborted)
            outputs += engine.step()
            self._progress = time.monotonic()
            self._post(self._deliver, outputs, engine.stats())

    def _post(self, call: Callable[..., None], *args: object) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *args)

    # ---- on the event loop ----

    def _loaded(self, engine: Engine) -> None:
        self.engine = engine
        self.stats = engine.stats()
        log.info(
            "ready: context of %d tokens, %d cache blocks",
            engine.max_model_len,
            self.stats.total_blocks,
        )

    def _deliver(self, outputs: list[StepOutput], stats: EngineStats) -> None:
        self.stats = stats
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.push(output)

    def _fault(self, error: Exception) -> None:
        self.error = error
        self._fail_all("the engine failed while this request was running")
        self._on_fault()

    def _fail_all(self, reason: str) -> None:
        for stream in self._streams.values():
            stream.fail(EngineDead(reason))
