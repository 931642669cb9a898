"""segment_matmul and the layouts of its weights: native against the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.ops import Weight, native, reference
from pyruntime.ops.weight import PAIRED
from pyruntime.plan import Plan
from tests.ops.strategies import (
    BF16,
    EPILOGUES,
    F32,
    assert_close,
    assert_same_bits,
    both_dtypes,
    normal,
    segments_plan,
    several_threads,
    weight_of,
)

pytestmark = pytest.mark.usefixtures("threads")
SHAPES = [(1, 1), (1, 7), (5, 16), (33, 31), (64, 65), (96, 100), (130, 17), (31, 200)]  # N, K
SIZES = [[0], [1], [12], [13], [50], [3, 0, 1, 25], [0, 0, 5], [1, 2, 3, 4, 5, 6]]


def magnitude(
    x: Tensor, weight: Weight, plan: Plan | None, bias: Tensor | None, epi: str
) -> Tensor:
    positive = Weight(weight.dense().abs(), weight.out_features, weight.in_features, "dense")
    size = reference.segment_matmul(
        x.abs(), positive, plan, bias=None if bias is None else bias.abs(), out_dtype=F32
    ).double()
    if epi in PAIRED:  # an error of one factor is multiplied by the other
        left, right = size.chunk(2, dim=1)
        right = right + 1 if epi == "swiglu_oai" else right
        return 2 * left * right + left + right
    return size


@both_dtypes
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_segment_matmul(n: int, k: int, epilogue: str, dtype: torch.dtype) -> None:
    for i, sizes in enumerate(SIZES):
        plan = segments_plan(sizes, i, dropped=i)
        weight = weight_of(i, len(sizes), n, k, dtype, epilogue)
        bias = normal(7, len(sizes), weight.out_features) if i % 2 else None
        source = normal(i + 9, plan.num_rows, k, dtype=dtype)
        packed = reference.gather(source, plan)
        for out_dtype in (F32, BF16):
            options: dict[str, Any] = {
                "epilogue": epilogue, "bias": bias, "out_dtype": out_dtype,
            }  # fmt: skip
            expected = reference.segment_matmul(packed, weight, plan, **options)
            actual = native.segment_matmul(packed, weight, plan, **options)
            assert actual.shape == (plan.kept, n)
            assert_close(actual, expected, magnitude(packed, weight, plan, bias, epilogue))
            gathered = native.segment_matmul(source, weight, plan, gather=True, **options)
            assert_same_bits(gathered, actual)
            if len(sizes) == 1:
                assert_same_bits(native.segment_matmul(packed, weight, **options), actual)
        assert native.segment_matmul(packed, weight, plan, epilogue=epilogue).dtype == dtype
        for ops in (native, reference):
            out = torch.full_like(actual, torch.nan)
            assert ops.segment_matmul(packed, weight, plan, **options, out=out) is out
            assert_close(out, expected, magnitude(packed, weight, plan, bias, epilogue))


@several_threads
@both_dtypes
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_accumulate_adds_before_the_only_rounding(epilogue: str, dtype: torch.dtype) -> None:
    """Bit for bit the float32 result plus what was there, rounded once."""
    for i, sizes in enumerate(SIZES):
        plan = segments_plan(sizes, i, dropped=i)
        for n, k in [(16, 5), (31, 33), (100, 96)]:
            weight = weight_of(i, len(sizes), n, k, dtype, epilogue)
            bias = normal(7, len(sizes), weight.out_features) if i % 2 else None
            source = normal(i + 9, plan.num_rows, k, dtype=dtype)
            options: dict[str, Any] = {"gather": True, "epilogue": epilogue, "bias": bias}
            for out_dtype in (F32, BF16):
                before = 100 * normal(i + 8, plan.kept, n, dtype=out_dtype)
                for ops in (native, reference):
                    y = ops.segment_matmul(source, weight, plan, **options, out_dtype=F32)
                    out = before.clone()
                    back = ops.segment_matmul(
                        source, weight, plan, **options, out=out, accumulate=True
                    )
                    assert back is out
                    assert_same_bits(out, (before.float() + y).to(out_dtype))


def test_accumulate_to_nothing_is_refused() -> None:
    for ops in (native, reference):
        with pytest.raises(InvalidInput, match="accumulate needs out, got None"):
            ops.segment_matmul(torch.zeros(2, 3), Weight.pack(torch.zeros(4, 3)), accumulate=True)
        with pytest.raises(InvalidInput, match=r"out must be .*\[2, 4\], got"):
            ops.segment_matmul(
                torch.zeros(2, 3), Weight.pack(torch.zeros(4, 3)), out=torch.zeros(2, 1),
                accumulate=True,
            )  # fmt: skip


def test_gelu_is_as_exact_as_float32_allows() -> None:
    one = Weight.pack(torch.ones(1, 1))
    x = torch.cat([torch.linspace(-12, 12, 100_001), torch.logspace(-30, 30, 1001)])
    x = torch.cat([x, -x, torch.tensor([torch.inf, torch.nan])])
    y = native.segment_matmul(x[:, None], one, epilogue="gelu")[:, 0]
    wide = x.double()
    exact = 0.5 * wide * torch.special.erfc(-wide * 0.5**0.5)
    off = (y - exact).abs()[:-2] - 1.2e-7 * exact.abs()[:-2]
    assert float(off.max()) < 2.5e-7
    assert bool((y[x <= -5.6] == 0).all())
    assert y[-2] == torch.inf and bool(y[-1].isnan())


@several_threads
@both_dtypes
@pytest.mark.parametrize("epilogue", ["none", "silu_mul"])
def test_segment_matmul_in_many_blocks(dtype: torch.dtype, epilogue: str) -> None:
    """More rows than share one pass over a panel, K beyond the cache's share, skewed segments."""
    plan = segments_plan([500, 0, 3, 130], 0)
    weight = weight_of(0, 4, 70, 1101, dtype, epilogue)
    x = normal(1, plan.kept, 1101, dtype=dtype)
    options = {"epilogue": epilogue, "out_dtype": F32}
    expected = reference.segment_matmul(x, weight, plan, **options)  # type: ignore[arg-type]
    actual = native.segment_matmul(x, weight, plan, **options)  # type: ignore[arg-type]
    assert_close(actual, expected, magnitude(x, weight, plan, None, epilogue))


