"""Position tables of the grids of a batch, made when a grid is seen first."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from pyruntime.gates.scale_layout import ScaleGrid, ScaleLayout

_KEPT = 16  # tables of this many grids, and of this many lists of grids


class PositionTables:
    """One table after the other, as `ScaleLayout.tables` lists their grids.

    Args:
        make: the table of one grid, float32 [rows, D].
    """

    def __init__(self, make: Callable[[ScaleGrid], Tensor]) -> None:
        one = lru_cache(maxsize=_KEPT)(make)

        def joined(grids: tuple[ScaleGrid, ...]) -> Tensor:
            return one(*grids) if len(grids) == 1 else torch.cat([one(grid) for grid in grids])

        self._joined = lru_cache(maxsize=_KEPT)(joined)

    def of(self, layout: ScaleLayout) -> Tensor:
        """float32, the tables of the distinct grids of at least one image."""
        return self._joined(layout.tables)
