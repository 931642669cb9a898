"""patches: native and reference against torch.nn.Unfold, and as the convolution they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.ops import Weight, native, reference
from tests.ops.strategies import (
    BF16,
    F32,
    assert_close,
    assert_same_bits,
    both_dtypes,
    dtypes,
    few,
    normal,
    seeds,
    several_threads,
)

pytestmark = pytest.mark.usefixtures("threads")


def unfolded(images: Tensor, size: int, stride: int, padding: int) -> Tensor:
    """What torch makes of images [B, C, H, W], rows in the order of `patches`."""
    columns = F.unfold(images, size, padding=padding, stride=stride)
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


@few
@given(
    seeds,
    st.integers(1, 3),
    st.sampled_from([1, 2, 3, 15, 16, 17, 40]),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([1, 2, 3, 4, 5, 7, 16, 19]),
    st.sampled_from([1, 2, 4, 16]),
    st.integers(0, 8),
    dtypes,
    st.sampled_from([None, F32, BF16]),
)
def test_patches(
    seed: int,
    count: int,
    channels: int,
    height: int,
    width: int,
    size: int,
    stride: int,
    padding: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None,
) -> None:
    size = min(size, min(height, width) + 2 * padding)
    images = normal(seed, count, channels, height, width, dtype=dtype)
    expected = unfolded(images.float(), size, stride, padding).to(out_dtype or dtype)
    tokens = images.permute(0, 2, 3, 1).contiguous()
    for ops in (native, reference):
        rows = ops.patches(images, size, stride, padding, out_dtype=out_dtype)
        assert_same_bits(rows, expected)
        rows = ops.patches(tokens, size, stride, padding, channels_last=True, out_dtype=out_dtype)
        assert_same_bits(rows, expected)


@several_threads
@pytest.mark.parametrize(("size", "stride", "padding"), [(16, 16, 0), (7, 4, 2), (3, 2, 1)])
def test_many_patches(size: int, stride: int, padding: int) -> None:
    """The patches of vision transformers: plain ones, and the three unfolds of T2T."""
    images = normal(0, 2, 3, 224, 224)
    expected = unfolded(images, size, stride, padding)
    assert_same_bits(native.patches(images, size, stride, padding), expected)
    tokens = normal(1, 2, 56, 56, 64)
    expected = unfolded(tokens.permute(0, 3, 1, 2), size, stride, padding)
    assert_same_bits(native.patches(tokens, size, stride, padding, channels_last=True), expected)


@both_dtypes
def test_a_convolution_is_a_matmul_of_patches(dtype: torch.dtype) -> None:
    images = normal(0, 2, 3, 50, 34)
    kernel = normal(1, 24, 3, 8, 8).to(dtype)
    rows = native.patches(images, 8, 5, 2, out_dtype=dtype)
    weight = Weight.pack(kernel.flatten(1))
    out = native.segment_matmul(rows, weight, out_dtype=F32)
    rounded = images.to(dtype).float()
    expected = F.conv2d(rounded, kernel.float(), stride=5, padding=2)
    size = F.conv2d(rounded.abs(), kernel.float().abs(), stride=5, padding=2)
    assert_close(
        out, expected.permute(0, 2, 3, 1).flatten(0, 2), size.permute(0, 2, 3, 1).flatten(0, 2)
    )


def test_no_images_and_no_channels() -> None:
    for ops in (native, reference):
        assert ops.patches(torch.zeros(0, 3, 8, 8), 4, 4).shape == (0, 48)
        assert ops.patches(torch.zeros(2, 0, 8, 8), 4, 4).shape == (8, 0)


@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(0, 1, 0), (1, 0, 0), (1, 1, -1), (9, 1, 0), (11, 1, 1)]
)
def test_geometry_that_is_none_is_refused(size: int, stride: int, padding: int) -> None:
    for ops in (native, reference):
        with pytest.raises(InvalidInput, match=f"got size={size}, stride={stride}.* for 8 x 12"):
            ops.patches(torch.zeros(1, 3, 8, 12), size, stride, padding)