def test_swiglu_oai_cuts_gate_and_up() -> None:
    """By hand: gate is cut from above only, up from both sides; a NaN stays one."""
    gate = torch.tensor([[9.0], [-9.0], [0.5], [torch.nan], [1.0]])
    up = torch.tensor([[-9.0], [9.0], [0.25], [1.0], [torch.nan]])
    pair = Weight.pack_gate_up(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    x = torch.cat([gate, up], 1)
    for ops in (reference, native):
        y = ops.segment_matmul(x, pair, epilogue="swiglu_oai", alpha=2.0, limit=3.0)[:, 0]
        expected = [-2 * 3 / (1 + math.exp(-6)), 4 * -9 / (1 + math.exp(18)),
                    1.25 * 0.5 / (1 + math.exp(-1))]  # fmt: skip
        assert y[:3].tolist() == pytest.approx(expected, rel=1e-5)
        assert bool(y[3:].isnan().all())


@both_dtypes
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("segments", [1, 3])
def test_weight_layout_round_trip(dtype: torch.dtype, interleaved: bool, segments: int) -> None:
    for n, k in SHAPES:
        gate, up = normal(0, segments, n, k, dtype=dtype), normal(1, segments, n, k, dtype=dtype)
        weight = Weight.pack_gate_up(gate, up) if interleaved else Weight.pack(gate)
        assert_same_bits(weight.dense(), torch.cat([gate, up], 1) if interleaved else gate)
        if not interleaved:
            ids = torch.tensor([n - 1, 0, n // 2])
            assert_same_bits(weight.take_rows(ids), gate[0][ids])
