"""A progress bar on a terminal; silence everywhere else."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

_WIDTH = 30


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None] | None]:
    """A `progress(done, total)` function that redraws one line of stderr, or None in a pipe."""
    if not sys.stderr.isatty():
        yield None
        return
    started = time.monotonic()
    drawn = -1

    def draw(done: int, total: int) -> None:
        nonlocal drawn
        share = done / total if total else 1.0
        if int(1000 * share) == drawn:
            return
        drawn = int(1000 * share)
        left = (time.monotonic() - started) * (1 / share - 1) if share else 0.0
        bar = "█" * round(_WIDTH * share)
        line = f"\r{label} {bar:░<{_WIDTH}} {share:4.0%}, {left:.0f} s left\x1b[K"
        print(line, end="", file=sys.stderr, flush=True)

    try:
        yield draw
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
