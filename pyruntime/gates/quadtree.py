"""Which cells are divided where an image may have so many tokens and no more.

From the coarsest grid on, the cell with the highest score is divided until the next division would
exceed the budget (Quadformer, arXiv 2304.14287, for any rule that scores cells). Of equal scores
the cell that comes first in `ScaleGrid` is divided first; NaN is the highest score.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import pairwise

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.gates.scale_layout import ScaleGrid, ScaleLayout


def divided(
    layout: ScaleLayout, scores: Tensor, stops: Tensor, tokens: Sequence[int | None]
) -> Tensor:
    """The cells that a budget pays to divide, bool [C].

    Args:
        layout: of B images.
        scores: float32 [C].
        stops: bool [C], cells that are not divided, whatever the budget; of two scales they must
            be those of the lowest scores.
        tokens: of each image, how many patches it may have; None: any number.

    Raises:
        InvalidInput: a budget below the number of coarsest patches.
    """
    for grid, budget in zip(layout.grids, tokens, strict=True):
        if budget is not None:
            check_tokens(grid, budget)
    if layout.scales == 2:
        return _best(layout, scores, tokens)
    found = torch.ones(layout.coarse, dtype=torch.bool)
    first = layout.first_coarse.tolist()
    for (start, stop), grid, budget in zip(pairwise(first), layout.grids, tokens, strict=True):
        if budget is not None:
            part = scores[start:stop].nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
            taken = _best_first(grid, part.tolist(), stops[start:stop].tolist(), budget)
            found[start:stop] = torch.tensor(taken, dtype=torch.bool)
    return found


def check_tokens(grid: ScaleGrid, tokens: int, exact: bool = False) -> None:
    """Refuse a budget that no division of the image meets.

    Args:
        exact: the image must have exactly so many patches.

    Raises:
        InvalidInput: naming the numbers.
    """
    least = grid.starts[1] if grid.ratios else grid.fine
    if tokens < least:
        raise InvalidInput(f"scales: tokens={tokens}, but all coarse the image has {least}")
    step = math.gcd(*(ratio**2 - 1 for ratio in _steps(grid)))
    if exact and (tokens > grid.fine or (step and (tokens - least) % step)):
        raise InvalidInput(
            f"scales: exactly {tokens} tokens are not possible: {least} coarsest patches, each "
            f"division adds {step}, {grid.fine} at most"
        )


def _steps(grid: ScaleGrid) -> list[int]:
    """Side of a cell in cells of the next finer scale, the finest last."""
    return [b // a for a, b in pairwise((1, *grid.ratios))]


def _best(layout: ScaleLayout, scores: Tensor, tokens: Sequence[int | None]) -> Tensor:
    """Of two scales: the best of every image, as many as its budget pays."""
    image = layout.regions[:, 0].long()
    added = layout.ratios[0] ** 2 - 1
    affordable = torch.tensor([
        grid.coarse if budget is None else (budget - grid.coarse) // added
        for grid, budget in zip(layout.grids, tokens, strict=True)
    ], dtype=torch.int64)  # fmt: skip
    # Two stable sorts: by score, then by image. Cells lie image by image, so that the sorted
    # images are `image` again.
    order = scores.argsort(descending=True, stable=True)
    if layout.count > 1:
        order = order[image[order].argsort(stable=True)]
    rank = torch.arange(layout.coarse) - layout.first_coarse[image]
    return torch.empty(layout.coarse, dtype=torch.bool).scatter_(0, order, rank < affordable[image])


def _best_first(grid: ScaleGrid, scores: list[float], stops: list[bool], budget: int) -> list[bool]:
    """Of more scales: the cells of one image in the order that a heap gives."""
    children = _children(grid)
    heap = [(-scores[cell], cell) for cell in range(grid.starts[1]) if not stops[cell]]
    heapify(heap)
    count, found = grid.starts[1], [False] * len(scores)
    while heap:
        cell = heappop(heap)[1]
        count += len(children[cell]) - 1
        if count > budget:
            break
        found[cell] = True
        for child in children[cell]:
            if child < grid.coarse and not stops[child]:
                heappush(heap, (-scores[child], child))
    return found


@lru_cache(maxsize=64)
def _children(grid: ScaleGrid) -> dict[int, list[int]]:
    found = defaultdict(list)
    for cell, parent in enumerate(grid.parent.tolist()):
        found[parent].append(cell)
    return found
