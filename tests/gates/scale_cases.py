"""Batches of images, their cells and rules about them, for the tests of mixed scales."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from pyruntime.format.spec.vision import Preprocess
from pyruntime.gates.scale import ScaleRule
from pyruntime.gates.scale_layout import ScaleLayout
from pyruntime.ops.pixels import Pixels

PREPROCESS = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
RATIOS = [(2,), (3,), (4,), (2, 4), (2, 6), (2, 4, 8)]

ratios = st.sampled_from(RATIOS)
sizes = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=5)


@st.composite
def layouts(draw: st.DrawFn) -> ScaleLayout:
    return ScaleLayout.of(tuple(draw(sizes)), draw(st.integers(1, 5)), draw(ratios))


def random_stops(layout: ScaleLayout, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(1, generator=generator)
    return torch.rand(layout.coarse, generator=generator) < share


def photos(shapes: list[tuple[int, int]], seed: int = 0, channels: int = 3) -> Pixels:
    """Normalised images of whole grey levels, part of them smooth."""
    generator = torch.Generator().manual_seed(seed)
    mean, std = (torch.tensor(values)[:channels, None, None]
                 for values in (PREPROCESS.mean, PREPROCESS.std))  # fmt: skip
    found = []
    for height, width in shapes:
        levels = torch.randint(0, 256, (channels, height, width), generator=generator).float()
        calm = torch.rand(1, height, width, generator=generator) < 0.5
        calm[:, : height // 2] = True
        levels = torch.where(calm, 0.5 * levels.mean(), levels).floor()
        found.append((levels / 255 - mean) / std)
    return Pixels.of_list(found)


def rules_of_every_source(tokens: int) -> list[ScaleRule]:
    """Of two scales."""
    return [
        ScaleRule("variance", (0.5,)),
        ScaleRule("variance", tokens=tokens),
        ScaleRule("entropy", (4.0,)),
        ScaleRule("entropy", tokens=tokens),
        ScaleRule("quadtree", tokens=tokens),
        ScaleRule("random", tokens=tokens, seed=3),
        ScaleRule("all_fine"),
        ScaleRule("all_coarse"),
    ]
