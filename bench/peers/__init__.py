"""Drivers of other engines, each in its own process and environment."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

VARIABLE = "PYRUNTIME_PEER_PYTHON"


class Peer:
    """Another engine in another process: blocked on its input unless it was asked something.

    Attributes:
        versions: what it announced.
    """

    def __init__(self, python: str, script: str, *arguments: str) -> None:
        command = [python, str(Path(__file__).with_name(script)), *arguments]
        # Our module path would shadow its packages.
        clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean
        )
        self.versions = self._answer()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"peer ended with status {self._process.wait()}")
        return dict(json.loads(line))

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


def peer_python() -> str | None:
    """The interpreter of the peers' environment, or None: then a peer is reported as absent."""
    return os.environ.get(VARIABLE)
