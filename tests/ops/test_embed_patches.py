"""gather_patches and embed_patches: native against the reference, and both against torch's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pyruntime.ops.library  # noqa: F401 - registers torch.ops.pyruntime
from pyruntime.errors import InvalidInput
from pyruntime.ops import Pixels, Weight, native, reference
from tests.ops.strategies import (
    BF16,
    F32,
    assert_close,
    assert_same_bits,
    both_dtypes,
    dtypes,
    few,
    generator,
    normal,
    seeds,
    several_threads,
    widths,
)

pytestmark = pytest.mark.usefixtures("threads")
lib = torch.ops.pyruntime
SIZES = [1, 2, 3, 4, 5, 7, 8, 14, 15, 16, 17, 31, 32, 33]


@dataclass(frozen=True)
class Case:
    """Images of any sizes and places in, across and beyond their edges."""

    pixels: Pixels
    places: Tensor
    size: int
    resize: str


@st.composite
def cases(draw: st.DrawFn) -> Case:
    seed, channels = draw(seeds), draw(st.sampled_from([1, 2, 3]))
    sides = st.integers(1, 70)
    sizes = draw(st.lists(st.tuples(sides, sides), min_size=1, max_size=3))
    images = [normal(seed + i, channels, *size) for i, size in enumerate(sizes)]
    corner, ratios = st.integers(-40, 80), st.sampled_from([1, 1, 1, 2, 2, 3, 4, 5, 8])
    place = st.tuples(st.integers(0, len(sizes) - 1), corner, corner, ratios)
    drawn = draw(st.lists(place, max_size=30))
    places = torch.tensor(drawn, dtype=torch.int32).view(-1, 4)
    resize = draw(st.sampled_from(["area", "bilinear"]))
    return Case(Pixels.of_list(images), places, draw(st.sampled_from(SIZES)), resize)


def grid(count: int, side: int, step: int, ratio: int = 1) -> Tensor:
    """Places that tile ``count`` square images of ``side`` pixels in squares of ``step``."""
    corners = torch.arange(0, side, step)
    return torch.cartesian_prod(
        torch.arange(count), corners, corners, torch.tensor([ratio])
    ).int()  # fmt: skip


def mixed(seed: int, count: int, side: int, size: int) -> Tensor:
    """Half of the squares of 2 * size as they are, half as their four quarters; all shuffled."""
    coarse, fine = grid(count, side, 2 * size, 2), grid(count, side, size)
    stays = torch.rand(len(coarse), generator=generator(seed)) < 0.5
    across = side // size
    parent = (fine[:, 0] * across // 2 + fine[:, 1] // (2 * size)) * (across // 2)
    places = torch.cat([coarse[stays], fine[~stays[(parent + fine[:, 2] // (2 * size)).long()]]])
    return places[torch.randperm(len(places), generator=generator(seed))]


def magnitude(
    case: Case, weight: Weight, bias: Tensor | None, position: Tensor | None = None
) -> Tensor:
    """How large the terms of every sum are."""
    patches = reference.gather_patches(case.pixels, case.places, case.size, case.resize)
    total = patches.abs() @ weight.dense()[0].float().abs().T
    total = total if bias is None else total + bias.abs()
    return total if position is None else total + position.abs()


@few
@given(cases(), st.sampled_from([None, F32, BF16]))
def test_gather_patches(case: Case, out_dtype: torch.dtype | None) -> None:
    arguments = case.pixels, case.places, case.size, case.resize, out_dtype
    assert_same_bits(native.gather_patches(*arguments), reference.gather_patches(*arguments))


@few
@given(cases(), seeds, widths, dtypes, dtypes, st.integers(0, 31))
def test_embed_patches(
    case: Case, seed: int, width: int, dtype: torch.dtype, out_dtype: torch.dtype, flags: int
) -> None:
    """With and without bias, positions, epilogue and rows; other rows of out keep their bits."""
    count, columns = len(case.places), case.pixels.channels * case.size**2
    weight = Weight.pack((normal(seed, width, columns) / columns**0.5).to(dtype))
    bias = normal(seed + 1, width) if flags & 1 else None
    table = normal(seed + 2, 5, width) if flags & 2 else None
    rows = torch.randint(5, (count,), generator=generator(seed)).int() if flags & 2 else None
    epilogue = "gelu" if flags & 4 else "none"
    spare = 9 if flags & 8 else 0
    out_rows = None
    if spare:
        out_rows = torch.randperm(count + spare, generator=generator(seed))[:count].int()
    before = normal(seed + 3, count + spare, width, dtype=out_dtype)
    results = []
    for ops in (native, reference):
        out = before.clone()
        returned = ops.embed_patches(
            case.pixels, case.places, weight, bias, size=case.size, resize=case.resize,
            positions=table, position_rows=rows, epilogue=epilogue, out=out, out_rows=out_rows,
        )  # fmt: skip
        assert returned is out
        results.append(out)
    written = slice(None) if out_rows is None else out_rows.long()
    position = None if table is None or rows is None else table[rows.long()]
    size = torch.zeros(before.shape)
    size[written] = magnitude(case, weight, bias, position)
    assert_close(*results, size)
    if out_rows is not None:
        others = torch.ones(len(before), dtype=torch.bool)
        others[out_rows.long()] = False
        assert_same_bits(results[0][others], before[others])


@several_threads
@both_dtypes
def test_a_token_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    pixels = Pixels.of(normal(0, 3, 3, 96, 96))
    places = mixed(1, 3, 96, 8)
    weight, bias = Weight.pack(normal(2, 70, 192, dtype=dtype)), normal(3, 70)
    table = normal(4, 144, 70)
    rows = torch.randint(144, (len(places),), generator=generator(5)).int()

    def embed(at: Tensor) -> Tensor:
        return native.embed_patches(
            pixels, places[at].contiguous(), weight, bias, size=8, positions=table,
            position_rows=rows[at].contiguous(), out=torch.empty(len(at), 70),
        )  # fmt: skip

    whole = embed(torch.arange(len(places)))
    assert_same_bits(embed(torch.arange(len(places)).flip(0)), whole.flip(0))
    for i in range(0, len(places), 7):
        assert_same_bits(embed(torch.tensor([i])), whole[i : i + 1])
    for count in (2, 11, 12, 13, 25, 60):
        assert_same_bits(embed(torch.arange(count)), whole[:count])


@several_threads
@both_dtypes
@pytest.mark.parametrize(("size", "width"), [(16, 384), (32, 64), (14, 96)])
def test_the_sizes_of_models(size: int, width: int, dtype: torch.dtype) -> None:
    """More rows than one block of them, cut for several threads."""
    side = 224
    images = normal(0, 2, 3, side, side)
    pixels, places = Pixels.of(images), grid(2, side, size)
    weight, bias = Weight.pack(normal(1, width, 3 * size * size, dtype=dtype)), normal(2, width)
    out = torch.empty(len(places), width)
    native.embed_patches(pixels, places, weight, bias, size=size, out=out)
    patches = native.patches(images, size, size, out_dtype=dtype)
    assert_same_bits(native.gather_patches(pixels, places, size, out_dtype=dtype), patches)
    assert_same_bits(out, native.segment_matmul(patches, weight, bias=bias, out_dtype=F32))


@both_dtypes
def test_a_result_beyond_the_caches(dtype: torch.dtype) -> None:
    """Written in another way than small ones."""
    images = normal(0, 32, 3, 160, 160)
    places = mixed(1, 32, 160, 16)[:4001]
    places = torch.cat([places, torch.tensor([[3, -8, 150, 1], [31, 300, 0, 2]]).int()] * 2)
    pixels = Pixels.of(images)
    out = native.gather_patches(pixels, places, 16, "area", dtype)
    assert_same_bits(out, reference.gather_patches(pixels, places, 16, "area", dtype))


@pytest.mark.parametrize("ratio", [2, 3, 4, 5, 6, 8])
def test_resizes_are_those_of_torch(ratio: int) -> None:
    images = normal(0, 2, 3, 8 * ratio, 8 * ratio)
    pixels, places = Pixels.of(images), grid(2, 8 * ratio, 8 * ratio, ratio)
    bilinear = F.interpolate(images, size=(8, 8), mode="bilinear", align_corners=False)
    for ops in (native, reference):
        means = ops.gather_patches(pixels, places, 8, "area")
        middle = ops.gather_patches(pixels, places, 8, "bilinear")
        assert_close(means, F.avg_pool2d(images, ratio).flatten(1), 1.0)
        assert_close(middle, bilinear.flatten(1), 1.0)
        if ratio == 2:
            assert_same_bits(means, middle)


@both_dtypes
def test_a_shrunk_square_is_a_folded_kernel(dtype: torch.dtype) -> None:
    """Mean and small kernel are one large kernel, W upsampled / ratio^2."""
    images = normal(0, 2, 3, 64, 64)
    for ratio in (2, 4):
        kernel = (normal(1, 24, 3, 8, 8) / 14).to(dtype)
        folded = kernel.float().repeat_interleave(ratio, 2).repeat_interleave(ratio, 3) / ratio**2
        places = grid(2, 64, 8 * ratio, ratio)
        out = torch.empty(len(places), 24)
        weight = Weight.pack(kernel.flatten(1))
        native.embed_patches(Pixels.of(images), places, weight, None, size=8, out=out)
        expected = F.conv2d(images, folded, stride=8 * ratio).permute(0, 2, 3, 1).flatten(0, 2)
        allowed = 4e-6 if dtype == F32 else 4e-2
        assert float((out - expected).abs().max()) <= allowed


def test_outside_of_the_image_is_zero() -> None:
    images = 1 + normal(0, 1, 2, 20, 24).abs()
    pixels = Pixels.of(images)
    far = 2**31 - 1
    corners = [(-32, 0), (0, 24), (20, 0), (0, -32), (far, 0), (-far - 1, far), (500, 500)]
    places = torch.tensor([[0, *corner, ratio] for corner in corners for ratio in (1, 2)]).int()
    for ops in (native, reference):
        assert not ops.gather_patches(pixels, places, 16).any()
        across = torch.tensor([[0, 12, -3, 1], [0, -5, 20, 1]]).int()
        rows = ops.gather_patches(pixels, across, 16).view(2, 2, 16, 16)
        padded = F.pad(images, (16, 16, 16, 16))[0]
        assert_same_bits(rows[0], padded[:, 28:44, 13:29].contiguous())
        assert_same_bits(rows[1], padded[:, 11:27, 36:52].contiguous())


def test_minus_zero_and_what_is_not_finite_survive() -> None:
    images = normal(0, 1, 1, 8, 8)
    images[0, 0, 0, :4] = torch.tensor([-0.0, torch.inf, torch.nan, -torch.inf])
    places = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 2], [0, 4, 4, 1]]).int()
    expected = reference.gather_patches(Pixels.of(images), places, 4)
    assert bool(expected[0, 0] == 0) and bool(expected[0, 0].signbit())
    assert_same_bits(native.gather_patches(Pixels.of(images), places, 4), expected)


def test_nothing_to_do() -> None:
    pixels, none = Pixels.of(torch.zeros(2, 3, 8, 8)), torch.zeros(0, 4, dtype=torch.int32)
    weight, rows = Weight.pack(torch.ones(5, 48)), torch.zeros(0, dtype=torch.int32)
    for ops in (native, reference):
        assert ops.gather_patches(pixels, none, 4).shape == (0, 48)
        assert ops.gather_patches(Pixels.of(torch.zeros(0, 3, 8, 8)), none, 4).shape == (0, 48)
        out = torch.ones(3, 5)
        ops.embed_patches(pixels, none, weight, None, size=4, out=out, out_rows=rows)
        assert bool((out == 1).all())


def call(**changed: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments that fit each other, some of them changed."""
    values = {
        "pixels": Pixels.of(torch.zeros(2, 3, 8, 8)),
        "places": torch.tensor([[0, 0, 0, 1], [1, 0, 0, 2]]).int(),
        "weight": Weight.pack(torch.ones(5, 48)),
        "bias": torch.zeros(5),
        "size": 4,
        "resize": "area",
        "positions": torch.zeros(6, 5),
        "position_rows": torch.tensor([5, 0]).int(),
        "epilogue": "none",
        "out": torch.zeros(7, 5),
        "out_rows": torch.tensor([6, 0]).int(),
    } | changed
    names = ("pixels", "places", "weight", "bias")
    return tuple(values.pop(name) for name in names), values


