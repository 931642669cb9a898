"""From start to exit: bind, load, serve, drain, and an exit code that tells the truth."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import uvicorn

from pyruntime.engine.engine import Engine, EngineConfig
from pyruntime.errors import PyRuntimeError
from pyruntime.serve.app import State, make_app
from pyruntime.serve.engine_thread import EngineThread

log = logging.getLogger("pyruntime.serve")

_POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Times in seconds, sizes in bytes. `max_waiting` requests may wait beyond those running."""

    host: str = "127.0.0.1"
    port: int = 8000
    max_waiting: int = 256
    drain_seconds: float = 30.0
    stall_seconds: float = 60.0
    fault_grace_seconds: float = 1.0
    body_limit: int = 2 << 20
    engine: EngineConfig = field(default_factory=EngineConfig)


def serve(
    path: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    device: str = "cpu",
    model_name: str | None = None,
    max_waiting: int = 256,
    drain_seconds: float = 30.0,
    engine: EngineConfig = EngineConfig(),  # noqa: B008
) -> int:
    """Serves a runtime folder until SIGTERM or SIGINT; returns the exit code of the process.

    The model's name is the folder's name unless model_name is given. Prints one line with the
    address once it listens; requests get 503 until the model is loaded.
    """

    def load_engine() -> Engine:
        from pyruntime.engine.runtime import load

        return Engine(load(path, device=device), engine)

    config = ServeConfig(
        host=host, port=port, max_waiting=max_waiting, drain_seconds=drain_seconds, engine=engine
    )
    return run(load_engine, model_name or Path(path).resolve().name, config)


def run(load: Callable[[], Engine], model: str, config: ServeConfig) -> int:
    """The server around any engine: 0 after a clean stop, 1 when the engine failed."""
    lifecycle = _Lifecycle(load, model, config)
    with asyncio.Runner(loop_factory=lifecycle.loop_factory) as runner:
        return runner.run(lifecycle.run())


class _Lifecycle:
    def __init__(self, load: Callable[[], Engine], model: str, config: ServeConfig) -> None:
        self._config = config
        self._failed = False
        self._ending: asyncio.Task[None] | None = None
        engine = EngineThread(load, config.max_waiting, on_fault=self._fault)
        self._state = State(
            engine=engine,
            model=model,
            body_limit=config.body_limit,
            stall_seconds=config.stall_seconds,
            created=int(time.time()),
        )
        self._server = _Server(
            uvicorn.Config(
                make_app(self._state),
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=2,
            ),
            on_signal=self._signalled,
        )

    @property
    def loop_factory(self) -> Callable[[], asyncio.AbstractEventLoop] | None:
        """uvloop's where it is installed."""
        return self._server.config.get_loop_factory()

    async def run(self) -> int:
        family = socket.AF_INET6 if ":" in self._config.host else socket.AF_INET
        listener = socket.create_server(
            (self._config.host, self._config.port), family=family, backlog=2048
        )
        engine = self._state.engine
        engine.start()
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        print(f"listening on http://{shown}:{port}", flush=True)
        await self._server.serve(sockets=[listener])
        if not engine.stop():
            log.critical("the engine did not stop; leaving it behind")
            self._failed |= engine.engine is not None  # a load cut short has failed nobody
        if engine.engine is None and isinstance(engine.error, PyRuntimeError):
            raise engine.error  # the model could not be loaded: the caller's to report
        return 1 if self._failed else 0

    def _signalled(self, again: bool) -> None:
        if again:
            self._server.should_exit = self._server.force_exit = True
        elif self._ending is None:
            self._ending = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        """New requests get 503 from now on; those in flight have drain_seconds to finish."""
        self._state.draining = True
        engine = self._state.engine
        log.info("draining %d requests", engine.in_flight)
        if not await self._emptied(self._config.drain_seconds):
            log.warning("aborting %d requests", engine.in_flight)
            engine.abort_all()
            if not await self._emptied(1.0):
                engine.give_up()
                await self._emptied(1.0)
        self._server.should_exit = True

    async def _emptied(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while self._state.engine.in_flight and time.monotonic() < end:
            await asyncio.sleep(_POLL_SECONDS)
        return not self._state.engine.in_flight

    def _fault(self) -> None:
        self._failed = True
        # The grace lets the failed requests' answers leave and a health check see the reason.
        started = self._state.engine.engine is not None
        grace = self._config.fault_grace_seconds if started else 0
        asyncio.get_running_loop().call_later(grace, self._exit)

    def _exit(self) -> None:
        self._server.should_exit = True


class _Server(uvicorn.Server):
    """uvicorn, but a signal starts our drain instead of closing the door."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[bool], None]) -> None:
        super().__init__(config)
        self._on_signal = on_signal
        self._loop: asyncio.AbstractEventLoop | None = None
        self._signals = 0

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._on_signal, self._signals > 1)
