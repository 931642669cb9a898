"""Where the patches of all scales lie."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyruntime.errors import InvalidInput
from pyruntime.gates.scale_layout import ScaleGrid, ScaleLayout
from tests.gates.scale_cases import layouts, ratios

side = st.integers(1, 50)


@given(side, side, st.integers(1, 5), ratios)
def test_every_scale_tiles_the_padded_image(
    height: int, width: int, patch: int, ratios: tuple[int, ...]
) -> None:
    grid = ScaleGrid.of(height, width, patch, ratios)
    unit = patch * ratios[-1]
    down, across = grid.rows * patch, grid.columns * patch
    assert 0 <= down - height < unit and 0 <= across - width < unit
    assert down % unit == across % unit == 0
    for scale, ratio in enumerate((*reversed(ratios), 1)):
        cells = torch.nonzero(grid.scale == scale)[:, 0].tolist()
        assert cells[0] == grid.starts[scale]
        assert cells == list(range(cells[0], cells[0] + len(cells)))
        step = ratio * patch
        raster = [(y, x, ratio) for y in range(0, down, step) for x in range(0, across, step)]
        assert [tuple(place) for place in grid.places[cells].tolist()] == raster
    assert grid.cells == len(grid.scale) == grid.coarse + grid.fine


@given(side, side, st.integers(1, 5), ratios)
def test_parents_and_chains_hold_their_cells(
    height: int, width: int, patch: int, ratios: tuple[int, ...]
) -> None:
    grid = ScaleGrid.of(height, width, patch, ratios)
    top, left, ratio = grid.places.long().unbind(1)
    held = grid.parent >= 0
    assert torch.equal(held, grid.scale > 0)
    up = grid.parent[held]
    assert torch.equal(grid.scale[up] + 1, grid.scale[held])
    for corner, size in ((top, ratio * patch), (left, ratio * patch)):
        assert bool((corner[up] <= corner[held]).all())
        assert bool((corner[held] + size[held] <= corner[up] + size[up]).all())
    assert torch.equal(grid.chain[-1], torch.arange(grid.coarse, grid.cells))
    for finer, coarser in zip(grid.chain[1:], grid.chain, strict=False):
        assert torch.equal(grid.parent[finer], coarser)


@given(layouts())
def test_a_batch_is_its_images_one_after_the_other(layout: ScaleLayout) -> None:
    scales, first = layout.scales, layout.first.tolist()
    coarse = 0
    tables = torch.cat([table.places for table in layout.tables])
    regions = torch.cat([table.places[: table.coarse] for table in layout.tables])
    for i, grid in enumerate(layout.grids):
        own = slice(first[i], first[i + 1])
        assert first[i + 1] - first[i] == grid.cells
        places = layout.places[own]
        assert set(places[:, 0].tolist()) == {i} and torch.equal(places[:, 1:], grid.places)
        assert torch.equal(layout.labels[own], i * scales + grid.scale)
        assert torch.equal(layout.areas[own], grid.places[:, 2].float() ** 2)
        parent = torch.where(grid.parent < 0, -1, grid.parent + first[i])
        assert torch.equal(layout.parent[own], parent)
        cells = layout.coarse_cells[coarse : coarse + grid.coarse]
        assert torch.equal(cells, torch.arange(first[i], first[i] + grid.coarse))
        assert layout.first_coarse[i] == coarse
        fine = slice(int(layout.first_fine[i]), int(layout.first_fine[i + 1]))
        assert torch.equal(layout.chain[:, fine], grid.chain + first[i])
        coarse += grid.coarse
    assert layout.coarse == coarse and layout.cells == first[-1] == len(layout.places)
    # Tables of positions hold the right cell of the right grid.
    assert torch.equal(tables[layout.position_rows], layout.places[:, 1:])
    assert torch.equal(regions[layout.region_rows, :2], layout.regions[:, 1:3])
    assert torch.equal(layout.regions[:, :3], layout.places[layout.coarse_cells, :3])
    assert bool((layout.regions[:, 3] == 1).all())
    assert torch.equal(layout.coarse_labels, layout.labels[layout.coarse_cells].long())
    shapes = [(grid.rows, grid.columns) for grid in layout.tables]
    assert len(set(shapes)) == len(shapes)


def test_one_scale_has_the_patches_alone() -> None:
    layout = ScaleLayout.of(((8, 12), (4, 4)), 4, ())
    assert layout.scales == 1 and layout.coarse == 0
    assert layout.places.tolist() == [
        [0, 0, 0, 1], [0, 0, 4, 1], [0, 0, 8, 1], [0, 4, 0, 1], [0, 4, 4, 1], [0, 4, 8, 1],
        [1, 0, 0, 1],
    ]  # fmt: skip
    assert layout.chain.tolist() == [list(range(7))]


def test_no_images() -> None:
    layout = ScaleLayout.of((), 4, (2, 4))
    assert layout.count == layout.cells == layout.coarse == 0
    assert layout.first.tolist() == [0] and layout.chain.shape == (3, 0)


def test_layouts_are_kept() -> None:
    assert ScaleLayout.of(((9, 9),), 2, (2,)) is ScaleLayout.of(((9, 9),), 2, (2,))


def test_an_image_has_pixels() -> None:
    with pytest.raises(InvalidInput, match="0 x 3"):
        ScaleGrid.of(0, 3, 2, (2,))