def place(*values: int) -> Tensor:
    return torch.tensor([[0, 0, 0, 1], values]).int()


DATA = torch.zeros(384)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"places": place(2, 0, 0, 1)}, r"image must lie in \[0, 2\), got 2"),
        ({"places": place(-1, 0, 0, 1)}, r"image must lie in \[0, 2\), got -1"),
        ({"places": place(0, 0, 0, 0)}, r"ratio must lie in \[1, 257\), got 0"),
        ({"places": place(0, 0, 0, 257)}, r"ratio must lie in \[1, 257\), got 257"),
        ({"places": place(0, 0, 0, 1).long()}, "places must be contiguous int32"),
        ({"places": place(0, 0, 0, 1)[:, :3].contiguous()}, r"places must be \[R, 4\]"),
        ({"places": place(0, 0, 0, 1).T.contiguous().T}, "places must be contiguous"),
        ({"pixels": Pixels(DATA, torch.tensor([[1, 8, 16]]), 3)}, "exceeds the 384"),
        ({"pixels": Pixels(DATA, torch.tensor([[-1, 8, 8]]), 3)}, "exceeds the 384"),
        ({"pixels": Pixels(DATA, torch.tensor([[0, 2**40, 2**20]]), 3)}, "exceeds the 384"),
        ({"pixels": Pixels(DATA, torch.tensor([[0, 8]]), 3)}, r"pixels.table must be \[B, 3\]"),
        ({"pixels": Pixels(DATA, torch.zeros(2, 3), 3)}, "pixels.table must be contiguous int64"),
        ({"pixels": Pixels(DATA.double(), torch.zeros(2, 3).long(), 3)}, "pixels.data must be"),
        ({"size": 0}, "size must be at least 1"),
        ({"resize": "nearest"}, "resize one of .* got .*'nearest'"),
        ({"weight": Weight.pack(torch.ones(5, 47))}, r"one float32 or bfloat16 matrix \[D, 48\]"),
        ({"weight": Weight.pack(torch.ones(2, 5, 48))}, "one float32 or bfloat16 matrix"),
        ({"weight": Weight.pack(torch.ones(5, 48)).quantize()}, "one float32 or bfloat16 matrix"),
        ({"bias": torch.zeros(4)}, r"bias must be contiguous float32 \[5\]"),
        ({"bias": torch.zeros(5).bfloat16()}, r"bias must be contiguous float32 \[5\]"),
        ({"positions": None}, "positions and position_rows need each other"),
        ({"position_rows": None}, "positions and position_rows need each other"),
        ({"positions": torch.zeros(6, 4)}, r"positions must be contiguous float32 \[M, 5\]"),
        ({"position_rows": place(6, 0, 0, 0)[:, 0].contiguous()}, r"position_rows .*\), got 6"),
        ({"position_rows": torch.tensor([0, -1]).int()}, r"position_rows .*\), got -1"),
        ({"position_rows": torch.zeros(3).int()}, r"position_rows must be contiguous int32 \[2\]"),
        ({"out_rows": torch.tensor([7, 0]).int()}, r"out_rows must lie in \[0, 7\), got 7"),
        ({"out_rows": torch.tensor([0, -3]).int()}, r"out_rows must lie in \[0, 7\), got -3"),
        ({"out_rows": torch.tensor([0, 1])}, r"out_rows must be contiguous int32 \[2\]"),
        ({"out_rows": None}, r"out must be .* \[2, 5\]"),
        ({"out": torch.zeros(7, 4)}, r"out must be .* \[T, 5\]"),
        ({"out": torch.zeros(7, 5).half()}, "out must be .* float32 or bfloat16"),
        ({"out": torch.zeros(5, 7).T}, "out must be contiguous"),
        ({"epilogue": "silu"}, "epilogue must be none or gelu, got 'silu'"),
    ],
)
def test_what_is_refused(changed: dict[str, Any], message: str) -> None:
    for ops in (native, reference):
        arguments, options = call()
        ops.embed_patches(*arguments, **options)
        arguments, options = call(**changed)
        with pytest.raises(InvalidInput, match=message):
            ops.embed_patches(*arguments, **options)


