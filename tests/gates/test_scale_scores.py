"""Rules that read pixels alone, against the plainest code that says the same."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pyruntime.errors import InvalidInput
from pyruntime.gates.scale_layout import ScaleGrid
from pyruntime.gates.scale_scores import chance, entropy, resize_error, variance
from tests.gates.scale_cases import PREPROCESS, photos, ratios

side = st.integers(3, 30)
seeds = st.integers(0, 2**31)


def coarse_places(grid: ScaleGrid) -> list[tuple[int, int, int]]:
    """Top, left and side in pixels."""
    return [(top, left, ratio * grid.patch)
            for top, left, ratio in grid.places[: grid.coarse].tolist()]  # fmt: skip


@given(side, side, ratios, seeds)
def test_variance(height: int, width: int, ratios: tuple[int, ...], seed: int) -> None:
    image = photos([(height, width)], seed).image(0)
    grid = ScaleGrid.of(height, width, 3, ratios)
    padded = torch.zeros(3, grid.rows * 3, grid.columns * 3)
    padded[:, :height, :width] = image
    expected = [padded[:, y : y + s, x : x + s].double().var() for y, x, s in coarse_places(grid)]
    torch.testing.assert_close(variance(image, grid), torch.stack(expected).float())


@given(side, side, ratios, seeds, st.sampled_from([1, 3]))
def test_entropy(
    height: int, width: int, ratios: tuple[int, ...], seed: int, channels: int
) -> None:
    image = photos([(height, width)], seed, channels).image(0)
    grid = ScaleGrid.of(height, width, 3, ratios)
    weights = torch.tensor([0.2989, 0.5870, 0.1140]) if channels == 3 else torch.ones(1)
    std, mean = (torch.tensor(v)[:channels, None, None] for v in (PREPROCESS.std, PREPROCESS.mean))
    gray = (weights[:, None, None] * (image.double() * std + mean) * 255).sum(0)
    found = entropy(image, grid, PREPROCESS)
    for bits, (y, x, s) in zip(found.tolist(), coarse_places(grid), strict=True):
        if y + s > height or x + s > width:
            assert bits == 1e6
            continue
        levels = gray[y : y + s, x : x + s].flatten().tolist()
        near_an_edge = sum(abs(2 * v - round(2 * v)) < 1e-3 for v in levels)
        counts = Counter(min(max(math.floor(2 * v), 0), 511) for v in levels)
        shares = [n / len(levels) for n in counts.values()]
        expected = -sum(p * math.log2(p + 1e-10) for p in shares)
        # A level on the edge of a bin may fall on either side of it; each moves the entropy by
        # less than log2(n) * 2 / n.
        slack = near_an_edge * 2 * math.log2(len(levels) + 1) / len(levels)
        assert abs(bits - expected) <= 1e-4 + slack


def test_entropy_by_hand() -> None:
    """Four levels of equal share are two bits; half a level apart is another bin."""
    levels = torch.tensor([10.1, 10.6, 200.2, 255.9]).repeat(4, 1)[None]
    flat = torch.full((1, 4, 4), 77.2)
    std, mean = PREPROCESS.std[0], PREPROCESS.mean[0]
    image = (torch.cat([levels, flat], 2) / 255 - mean) / std
    grid = ScaleGrid.of(4, 8, 2, (2,))
    bits = entropy(image, grid, PREPROCESS)
    torch.testing.assert_close(bits, torch.tensor([2.0, 0.0]), atol=1e-5, rtol=0)


def test_entropy_needs_colours() -> None:
    with pytest.raises(InvalidInput, match="1 or 3 channels, got 2"):
        entropy(torch.zeros(2, 4, 4), ScaleGrid.of(4, 4, 2, (2,)), PREPROCESS)


@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([(2,), (2, 4), (3,)]), seeds)
def test_resize_error(down: int, across: int, ratios: tuple[int, ...], seed: int) -> None:
    """The scorer of Quadformer's code, on whole images."""
    patch = 3
    unit = patch * ratios[-1]
    height, width = down * unit, across * unit
    image = photos([(height, width)], seed).image(0)
    grid = ScaleGrid.of(height, width, patch, ratios)
    expected = []
    for ratio in reversed(ratios):
        small = F.interpolate(image[None], (height // ratio, width // ratio), mode="bilinear")
        error = (F.interpolate(small, (height, width), mode="bilinear") - image[None]) ** 2
        s = ratio * patch
        expected.append((F.avg_pool3d(error, (3, s, s), s) * s).sqrt().flatten())
    torch.testing.assert_close(resize_error(image, grid), torch.cat(expected))


def test_chance_is_of_the_seed() -> None:
    assert torch.equal(chance(5, 9), torch.rand(9, generator=torch.Generator().manual_seed(5)))
    assert not torch.equal(chance(5, 9), chance(6, 9))
