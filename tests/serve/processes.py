"""Starts a server process, finds its port, and makes sure it is gone afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai


class Server:
    def __init__(self, command: list[str]) -> None:
        # A pipe nobody reads would block the server once it is full.
        self._log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command,
            cwd=os.getcwd(),
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if "listening on " not in line:
            self.process.wait(10)
            raise RuntimeError(f"no address: {line!r} {self.log()}")
        self.url = line.split("listening on ")[1].strip()

    def wait_ready(self, seconds: float = 60) -> None:
        self.wait_for(lambda ready: ready["ready"], seconds)

    def ready(self) -> dict[str, Any]:
        return dict(httpx.get(self.url + "/readyz", timeout=10).json())

    def wait_for(self, condition: Any, seconds: float = 10) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while not condition(body := self.ready()):
            if time.monotonic() > end:
                raise TimeoutError(f"{body}")
            time.sleep(0.02)
        return body

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=30)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=30, **options)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float = 30) -> int:
        return self.process.wait(seconds)

    def log(self) -> str:
        """Everything the process has logged."""
        self._log.seek(0)
        return self._log.read()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        self._log.close()


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[Server]:
    server = Server(command)
    try:
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def started(*options: str, ready: bool = True) -> Iterator[Server]:
    """The fake model's server."""
    with running([sys.executable, "-m", "tests.serve.fake_server", *options]) as server:
        if ready:
            server.wait_ready()
        yield server