def test_pixels_of_one_size_are_a_view() -> None:
    images = normal(0, 3, 2, 5, 7)
    pixels = Pixels.of(images)
    assert pixels.count == 3 and pixels.sizes == ((5, 7),) * 3
    assert pixels.data.data_ptr() == images.data_ptr()
    assert_same_bits(pixels.image(2), images[2])
    listed = Pixels.of_list(list(images.flip(0)))
    assert_same_bits(listed.image(0), images[2])
    for wrong in (images[0], images.double()):
        with pytest.raises(InvalidInput, match=r"must be float32 \[B, C, H, W\]"):
            Pixels.of(wrong)
    with pytest.raises(InvalidInput, match="image 1 must be"):
        Pixels.of_list([images[0], images[1, :1]])
    with pytest.raises(InvalidInput, match="at least one"):
        Pixels.of_list([])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_library(dtype: torch.dtype) -> None:
    pixels, places = Pixels.of(normal(0, 2, 3, 16, 16)), mixed(1, 2, 16, 4)
    count = len(places)
    given = pixels.data, pixels.table, pixels.channels, places, 4
    torch.library.opcheck(lib.gather_patches.default, given)
    torch.library.opcheck(lib.gather_patches.default, (*given, "bilinear", BF16))
    weight, bias = Weight.pack(normal(1, 40, 48, dtype=dtype)), normal(2, 40)
    rows = torch.randint(9, (count,), generator=generator(3)).int()
    table = {"positions": normal(4, 9, 40), "position_rows": rows}
    to = torch.arange(count).flip(0).int()
    base = normal(5, count + 2, 40)
    kept = base.clone()
    torch.library.opcheck(lib.embed_patches.default, (*given, weight.data, 40))
    torch.library.opcheck(
        lib.embed_patches.default, (*given, weight.data, 40, bias, "area"),
        table | {"epilogue": "gelu", "base": base, "out_rows": to},
    )  # fmt: skip
    out = lib.embed_patches(*given, weight.data, 40, bias, **table, base=base, out_rows=to)
    assert_same_bits(base, kept)
    expected = native.embed_patches(
        pixels, places, weight, bias, size=4, **table, out=kept, out_rows=to
    )
    assert_same_bits(out, expected)
