"""int8 weights: how they are rounded, and how the native ops multiply them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyruntime.errors import InvalidInput
from pyruntime.ops import Weight, native, reference
from pyruntime.ops.weight import PAIRED
from tests.ops.strategies import (
    BF16,
    EPILOGUES,
    F32,
    assert_close,
    assert_same_bits,
    both_dtypes,
    dtypes,
    few,
    generator,
    normal,
    seeds,
    segments_plan,
    several_threads,
    weight_of,
)

pytestmark = pytest.mark.usefixtures("threads")
sizes = st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 65, 101])


@few
@given(seeds, st.integers(1, 3), sizes, sizes, dtypes, st.sampled_from(["none", "silu_mul"]))
def test_round_trip(
    seed: int, segments: int, n: int, k: int, dtype: torch.dtype, epilogue: str
) -> None:
    weight = weight_of(seed, segments, n, k, dtype, epilogue)
    exact = weight.dense().float()
    quantized = weight.quantize()
    assert quantized.scale is not None and quantized.dtype == torch.int8
    assert quantized.scale.shape == exact.shape[:2] and quantized.interleaved == weight.interleaved
    assert_same_bits(quantized.scale, exact.abs().amax(2) / 127)
    wrong = (quantized.dense() - exact).abs()
    assert bool((wrong <= quantized.scale[:, :, None] * 0.50001).all())
    assert int(quantized.data.min()) >= -127
    if not weight.interleaved:
        ids = torch.tensor([n - 1, 0, n // 2])
        assert_same_bits(quantized.take_rows(ids), quantized.dense()[0][ids])


@pytest.mark.parametrize("interleaved", [False, True])
def test_zero_rows_and_extremes(interleaved: bool) -> None:
    rows = torch.tensor([[0.0, 0.0, 0.0], [-2.0, 2.0, 1.0], [1e30, -1e30, 0.0], [1e-42, 0.0, 0.0]])
    weight = Weight.pack_gate_up(rows, rows.flip(0)) if interleaved else Weight.pack(rows)
    quantized = weight.quantize()
    assert quantized.scale is not None
    assert quantized.scale[0, [0, 3]].tolist() == [0.0, 0.0]
    dense = quantized.dense()[0]
    assert dense[0].tolist() == dense[3].tolist() == [0.0] * 3
    assert dense[1].tolist() == pytest.approx([-2.0, 2.0, 64 * 2 / 127])  # 63.5 to even
    assert dense[2].tolist() == pytest.approx([1e30, -1e30, 0.0])
    if interleaved:
        assert_same_bits(dense[4:], dense[:4].flip(0))


def test_what_cannot_be_quantized() -> None:
    for value in (torch.nan, torch.inf):
        with pytest.raises(InvalidInput, match="not finite"):
            Weight.pack(torch.tensor([[1.0, value]])).quantize()
    weight = Weight.pack(torch.ones(3, 4)).quantize()
    with pytest.raises(InvalidInput, match="int8 already"):
        weight.quantize()
    bare = Weight(weight.data, 3, 4)
    with pytest.raises(InvalidInput, match="int8 weights need a scale, got None"):
        native.segment_matmul(torch.ones(1, 4), bare)
    wrong = Weight(weight.data, 3, 4, scale=torch.ones(1, 4))
    with pytest.raises(InvalidInput, match=r"scale must be \[1, 3\], got .*\[1, 4\]"):
        native.segment_matmul(torch.ones(1, 4), wrong)


def test_dense_and_panels_quantize_alike() -> None:
    gate, up = normal(0, 2, 20, 33), normal(1, 2, 20, 33)
    dense = Weight(torch.cat([gate, up], 1), 40, 33, "dense", True).quantize()
    panels = Weight.pack_gate_up(gate, up).quantize()
    assert_same_bits(dense.data, panels.data)
    assert dense.scale is not None and panels.scale is not None
    assert_same_bits(dense.scale, panels.scale)


@both_dtypes
@pytest.mark.parametrize("depth", [2, 3, 8, 9])
def test_every_byte_is_multiplied_as_what_it_is(depth: int, dtype: torch.dtype) -> None:
    """One times q is q, in every column, row of a tile and step of K."""
    values = torch.arange(-127, 128, dtype=F32).repeat(2)
    for at in range(depth):
        dense = torch.zeros(len(values), depth)
        dense[:, at - 1] = 127.0  # the scale is 1 whatever the value is
        dense[:, at] = values
        x = torch.zeros(30, depth, dtype=dtype)
        x[:, at] = 1.0
        for rows in (1, 2, 5, 12, 13, 30):
            y = native.segment_matmul(x[:rows], Weight.pack(dense).quantize(), out_dtype=F32)
            assert torch.equal(y, values.expand(rows, -1))


@both_dtypes
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 16), (33, 31), (64, 65), (130, 17)])
def test_segment_matmul(n: int, k: int, epilogue: str, dtype: torch.dtype) -> None:
    for i, rows in enumerate([[1], [13], [50], [3, 0, 1, 25], [1, 2, 3, 4, 5, 6]]):
        plan = segments_plan(rows, i, dropped=i)
        weight = weight_of(i, len(rows), n, k, BF16, epilogue).quantize()
        bias = normal(7, len(rows), weight.out_features) if i % 2 else None
        source = normal(i + 9, plan.num_rows, k, dtype=dtype)
        for out_dtype in (F32, BF16):
            options: dict[str, Any] = {"epilogue": epilogue, "bias": bias, "out_dtype": out_dtype}
            expected = reference.segment_matmul(source, weight, plan, gather=True, **options)
            actual = native.segment_matmul(source, weight, plan, gather=True, **options)
            size = source.abs().double().amax() * weight.dense().abs().amax() * k + 3
            assert_close(actual, expected, float(size**2 if epilogue in PAIRED else size))
            packed = native.gather(source, plan)
            assert_same_bits(native.segment_matmul(packed, weight, plan, **options), actual)
        assert (
            native.segment_matmul(source, weight, plan, gather=True, epilogue=epilogue).dtype
            == dtype
        )


@several_threads
@both_dtypes
@pytest.mark.parametrize("epilogue", ["none", "silu_mul"])
def test_rows_do_not_depend_on_their_batch(dtype: torch.dtype, epilogue: str) -> None:
    """In registers or from converted panels: the same bits."""
    for n, k in [(33, 31), (96, 100), (40, 1101)]:
        weight = weight_of(0, 1, n, k, BF16, epilogue).quantize()
        bias = normal(2, weight.out_features)
        options: dict[str, Any] = {"epilogue": epilogue, "bias": bias, "out_dtype": F32}
        x = normal(1, 300, k, dtype=dtype)
        together = native.segment_matmul(x, weight, **options)
        for start in range(0, 27, 3):
            for count in range(1, 27):
                part = native.segment_matmul(
                    x[start : start + count].contiguous(), weight, **options
                )
                assert_same_bits(part, together[start : start + count])
        order = torch.randperm(300, generator=generator(0))
        assert_same_bits(native.segment_matmul(x[order], weight, **options), together[order])
