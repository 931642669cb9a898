"""Tables of positions for other grids and for coarser patches."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.format.spec.positions import coarsen_positions, resize_positions, sine_positions

SIDES = st.integers(1, 7)


def table_of(rows: int, columns: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows * columns, width, generator=torch.Generator().manual_seed(seed))


@given(grid=st.tuples(SIDES, SIDES), to=st.tuples(SIDES, SIDES), width=st.integers(1, 9),
       seed=st.integers(0, 99))  # fmt: skip
def test_resizing(grid: tuple[int, int], to: tuple[int, int], width: int, seed: int) -> None:
    """Channel by channel an image resize; the same grid is not touched, a constant stays one."""
    table = table_of(*grid, width, seed)
    for rule, antialias in (("bicubic_aa", True), ("bicubic", False)):
        found = resize_positions(table, grid, to, rule)  # type: ignore[arg-type]
        assert found.shape == (to[0] * to[1], width) and found.dtype == torch.float32
        if grid == to:
            assert torch.equal(found, table)
        for channel in range(width):
            image = table[:, channel].view(1, 1, *grid)
            wanted = F.interpolate(image, to, mode="bicubic", antialias=antialias)
            torch.testing.assert_close(found[:, channel], wanted.flatten(), rtol=1e-5, atol=1e-5)
        constant = resize_positions(torch.ones_like(table), grid, to, rule)  # type: ignore[arg-type]
        torch.testing.assert_close(constant, torch.ones_like(found), rtol=0, atol=1e-5)


@given(coarse=st.tuples(st.integers(1, 4), st.integers(1, 4)), ratio=st.integers(1, 5),
       width=st.integers(1, 9), seed=st.integers(0, 99))  # fmt: skip
def test_area(coarse: tuple[int, int], ratio: int, width: int, seed: int) -> None:
    grid = coarse[0] * ratio, coarse[1] * ratio
    table = table_of(*grid, width, seed)
    found = coarsen_positions(table, grid, ratio, "area")
    for i in range(coarse[0]):
        for j in range(coarse[1]):
            children = [
                table[(i * ratio + y) * grid[1] + j * ratio + x]
                for y in range(ratio)
                for x in range(ratio)
            ]
            mean = torch.stack(children).double().mean(0).float()
            torch.testing.assert_close(found[i * coarse[1] + j], mean, rtol=1e-5, atol=1e-6)


def test_rules_differ_where_they_should() -> None:
    """Two by two, area is bilinear; timm's resampler is not; four by four, none is another."""
    table = table_of(8, 12, 16, 3)
    area, bilinear, bicubic = (
        coarsen_positions(table, (8, 12), 2, rule) for rule in ("area", "bilinear", "bicubic_aa")
    )
    assert (area - bilinear).abs().max() <= 1.2e-7
    assert (area - bicubic).abs().max() > 0.1
    middle = table.view(2, 4, 3, 4, 16)[:, 1:3, :, 1:3].mean((1, 3)).view(6, 16)
    torch.testing.assert_close(coarsen_positions(table, (8, 12), 4, "bilinear"), middle)
    assert (coarsen_positions(table, (8, 12), 4, "area") - middle).abs().max() > 0.1


@given(rows=st.integers(1, 4), columns=st.integers(1, 4), ratio=st.integers(1, 4),
       quarter=st.integers(2, 8))  # fmt: skip
def test_sines(rows: int, columns: int, ratio: int, quarter: int) -> None:
    """Against the formula, number by number: x then y, sines then cosines, of the centre."""
    grid = rows * ratio, columns * ratio
    table = torch.zeros(grid[0] * grid[1], 4 * quarter)
    found = coarsen_positions(table, grid, ratio, "sinusoidal")
    assert torch.equal(found, sine_positions(grid, ratio, 4 * quarter))
    for i in range(rows):
        for j in range(columns):
            wanted = []
            for centre in ((j + 0.5) * ratio, (i + 0.5) * ratio):
                angles = [centre * 10000 ** (-n / (quarter - 1)) for n in range(quarter)]
                wanted += [math.sin(angle) for angle in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(
                found[i * columns + j], torch.tensor(wanted), rtol=0, atol=1e-5
            )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(6, 4), (2, 2), 2, "area"), "expected float32 [4, D] for 2 x 2 patches"),
        ((torch.zeros(4, 4).double(), (2, 2), 2, "area"), "got torch.float64 [4, 4]"),
        ((torch.zeros(6, 4), (2, 3), 2, "area"), "2 x 2 patches do not tile 2 x 3"),
        ((torch.zeros(4, 4), (2, 2), 2, "nearest"), "is 'nearest'"),
        ((torch.zeros(4, 6), (2, 2), 2, "sinusoidal"), "multiple of 4 channels from 8 on, not 6"),
    ],
)
def test_refusals_of_coarsening(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        coarsen_positions(*arguments)  # type: ignore[arg-type]
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("to_grid", "rule", "message"),
    [
        ((0, 2), "bicubic", "a grid of 0 x 2 patches"),
        ((3, 3), "area", "must be bicubic_aa or bicubic, is 'area'"),
    ],
)
def test_refusals_of_resizing(to_grid: tuple[int, int], rule: str, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        resize_positions(torch.zeros(4, 4), (2, 2), to_grid, rule)  # type: ignore[arg-type]
    assert message in str(caught.value)
