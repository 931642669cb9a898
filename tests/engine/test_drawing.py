"""The picture of what the network saw: pixels where it was fine, means where it was coarse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pyruntime.engine.drawing import draw_regions
from pyruntime.engine.pillow import write_png
from pyruntime.errors import InvalidInput
from pyruntime.format.spec import Preprocess
from pyruntime.gates.scale import choose
from pyruntime.gates.scale_layout import ScaleGrid, ScaleLayout
from pyruntime.gates.vision_trace import ratio_map
from pyruntime.ops import reference

HALF = Preprocess((0.5,) * 3, (0.5,) * 3)


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([(2,), (3,), (2, 4)]),
    st.integers(0, 99),
)
def test_the_map_is_that_of_the_tokens(
    height: int, width: int, ratios: tuple[int, ...], seed: int
) -> None:
    layout = ScaleLayout.of(((height, width),), 4, ratios)
    (grid,) = layout.grids
    random = torch.Generator().manual_seed(seed)
    stops = torch.rand(grid.coarse, generator=random) < 0.5
    choice = choose(reference, layout, stops)
    found = ratio_map(grid, stops)
    assert found.dtype == torch.int32 and found.shape == (grid.rows, grid.columns)
    sides = choice.sizes.sqrt()[choice.slots(0).long()]
    assert found.flatten().tolist() == sides.int().tolist()


@pytest.mark.parametrize("patch", [4, 16])
def test_fine_regions_are_the_image_and_coarse_ones_darker_means(patch: int) -> None:
    grid = ScaleGrid.of(4 * patch, 4 * patch, patch, (2,))
    image = torch.rand(3, 4 * patch, 4 * patch, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ratios = ratio_map(grid, torch.tensor([True, False, False, True]))
    drawn = draw_regions(image, HALF, grid, ratios)
    times = drawn.shape[0] // (4 * patch)
    assert drawn.dtype == torch.uint8 and drawn.shape == (*[4 * patch * times] * 2, 3)
    assert max(drawn.shape) >= 512
    colours = (image / 2 + 0.5) * 255

    def pixel(row: int, column: int) -> torch.Tensor:
        """Of the drawing, in the last corner of a pixel of the image."""
        return drawn[(row + 1) * times - 1, (column + 1) * times - 1].float()

    last = patch - 1
    for row, column in ((last, 2 * patch + last), (3 * patch + last, patch + last)):
        assert torch.allclose(pixel(row, column), colours[:, row, column], atol=0.51)
    mean = colours[:, 2 * last : 2 * last + 2, 2 * last : 2 * last + 2].mean((1, 2)) * 0.7
    for offset in (0, 1):
        seen = pixel(2 * last + offset, 2 * last + offset)
        assert torch.allclose(seen, mean, atol=0.51)
    yellow = (drawn == torch.tensor([255, 204, 26])).all(2)
    assert bool(yellow.any())
    all_fine = draw_regions(image, HALF, grid, torch.ones_like(ratios))
    assert not bool((all_fine == torch.tensor([255, 204, 26])).all(2).any())


@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 99))
@settings(max_examples=15)
def test_any_size_and_any_choice_can_be_drawn(height: int, width: int, seed: int) -> None:
    grid = ScaleGrid.of(height, width, 4, (2, 4))
    random = torch.Generator().manual_seed(seed)
    ratios = ratio_map(grid, torch.rand(grid.coarse, generator=random) < 0.5)
    grey = Preprocess((0.5,), (0.5,))
    drawn = draw_regions(torch.randn(1, height, width, generator=random), grey, grid, ratios)
    assert max(drawn.shape) >= 512 and drawn.shape[0] % (4 * grid.rows) == 0
    with pytest.raises(InvalidInput, match="1 or 3 channels, got 2"):
        draw_regions(torch.zeros(2, height, width), grey, grid, ratios)


def test_the_file_says_what_it_shows(tmp_path: Path) -> None:
    pixels = torch.full((300, 600, 3), 7, dtype=torch.uint8)
    facts = {"class": "zèbre 斑馬", "tokens": "32"}
    for number, caption in enumerate(("zebra · 32 of 257 tokens", "a very long name " * 20)):
        path = tmp_path / f"{number}.png"
        write_png(path, pixels, caption, facts)
        with Image.open(path) as picture:
            assert picture.format == "PNG" and picture.mode == "RGB"
            assert picture.text == facts  # type: ignore[attr-defined]
            assert picture.width == 600 and 300 < picture.height < 350
            assert picture.crop((0, 0, 600, 300)).getcolors() == [(600 * 300, (7, 7, 7))]
            written = picture.crop((0, 300, 600, picture.height)).convert("L")
            box = written.point(lambda value: 255 * (value < 128)).getbbox()
            assert box is not None and box[2] < 600  # the caption fits
    with pytest.raises(OSError, match="none"):
        write_png(tmp_path / "none" / "a.png", pixels, "", {})
