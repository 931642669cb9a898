"""Patches of several sizes to tokens, against plain torch."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyruntime.format.spec import ScaleSpec, VisionSpec
from pyruntime.gates.scale import ScaleChoice, choose
from pyruntime.gates.scale_layout import ScaleLayout
from pyruntime.layers.residual import Linear
from pyruntime.layers.scale_embed import ScaleEmbed
from pyruntime.ops import Weight, native, reference
from pyruntime.ops.pixels import Pixels
from tests.gates.scale_cases import PREPROCESS, photos, random_stops

both = pytest.mark.parametrize("ops", [native, reference])
D, PATCH, PREFIX = 24, 4, 2
SCALES: dict[str, ScaleSpec | None] = {
    "one": None,
    "shared": ScaleSpec((2,), source="all_fine"),
    "three": ScaleSpec((2, 4), source="all_fine"),
    "bilinear": ScaleSpec((2, 4), source="all_fine", resize="bilinear", positions="bilinear"),
    "odd": ScaleSpec((3,), source="all_fine", resize="bilinear", positions="bicubic_aa"),
    "sines": ScaleSpec((2, 4), source="all_fine", positions="sinusoidal"),
    "separate": ScaleSpec((2, 4), embed="separate", source="all_fine"),
    "regions": ScaleSpec((2, 4), embed="separate", kernel="region", source="all_fine"),
    "conv": ScaleSpec((2, 4), embed="conv", source="all_fine", resize="bilinear"),
    "conv 8": ScaleSpec((8,), embed="conv", source="all_fine", resize="bilinear"),
}  # fmt: skip


class Case:
    """An embedding of random weights, and the same in plain torch."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32) -> None:
        self.scales, self.dtype = SCALES[name], dtype
        self.ratios = () if self.scales is None else self.scales.ratios
        most = self.ratios[-1] if self.ratios else 1
        self.size = (2 * most * PATCH, 3 * most * PATCH)
        fields: dict[str, Any] = {"scales": self.scales, "image_size": self.size}
        self.spec = VisionSpec(
            source_family="test", stem="patch", patch_size=PATCH, hidden_size=D, num_layers=1,
            num_heads=1, mlp_size=8, num_classes=2, norm_eps=1e-6, prefix_tokens=PREFIX,
            preprocess=PREPROCESS, **fields,
        )  # fmt: skip
        self.random = torch.Generator().manual_seed(len(name))
        rows, columns = self.spec.grid
        self.positions = torch.randn(rows * columns, D, generator=self.random)
        self.matrices: dict[str, tuple[Tensor, Tensor]] = {}
        self.layer = ScaleEmbed.of(self.spec, self._linear, self.positions)

    def _linear(self, name: str) -> Linear:
        inner = 3 * PATCH * PATCH
        if name.startswith("coarse."):
            whole = self.scales is not None and self.scales.kernel == "region"
            inner *= self.ratios[int(name[-1])] ** 2 if whole else 1
        inner = {"conv": 4 * D, "zero": D}.get(name, inner)
        weight = torch.randn(D, inner, generator=self.random) / inner**0.5
        bias = torch.randn(D, generator=self.random)
        self.matrices[name] = weight, bias
        return Linear(Weight.pack(weight.to(self.dtype)), bias)

    def choice(self, pixels: Pixels, seed: int) -> ScaleChoice:
        layout = ScaleLayout.of(pixels.sizes, PATCH, self.ratios)
        return choose(native, layout, random_stops(layout, seed))

    def rows(self, ops: ModuleType, pixels: Pixels, choice: ScaleChoice) -> Tensor:
        total = choice.plan.kept + PREFIX * pixels.count
        x = torch.full((total, D), 7.5, dtype=self.dtype)
        self.layer(ops, pixels, choice, x, PREFIX)
        return x

    def every_token(self, image: Tensor) -> Tensor:
        """All cells of one image of the spec's size, [M, D], the coarsest first."""
        tokens = [self._of_ratio(image[None], ratio) for ratio in (*reversed(self.ratios), 1)]
        return torch.cat([t.flatten(2)[0].T for t in tokens])

    def _of_ratio(self, image: Tensor, ratio: int) -> Tensor:
        """[1, D, rows, columns]."""
        scales, (weight, bias) = self.scales, self.matrices["stem"]
        rows, columns = self.spec.grid
        shape = rows // ratio, columns // ratio
        table = self.positions.T.view(1, D, rows, columns)
        if scales is None:
            return _conv(image, weight, bias, PATCH) + table
        height, width = self.size[0] // ratio, self.size[1] // ratio
        if scales.resize == "area":
            small = F.avg_pool2d(image, ratio)
        else:
            small = F.interpolate(image, (height, width), mode="bilinear")
        own = scales.embed == "separate" and ratio > 1
        if own:
            weight, bias = self.matrices[f"coarse.{self.ratios.index(ratio)}"]
        if own and scales.kernel == "region":
            tokens = _conv(image, weight, bias, PATCH * ratio)
        else:
            tokens = _conv(small, weight, bias, PATCH)
        if scales.embed == "conv" and ratio > 1:
            tokens = tokens + self._apt(image, ratio)
        if scales.positions == "sinusoidal":
            return tokens + _sines(shape, ratio)
        if ratio == 1:
            return tokens + table
        if scales.positions == "area":
            return tokens + F.avg_pool2d(table, ratio)
        aa = scales.positions == "bicubic_aa"
        mode = "bicubic" if aa else "bilinear"
        return tokens + F.interpolate(table, shape, mode=mode, antialias=aa)

    def _apt(self, image: Tensor, ratio: int) -> Tensor:
        """patch_attn, a Conv2d(D, D, 2, 2), log2(ratio) times on the finest embeddings before they
        have positions, then zero_conv, a Linear."""
        x = _conv(image, *self.matrices["stem"], PATCH)
        weight, bias = self.matrices["conv"]
        kernel = weight.view(D, 2, 2, D).permute(0, 3, 1, 2)
        for _ in range(ratio.bit_length() - 1):
            x = F.conv2d(x, kernel, bias, stride=2)
        return F.linear(x.movedim(1, -1), *self.matrices["zero"]).movedim(-1, 1)


