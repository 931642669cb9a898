"""Budgets of tokens: the best cells are divided first."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyruntime.errors import InvalidInput
from pyruntime.gates.quadtree import divided
from pyruntime.gates.scale import ScaleRule, choose, settle, stops_of
from pyruntime.gates.scale_layout import ScaleGrid, ScaleLayout
from pyruntime.ops import native
from tests.gates.scale_cases import PREPROCESS, photos, ratios, sizes


def plainly(grid: ScaleGrid, scores: list[float], stops: list[bool], budget: int) -> list[bool]:
    """The rule as one would say it: look for the best cell, divide it, until it does not fit."""
    parent = grid.parent.tolist()
    tokens = list(range(grid.starts[1]))
    found = [False] * grid.coarse
    while True:
        able = [cell for cell in tokens if cell < grid.coarse and not stops[cell]]
        if not able:
            return found
        best = max(able, key=lambda cell: (scores[cell], -cell))
        children = [cell for cell in range(grid.cells) if parent[cell] == best]
        if len(tokens) - 1 + len(children) > budget:
            return found
        tokens.remove(best)
        tokens += children
        found[best] = True


@given(sizes, ratios, st.integers(0, 2**31), st.booleans())
def test_the_best_cells_are_divided_first(
    shapes: list[tuple[int, int]], ratios: tuple[int, ...], seed: int, some_stop: bool
) -> None:
    layout = ScaleLayout.of(tuple(shapes), 3, ratios)
    generator = torch.Generator().manual_seed(seed)
    # Few values, so that many scores are equal.
    scores = torch.randint(0, 4, (layout.coarse,), generator=generator).float()
    stops = scores < 1 if some_stop else torch.zeros(layout.coarse, dtype=torch.bool)
    budgets: list[int | None] = []
    for grid in layout.grids:
        most = grid.fine - grid.starts[1]
        extra = int(torch.randint(-2, most + 3, (1,), generator=generator))
        budgets.append(None if extra == -2 else grid.starts[1] + max(extra, 0))
    found = divided(layout, scores, stops, budgets)
    final = stops | ~found
    active = settle(layout, final)
    first = 0
    for i, (grid, budget) in enumerate(zip(layout.grids, budgets, strict=True)):
        own = slice(first, first + grid.coarse)
        first += grid.coarse
        if budget is None:
            assert bool(found[own].all())
            continue
        expected = plainly(grid, scores[own].tolist(), stops[own].tolist(), budget)
        assert (~final[own]).tolist() == expected
        cells = slice(int(layout.first[i]), int(layout.first[i + 1]))
        assert int(active[cells].sum()) <= budget


@pytest.mark.parametrize("ratios", [(2,), (2, 4)])
def test_nan_is_divided_first(ratios: tuple[int, ...]) -> None:
    layout = ScaleLayout.of(((8, 24),), 2, ratios)
    scores = torch.zeros(layout.coarse)
    scores[:3] = torch.tensor([math.inf, 7.0, math.nan])
    stops = torch.zeros(layout.coarse, dtype=torch.bool)
    start = layout.grids[0].starts[1]
    found = divided(layout, scores, stops, [start + 3])
    # A heap cannot tell NaN from infinity, and takes the lower cell.
    assert torch.nonzero(found)[:, 0].tolist() in ([0], [2])
    scores[0] = 0.0
    found = divided(layout, scores, stops, [start + 3])
    assert torch.nonzero(found)[:, 0].tolist() == [2]


def test_a_quadtree_has_exactly_so_many_patches() -> None:
    pixels = photos([(64, 64), (64, 64)])
    layout = ScaleLayout.of(pixels.sizes, 4, (2, 4, 8))
    for tokens in (4, 7, 100, 256):
        stops = stops_of(
            native, pixels, layout, [ScaleRule("quadtree", tokens=tokens)] * 2, PREPROCESS
        )
        assert choose(native, layout, stops).cu_seqlens(0).diff().tolist() == [tokens] * 2
    for tokens in (99, 101, 259):
        with pytest.raises(InvalidInput, match=f"exactly {tokens}.*4 coarsest.*adds 3, 256"):
            ScaleRule("quadtree", tokens=tokens).check(layout.grids[0])
    ScaleRule("random", tokens=101).check(layout.grids[0])  # the largest number that fits
    with pytest.raises(InvalidInput, match="tokens=3, but all coarse the image has 4"):
        ScaleRule("random", tokens=3).check(layout.grids[0])
