"""Patches, their embedding and layer_norm on the device, emulated or real: as the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import cuda_emulator
from pyruntime.errors import InvalidInput
from pyruntime.ops import Pixels, Weight, cuda, reference
from tests.ops.device_cases import same_bits
from tests.ops.strategies import BF16, F32, dtypes, normal, seeds

few = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


# ---- patches ----


@dataclass(frozen=True)
class Squares:
    """Images of several sizes and squares of them, some of which lie outside."""

    pixels: Pixels
    places: Tensor
    size: int
    resize: str

    def gather(self, ops: Any, device: str, dtype: torch.dtype | None = None) -> Tensor:
        pixels = replace(self.pixels, data=self.pixels.data.to(device))
        args = (self.places.to(device), self.size, self.resize, dtype)
        out = ops.gather_patches(pixels, *args)
        assert isinstance(out, Tensor)
        return out.cpu()


def squares(
    seed: int, count: int, size: int, channels: int, ratios: list[int], resize: str
) -> Squares:
    generator = torch.Generator().manual_seed(seed)

    def image(i: int) -> Tensor:
        """Some of its pixels are the two zeros."""
        pixels = normal(seed + i, channels, *some(1, 40, 2).tolist())
        return torch.where(pixels.abs() < 0.3, 0.0 * pixels, pixels)

    def some(low: int, high: int, n: int) -> Tensor:
        return torch.randint(low, high, (n,), generator=generator)

    images = [image(i) for i in range(1 + seed % 3)]
    ratio = torch.tensor(ratios)[some(0, len(ratios), count)]
    place = [some(0, len(images), count), some(-20, 45, count), some(-20, 45, count), ratio]
    return Squares(Pixels.of_list(images), torch.stack(place, 1).int(), size, resize)


resizes = st.sampled_from(["area", "bilinear"])


@few
@given(seeds, st.integers(0, 20), st.sampled_from([1, 2, 5, 8, 14, 16]), st.integers(1, 4), resizes,
       dtypes)  # fmt: skip
def test_gather_patches(
    device: str, seed: int, count: int, size: int, channels: int, resize: str, dtype: torch.dtype
) -> None:
    x = squares(seed, count, size, channels, [1, 2, 3, 4], resize)
    same_bits(x.gather(cuda, device, dtype), x.gather(reference, "cpu", dtype))


def test_the_mean_of_a_large_block(device: str) -> None:
    """Ratios without a short reciprocal."""
    for ratio in (7, 11, 49):
        pixels = Pixels.of(normal(ratio, 1, 1, 2 * ratio, ratio))
        places = torch.tensor([[0, 0, 0, ratio], [0, ratio // 2, -3, ratio]], dtype=torch.int32)
        for resize in ("area", "bilinear"):
            x = Squares(pixels, places, 1, resize)
            same_bits(x.gather(cuda, device), x.gather(reference, "cpu"))


def test_whole_patches_of_a_grid(device: str) -> None:
    """What a plain ViT asks for, where 16-byte loads can take it and where they cannot."""
    images = normal(0, 2, 3, 32, 48)
    images[0, 0, 0, :3] = -0.0
    row, column = torch.meshgrid(torch.arange(0, 32, 16), torch.arange(0, 48, 16), indexing="ij")
    grid = torch.stack([row, column, torch.ones_like(row)], 2).flatten(0, 1)
    places = torch.cat([torch.nn.functional.pad(grid, (1, 0), value=i) for i in (0, 1)]).int()
    moved = torch.cat([torch.zeros(1), images.flatten()])
    table = Pixels.of(images).table + torch.tensor([1, 0, 0])
    expected = reference.patches(images, 16, 16)
    for pixels in (Pixels.of(images), Pixels(moved, table, 3)):
        for dtype in (F32, BF16):
            x = Squares(pixels, places, 16, "area")
            out = x.gather(cuda, device, dtype)
            same_bits(out, x.gather(reference, "cpu", dtype))
            same_bits(out, expected.to(dtype))


@pytest.mark.parametrize("width", [48, 46])
def test_coarse_patches_of_a_grid(device: str, width: int) -> None:
    """Blocks of 2 x 2, which 16-byte loads can take or not, inside of an image and across edges."""
    pixels = Pixels.of(normal(0, 2, 2, 40, width).round(decimals=1))
    corners = torch.cartesian_prod(
        torch.arange(2), torch.tensor([0, 1, 24, 27, -2]), torch.tensor([0, 4, 3, 32, 36, -4])
    )
    for ratio in (1, 2, 3):
        places = torch.nn.functional.pad(corners, (0, 1), value=ratio).int()
        for size, resize in ((8, "area"), (16, "bilinear"), (4, "area")):
            x = Squares(pixels, places, size, resize)
            same_bits(x.gather(cuda, device), x.gather(reference, "cpu"))


@dataclass(frozen=True)
class Embedding:
    """The other arguments of embed_patches."""

    weight: Weight
    bias: Tensor | None
    positions: Tensor | None
    position_rows: Tensor | None
    epilogue: str
    out: Tensor
    out_rows: Tensor | None

    def run(self, ops: Any, x: Squares, device: str, kept: int | None = None) -> Tensor:
        given = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in self.__dict__.items()
        }
        given["weight"] = replace(self.weight, data=self.weight.data.to(device))
        given["out"] = self.out.clone().to(device)
        if kept is not None:
            given["kept"] = torch.tensor([kept], dtype=torch.int32, device=device)
        pixels = replace(x.pixels, data=x.pixels.data.to(device))
        out = ops.embed_patches(
            pixels, x.places.to(device), given.pop("weight"), given.pop("bias"),
            size=x.size, resize=x.resize, **given,
        )  # fmt: skip
        assert isinstance(out, Tensor) and out.data_ptr() == given["out"].data_ptr()
        return out.cpu()


def embedding(
    seed: int, x: Squares, width: int, dtype: torch.dtype, out_dtype: torch.dtype, full: bool
) -> Embedding:
    """``full``: bias, positions, GELU, and rows that go to places of their own."""
    count, depth = x.places.shape[0], x.pixels.channels * x.size**2
    generator = torch.Generator().manual_seed(seed)
    matrix = (normal(seed, 1, width, depth) * depth**-0.5).to(dtype)
    weight = Weight(matrix, width, depth, "dense")
    if not full:
        out = normal(seed + 1, count, width, dtype=out_dtype)
        return Embedding(weight, None, None, None, "none", out, None)
    rows = torch.randint(5, (count,), generator=generator).int()
    to = torch.randperm(count + 3, generator=generator)[:count].int()
    out = normal(seed + 1, count + 3, width, dtype=out_dtype)
    vectors = normal(seed + 2, width), normal(seed + 3, 5, width)
    return Embedding(weight, *vectors, rows, "gelu", out, to)


@few
@given(seeds, st.integers(0, 40), st.sampled_from([3, 8, 40]), st.sampled_from([(2, 3), (4, 2)]),
       dtypes, dtypes, st.booleans())  # fmt: skip
def test_embed_patches(
    device: str,
    seed: int,
    count: int,
    width: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    full: bool,
) -> None:
    x = squares(seed, count, shape[0], shape[1], [1, 2, 3], "area")
    e = embedding(seed, x, width, dtype, out_dtype, full)
    out, expected = e.run(cuda, x, device), e.run(reference, x, "cpu")
    slack = 1e-5 if dtype is out_dtype is F32 else 2.0**-6
    torch.testing.assert_close(out.float(), expected.float(), rtol=slack, atol=slack)
    if e.out_rows is not None:
        others = torch.ones(len(out), dtype=torch.bool)
        others[e.out_rows.long()] = False
        same_bits(out[others], e.out[others])


def test_fewer_patches_than_there_is_room_for(device: str) -> None:
    """A plan on the device knows how many; places beyond are not looked at."""
    x = squares(5, 30, 4, 3, [1, 2], "area")
    e = embedding(5, x, 16, BF16, BF16, full=True)
    x.places[20:] = 1 << 30
    for kept in (0, 1, 20):
        first = replace(x, places=x.places[:kept])
        assert e.out_rows is not None and e.position_rows is not None
        few_rows = replace(e, position_rows=e.position_rows[:kept], out_rows=e.out_rows[:kept])
        expected = few_rows.run(reference, first, "cpu")
        out = e.run(cuda, x, device, kept=kept)
        torch.testing.assert_close(out, expected, rtol=2.0**-6, atol=2.0**-6)
        untouched = torch.ones(len(out), dtype=torch.bool)
        untouched[few_rows.out_rows.long()] = False  # type: ignore[union-attr]
        same_bits(out[untouched], e.out[untouched])


def test_wrong_arguments_of_patches_are_named(device: str) -> None:
    x = squares(0, 4, 2, 3, [1], "area")
    e = embedding(0, x, 8, F32, F32, full=True)
    panels = replace(e, weight=Weight.pack(e.weight.data[0]))
    beyond = replace(x.pixels, table=x.pixels.table + torch.tensor([1, 0, 0]))
    none = replace(x, pixels=Pixels(torch.zeros(0), torch.zeros(0, 3, dtype=torch.int64), 3))
    calls: list[tuple[Callable[[], Tensor], str]] = [
        (lambda: replace(x, places=x.places.long()).gather(cuda, device), "places must be"),
        (lambda: none.gather(cuda, device), "4 places of no image"),
        (lambda: replace(x, resize="cubic").gather(cuda, device), "resize one of"),
        (lambda: x.gather(cuda, device, torch.float64), "out_dtype must be one of"),
        (lambda: panels.run(cuda, x, device), "layout dense, got panel"),
        (lambda: replace(e, out_rows=None).run(cuda, x, device), "out must be"),
        (lambda: replace(e, epilogue="silu").run(cuda, x, device), "epilogue must be"),
    ]
    for call, message in calls:
        with pytest.raises(InvalidInput, match=f"_patches: .*{message}"):
            call()
    with pytest.raises(InvalidInput, match=r"table: an image of 3 x .* from element 1 on exceeds"):
        replace(x, pixels=beyond).gather(cuda, device)


def test_zero_patches_launch_nothing(
    monkeypatch: pytest.MonkeyPatch, emulator: cuda_emulator.EmulatedKernels
) -> None:
    cuda_emulator.install(monkeypatch, emulator)
    before = len(emulator.launched)
    x = squares(0, 0, 2, 3, [1], "area")
    for full in (True, False):
        e = embedding(0, x, 8, F32, F32, full)
        same_bits(e.run(cuda, x, "cpu"), e.out)
    ones = torch.ones(8)
    assert cuda.layer_norm(torch.zeros(0, 8), ones, ones, 1e-6).shape == (0, 8)
    assert len(emulator.launched) == before


# ---- layer_norm ----


@few
@given(seeds, st.integers(0, 20), st.sampled_from([1, 3, 8, 33, 264, 384, 515]), dtypes,
       st.sampled_from([None, F32, BF16]), st.sampled_from(["none", "gelu"]))  # fmt: skip
def test_layer_norm(
    device: str,
    seed: int,
    count: int,
    width: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None,
    epilogue: str,
) -> None:
    x = (3 * normal(seed, count, width) + normal(seed + 3, count, 1)).to(dtype)
    weight, bias = normal(seed + 1, width), normal(seed + 2, width)
    rows = torch.randint(max(count, 1), (count and 7,)).int()
    args = (x.to(device), weight.to(device), bias.to(device), 1e-6)
    whole = cuda.layer_norm(*args, out_dtype=out_dtype, epilogue=epilogue)
    expected = reference.layer_norm(x, weight, bias, 1e-6, None, out_dtype, epilogue)
    slack = 1e-5 if expected.dtype is F32 else 2.0**-7
    assert whole.dtype is expected.dtype
    torch.testing.assert_close(whole.cpu(), expected, rtol=slack, atol=slack * (1 + width**0.5 / 4))
    taken = cuda.layer_norm(*args, rows.to(device), out_dtype, epilogue)
    same_bits(taken, whole[rows.long().to(device)])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_norm_has_the_same_bits_at_any_address(device: str, dtype: torch.dtype) -> None:
    """Whether 16-byte loads can take it or not."""
    x, weight, bias = normal(0, 5, 384, dtype=dtype), normal(1, 384), normal(2, 384)
    moved = torch.cat([torch.zeros(1, dtype=dtype), x.flatten()]).to(device)[1:].view(5, 384)
    vectors = weight.to(device), bias.to(device), 1e-6
    same_bits(cuda.layer_norm(moved, *vectors), cuda.layer_norm(x.to(device), *vectors))


def test_norms_of_hard_rows(device: str) -> None:
    """A large mean must not cancel the variance; a row without spread is its bias; NaN stays."""
    ones, zeros, bias = torch.ones(384), torch.zeros(384), normal(0, 384)
    x = 4096 + normal(1, 5, 384)
    out = cuda.layer_norm(x.to(device), ones.to(device), zeros.to(device), 1e-6).cpu()
    expected = torch.nn.functional.layer_norm(x.double(), (384,), eps=1e-6)
    assert float((out - expected).abs().max()) < 1e-3
    x = torch.full((3, 384), 7.0)
    x[1, 3], x[2, 0] = torch.nan, torch.inf
    out = cuda.layer_norm(x.to(device), ones.to(device), bias.to(device), 1e-6).cpu()
    same_bits(out[0], bias)
    assert bool(out[1:].isnan().all())


def test_rows_of_a_plan_beyond_its_count_are_skipped(device: str) -> None:
    x, ones, zeros = normal(0, 4, 8), torch.ones(8), torch.zeros(8)
    vectors = ones.to(device), zeros.to(device), 1e-6
    rows = torch.tensor([2, 0, -1, -1], dtype=torch.int32).to(device)
    out = cuda.layer_norm(x.to(device), *vectors, rows).cpu()
    same_bits(out[:2], cuda.layer_norm(x.to(device), *vectors).cpu()[[2, 0]])


def test_wrong_arguments_of_norms_are_named(device: str) -> None:
    x, ones = torch.zeros(3, 8).to(device), torch.ones(8).to(device)
    for change, message in (
        ({"weight": ones[:4]}, "weight must be"),
        ({"rows": torch.zeros(2).to(device)}, "rows must be"),
        ({"out_dtype": torch.float64}, "out_dtype must be one of"),
        ({"epilogue": "silu"}, "and 'silu'"),
    ):
        given: dict[str, Any] = {"weight": ones, "bias": ones, "eps": 1e-6, **change}
        with pytest.raises(InvalidInput, match=f"layer_norm: .*{message}"):
            cuda.layer_norm(x, **given)
