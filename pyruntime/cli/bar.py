"""A progress bar on a terminal; silence everywhere else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from tqdm import tqdm


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A `progress(done, total)` function that redraws one line of stderr, if that is a terminal."""
    with tqdm(desc=label, disable=None, leave=False, unit_scale=True) as bar:

        def draw(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield draw
