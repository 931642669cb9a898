"""layer_norm: native and reference against a float64 norm, and a row against itself elsewhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.layers.norm import Norm
from pyruntime.ops import native, reference
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
EPS = 1e-6


def exact(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The norm in float64, and how large the terms of each of its elements are."""
    wide = x.double()
    centred = wide - wide.mean(1, keepdim=True)
    scale = (centred.square().mean(1, keepdim=True) + EPS).rsqrt()
    # The mean of a row is off by its own rounding, which is that of the largest of its terms.
    size = (wide.abs() + wide.abs().amax(1, keepdim=True)) * scale * weight.abs() + bias.abs()
    return centred * scale * weight + bias, size


@few
@given(seeds, st.integers(0, 40), widths, dtypes, st.sampled_from([None, F32, BF16]))
def test_layer_norm(
    seed: int, rows: int, width: int, dtype: torch.dtype, out_dtype: torch.dtype | None
) -> None:
    x = (3 * normal(seed, rows, width) + normal(seed + 3, rows, 1)).to(dtype)
    weight, bias = normal(seed + 1, width), normal(seed + 2, width)
    expected, size = exact(x, weight, bias)
    for ops in (native, reference):
        out = ops.layer_norm(x, weight, bias, EPS, out_dtype=out_dtype)
        assert_close(out, expected.to(out_dtype or dtype), size)


@few
@given(seeds, st.integers(1, 40), st.integers(0, 20), widths, dtypes)
def test_rows_are_those_of_the_whole(
    seed: int, count: int, kept: int, width: int, dtype: torch.dtype
) -> None:
    """Any rows, in any order and more than once: the same bits as among all rows."""
    x, weight, bias = normal(seed, count, width, dtype=dtype), normal(1, width), normal(2, width)
    rows = torch.randint(count, (kept,), generator=generator(seed)).int()
    for ops in (native, reference):
        whole = ops.layer_norm(x, weight, bias, EPS, out_dtype=F32)
        taken = ops.layer_norm(x, weight, bias, EPS, rows, F32)
        assert taken.shape == (kept, width)
        if ops is native:
            assert_same_bits(taken, whole[rows.long()])
        else:
            assert_close(taken, whole[rows.long()], whole[rows.long()].abs())


@several_threads
@both_dtypes
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    for width in (1, 33, 200, 384):
        x, weight, bias = normal(0, 300, width, dtype=dtype), normal(1, width), normal(2, width)
        together = native.layer_norm(x, weight, bias, EPS)
        for i in range(0, 300, 23):
            alone = native.layer_norm(x[i : i + 1], weight, bias, EPS)
            assert_same_bits(alone[0], together[i])


@few
@given(seeds, st.integers(0, 40), widths, dtypes, dtypes)
def test_gelu_of_the_norm(
    seed: int, rows: int, width: int, dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    """Of the norm before it is rounded."""
    x, weight, bias = normal(seed, rows, width, dtype=dtype), normal(1, width), normal(2, width)
    normed, size = exact(x, weight, bias)
    expected = F.gelu(normed).to(out_dtype)
    for ops in (native, reference):
        assert_close(ops.layer_norm(x, weight, bias, EPS, None, out_dtype, "gelu"), expected, size)
        with pytest.raises(InvalidInput, match="epilogue must be none or gelu, got 'tanh'"):
            ops.layer_norm(x, weight, bias, EPS, epilogue="tanh")


def test_gelu_has_the_same_bits_wherever_a_row_lies() -> None:
    x, weight, bias = normal(0, 90, 70), normal(1, 70), normal(2, 70)
    whole = native.layer_norm(x, weight, bias, EPS, epilogue="gelu")
    rows = torch.tensor([89, 3, 3]).int()
    taken = native.layer_norm(x, weight, bias, EPS, rows, epilogue="gelu")
    assert_same_bits(taken, whole[rows.long()])
    alone = native.layer_norm(x[3:4].clone(), weight, bias, EPS, epilogue="gelu")
    assert_same_bits(alone, whole[3:4])


def test_a_large_mean_does_not_cancel_the_variance() -> None:
    """Mean of squares minus square of the mean would lose all of it."""
    x = 4096 + normal(0, 5, 384)
    ones, zeros = torch.ones(384), torch.zeros(384)
    expected, _ = exact(x, ones, zeros)
    assert float((native.layer_norm(x, ones, zeros, EPS) - expected).abs().max()) < 1e-3


def test_rows_without_spread_and_rows_that_are_not_finite() -> None:
    bias = normal(0, 33)
    flat = native.layer_norm(torch.full((2, 33), 7.0), torch.ones(33), bias, EPS)
    assert_same_bits(flat, bias.expand(2, -1).contiguous())
    x = torch.ones(3, 33)
    x[0, 32], x[1, 0] = torch.nan, torch.inf
    out = native.layer_norm(x, torch.ones(33), bias, EPS)
    assert bool(out[:2].isnan().all()) and bool(out[2].isfinite().all())


@both_dtypes
def test_norm_with_a_bias_is_a_layer_norm(dtype: torch.dtype) -> None:
    x, weight, bias = normal(0, 7, 40, dtype=dtype), normal(1, 40), normal(2, 40)
    out, scores = Norm(weight, EPS, bias)(native, x)
    assert scores is None
    assert_same_bits(out, native.layer_norm(x, weight, bias, EPS))