def _conv(image: Tensor, weight: Tensor, bias: Tensor, size: int) -> Tensor:
    return F.conv2d(image, weight.view(D, 3, size, size), bias, stride=size)


def _sines(shape: tuple[int, int], ratio: int) -> Tensor:
    """Quadformer's, channel by channel."""
    table = torch.empty(1, D, *shape)
    count = D // 4
    for channel in range(D):
        half, step = divmod(channel, D // 2)
        cosine, i = divmod(step, count)
        frequency = 10000 ** (-i / (count - 1))
        centre = (torch.arange(shape[1 - half]) + 0.5) * ratio * frequency
        wave = centre.cos() if cosine else centre.sin()
        table[0, channel] = wave[:, None] if half else wave[None, :]
    return table


@both
@pytest.mark.parametrize("name", SCALES)
def test_tokens(ops: ModuleType, name: str) -> None:
    case = Case(name)
    pixels = photos([case.size] * 3)
    for seed in range(3):
        choice = case.choice(pixels, seed)
        x = case.rows(ops, pixels, choice)
        every = torch.cat([case.every_token(pixels.image(i)) for i in range(3)])
        where = choice.packed_rows(PREFIX).long()
        torch.testing.assert_close(x[where], every[choice.rows.long()], atol=2e-5, rtol=2e-5)
        untouched = torch.ones(len(x), dtype=torch.bool)
        untouched[where] = False
        assert int(untouched.sum()) == 3 * PREFIX and bool((x[untouched] == 7.5).all())
        begins = choice.cu_seqlens(PREFIX)[:-1].long()
        assert bool(untouched[begins].all() and untouched[begins + PREFIX - 1].all())


@pytest.mark.parametrize("name", ["shared", "three", "separate", "regions", "conv"])
def test_all_fine_has_the_bits_of_one_scale(name: str) -> None:
    case, plain = Case(name), Case("one")
    pixels = photos([case.size, (16, 40), (17, 33)])
    nothing = ScaleLayout.of(pixels.sizes, PATCH, case.ratios)
    stops = torch.zeros(nothing.coarse, dtype=torch.bool)
    mixed = case.rows(native, pixels, choose(native, nothing, stops))
    fields = {name: getattr(case.spec, name) for name in VisionSpec.__slots__}
    plain.layer = ScaleEmbed.of(
        VisionSpec(**{**fields, "scales": None}),
        lambda name: Linear(Weight.pack(case.matrices[name][0]), case.matrices[name][1]),
        case.positions,
    )
    # The same grids: images whose size is no multiple are padded to whole coarsest patches.
    unit = PATCH * case.ratios[-1]
    padded = [
        F.pad(image, (0, -image.shape[2] % unit, 0, -image.shape[1] % unit))
        for image in map(pixels.image, range(pixels.count))
    ]
    whole = Pixels.of_list(padded)
    layout = ScaleLayout.of(whole.sizes, PATCH, ())
    one = plain.rows(native, whole, choose(native, layout, stops[:0]))
    assert torch.equal(mixed, one)


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_does_not_depend_on_the_others(name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    pixels = photos([case.size, (29, 61), case.size, (8, 8)])
    choice = case.choice(pixels, 3)
    x = case.rows(native, pixels, choice)
    ends = choice.cu_seqlens(PREFIX).tolist()
    first = choice.layout.first_coarse.tolist()
    for i in range(pixels.count):
        one = Pixels.of_list([pixels.image(i)])
        layout = ScaleLayout.of(one.sizes, PATCH, case.ratios)
        alone = choose(native, layout, choice.stops[first[i] : first[i + 1]])
        assert torch.equal(case.rows(native, one, alone), x[ends[i] : ends[i + 1]])


@pytest.mark.parametrize("name", ["shared", "separate", "regions", "conv"])
def test_bfloat16_is_near(name: str) -> None:
    case, rounded = Case(name), Case(name, torch.bfloat16)
    pixels = photos([case.size] * 2)
    choice = case.choice(pixels, 1)
    found = rounded.rows(native, pixels, choice).float()
    torch.testing.assert_close(found, case.rows(native, pixels, choice), atol=0.15, rtol=0.02)


@both
@pytest.mark.parametrize("name", ["shared", "conv"])
def test_other_sizes_have_resized_positions(ops: ModuleType, name: str) -> None:
    """The fine table is brought to the image's grid first, then made coarse."""
    case = Case(name)
    size = (case.size[0] * 2, case.size[1])
    pixels = photos([size])
    choice = case.choice(pixels, 2)
    x = case.rows(ops, pixels, choice)[PREFIX:]
    grid, to_grid = case.spec.grid, (size[0] // PATCH, size[1] // PATCH)
    table = case.positions.T.view(1, D, *grid)
    other = F.interpolate(table, to_grid, mode="bicubic", antialias=True)
    case.size = size
    case.positions = other.flatten(2)[0].T
    case.spec = VisionSpec(**{
        **{name: getattr(case.spec, name) for name in VisionSpec.__slots__}, "image_size": size,
    })  # fmt: skip
    every = case.every_token(pixels.image(0))
    torch.testing.assert_close(x, every[choice.rows.long()], atol=2e-5, rtol=2e-5)


@both
@pytest.mark.parametrize("name", SCALES)
def test_no_images(ops: ModuleType, name: str) -> None:
    case = Case(name)
    pixels = Pixels.of(torch.empty(0, 3, *case.size))
    assert case.rows(ops, pixels, case.choice(pixels, 0)).shape == (0, D)
