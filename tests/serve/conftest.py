from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serve.processes import Server, started


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A fast fake server shared by all tests that leave it as they found it."""
    with started() as server:
        yield server


@pytest.fixture(scope="session")
def slow_server() -> Iterator[Server]:
    """One request at a time, 50 ms a step, one waiting place."""
    with started("--step-seconds", "0.05", "--max-num-seqs", "1", "--max-waiting", "1") as server:
        yield server
