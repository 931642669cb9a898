"""The CUDA ops against the reference: on the emulated device everywhere, on a GPU where one is.

Plans, gather, compact and combine must agree bit for bit, segment_matmul within its rounding.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import cuda_emulator
from pyruntime.errors import InvalidInput
from pyruntime.ops import TopK, Weight, cuda, reference
from pyruntime.ops.cuda import matmul as cuda_matmul
from pyruntime.ops.cuda import plan as cuda_plan
from pyruntime.ops.weight import PAIRED
from pyruntime.plan import Plan
from tests.ops.device_cases import same_bits, same_plan, scores_with_ties

few = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


# ---- planners ----


@few
@given(seeds, st.integers(0, 700), st.booleans())
def test_plan_threshold(device: str, seed: int, count: int, each: bool) -> None:
    scores = scores_with_ties(seed, count)
    tau = scores_with_ties(seed + 1, count) if each else torch.tensor(0.0)
    for weighted in (False, True):
        actual = cuda.plan_threshold(scores.to(device), tau.to(device), weighted)
        same_plan(actual, reference.plan_threshold(scores, tau, weighted))


@pytest.mark.parametrize("count", [8192, 8193, 20_000])
def test_plans_around_the_one_launch_bound(device: str, count: int) -> None:
    scores = random(1, count)
    tau = torch.tensor(0.3)
    same_plan(
        cuda.plan_threshold(scores.to(device), tau.to(device)),
        reference.plan_threshold(scores, tau),
    )
    labels = torch.randint(-1, 300, (count,), generator=torch.Generator().manual_seed(2)).int()
    same_plan(cuda.plan_partition(labels.to(device), 300), reference.plan_partition(labels, 300))


@few
@given(seeds, st.integers(1, 50), st.floats(0, 1))
def test_quantile(device: str, seed: int, count: int, q: float) -> None:
    scores = random(seed, count)
    same_bits(cuda.quantile(scores.to(device), q), reference.quantile(scores, q))


# ---- movement ----


def some_plan(seed: int, count: int, kept: float, device: str) -> tuple[Plan, Plan]:
    """The same one-segment plan on the device and as the reference has it."""
    scores = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    tau = torch.tensor(1.0 - kept)
    on_device = cuda.plan_threshold(scores.to(device), tau.to(device))
    return on_device, reference.plan_threshold(scores, tau)


kept_fractions = st.sampled_from([-1.0, 0.1, 0.5, 0.9, 2.0])
widths = st.sampled_from([1, 2, 3, 4, 8, 12, 64, 520])


@few
@given(seeds, st.integers(0, 300), widths, kept_fractions, dtypes)
def test_gather(
    device: str, seed: int, count: int, width: int, kept: float, dtype: torch.dtype
) -> None:
    plan, expected = some_plan(seed, count, kept, device)
    x = random(seed, count, width, dtype=dtype)
    packed = cuda.gather(x.to(device), plan)
    assert packed.shape == (count, width)
    same_bits(packed[: expected.kept], reference.gather(x, expected))


@few
@given(seeds, st.integers(0, 3000), widths, kept_fractions, dtypes)
def test_compact(
    device: str, seed: int, count: int, width: int, kept: float, dtype: torch.dtype
) -> None:
    plan, expected = some_plan(seed, count, kept, device)
    x = random(seed, count, width, dtype=dtype)
    moved = cuda.compact(x.clone().to(device), plan)
    same_bits(moved[: expected.kept], reference.compact(x.clone(), expected))


def test_compact_keeps_ids(device: str) -> None:
    plan, expected = some_plan(7, 100, 0.4, device)
    ids = torch.arange(100)
    assert (
        cuda.compact(ids.clone().to(device), plan)[: expected.kept]
        .cpu()
        .equal(expected.rows.long())
    )


@few
@given(seeds, st.integers(0, 60), widths, st.integers(1, 4), dtypes, st.booleans())
def test_combine(
    device: str, seed: int, count: int, width: int, k: int, dtype: torch.dtype, channels: bool
) -> None:
    scores = random(seed, count, 6).abs()
    plan = cuda.plan_topk(scores.to(device), TopK(k))
    expected = reference.plan_topk(scores, TopK(k))
    packed = random(seed + 1, count * k, width, dtype=dtype)
    out = random(seed + 2, count, width, dtype=dtype)
    scale = random(seed + 3, count, width) if channels else None
    actual = cuda.combine(
        packed.to(device),
        plan,
        out.clone().to(device),
        None if scale is None else scale.to(device),
    )
    same_bits(actual, reference.combine(packed, expected, out.clone(), scale))


@few
@given(seeds, st.integers(0, 60), widths, kept_fractions, dtypes)
def test_combine_leaves_dropped_rows(
    device: str, seed: int, count: int, width: int, kept: float, dtype: torch.dtype
) -> None:
    plan, expected = some_plan(seed, count, kept, device)
    packed = random(seed + 1, count, width, dtype=dtype)
    out = random(seed + 2, count, width, dtype=dtype)
    actual = cuda.combine(packed.to(device), plan, out.clone().to(device))
    same_bits(actual, reference.combine(packed[: expected.kept], expected, out.clone()))


# ---- compute ----


def check_matmul(
    device: str,
    form: str,
    sizes: list[int],
    shape: tuple[int, int],
    epilogue: str,
    *,
    gather: bool,
    bias: bool,
    out_dtype: torch.dtype | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One product with the form of kernel forced, against the reference."""
    monkeypatch.setattr(cuda_matmul, "choose_kernel", lambda *args, **kwargs: form)
    dtype = torch.float32 if form == "simt_f32" else torch.bfloat16
    segments, (width, depth) = len(sizes), shape
    pair = epilogue in PAIRED
    labels = torch.repeat_interleave(torch.arange(segments), torch.tensor(sizes)).int()
    labels = torch.cat(
        [labels, torch.full((5,), -1, dtype=torch.int32)]
    )  # and rows that do not run
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))]
    plan = cuda.plan_partition(labels.to(device), segments)
    expected_plan = reference.plan_partition(labels, segments)
    matrices = random(4, segments, width, depth, dtype=dtype) / math.sqrt(depth)
    weight = Weight(matrices.to(device), width, depth, "dense", pair)
    biases = random(5, segments, width) if bias else None
    x = random(6, len(labels), depth, dtype=dtype)
    kept = expected_plan.kept
    expected = reference.segment_matmul(
        x if gather else x[:kept],
        Weight(matrices, width, depth, "dense", pair),
        expected_plan,
        gather=gather,
        epilogue=epilogue,
        bias=biases,
        out_dtype=torch.float32,
    )
    actual = cuda.segment_matmul(
        x.to(device),
        weight,
        plan,
        gather=gather,
        epilogue=epilogue,
        bias=None if biases is None else biases.to(device),
        out_dtype=out_dtype,
    )
    to = out_dtype or dtype
    assert actual.dtype == to and actual.shape == (len(labels), width // (1 + pair))
    tolerance = 1e-4 if to == torch.float32 else 1.6e-2
    torch.testing.assert_close(
        actual[:kept].float().cpu(), expected, atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segment_matmul_accumulates(device: str, dtype: torch.dtype) -> None:
    x, matrices = random(0, 9, 32, dtype=dtype), random(1, 1, 24, 32, dtype=dtype)
    weight = Weight(matrices.to(device), 24, 32, "dense")
    before = random(2, 9, 24, dtype=dtype)
    y = cuda.segment_matmul(x.to(device), weight, epilogue="gelu", out_dtype=torch.float32)
    out = before.clone().to(device)
    cuda.segment_matmul(x.to(device), weight, epilogue="gelu", out=out, accumulate=True)
    same_bits(out, (before.to(device).float() + y).to(dtype))
    with pytest.raises(InvalidInput, match="accumulate needs out, got None"):
        cuda.segment_matmul(x.to(device), weight, accumulate=True)


# sizes of the segments, [N, K]
SMALL = [
    ([3], (16, 64)),
    ([0, 1, 16, 0, 17, 5], (40, 72)),
    ([2, 0], (6, 520)),
    ([40], (48, 1032)),
]
TILES = [([70, 0, 1], (136, 72)), ([5, 130], (264, 200)), ([64, 128], (128, 64))]


@pytest.mark.parametrize("sizes, shape", SMALL)
@pytest.mark.parametrize("form", ["small_16", "small_32", "simt_f32", "simt_bf16"])
@pytest.mark.parametrize("epilogue", ["none", "gelu", "silu", "silu_mul", "relu", "swiglu_oai"])
def test_small_segments(
    device: str,
    form: str,
    sizes: list[int],
    shape: tuple[int, int],
    epilogue: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense = epilogue in ("none", "silu_mul")
    check_matmul(
        device,
        form,
        sizes,
        shape,
        epilogue,
        gather=dense,
        bias=not dense or sizes[0] > 2,
        out_dtype=torch.float32 if dense else None,
        monkeypatch=monkeypatch,
    )


@pytest.mark.parametrize("sizes, shape", TILES)
@pytest.mark.parametrize("form", ["tile_64", "tile_128"])
@pytest.mark.parametrize("epilogue", ["none", "silu_mul", "swiglu_oai"])
def test_tiles(
    device: str,
    form: str,
    sizes: list[int],
    shape: tuple[int, int],
    epilogue: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_matmul(
        device,
        form,
        sizes,
        shape,
        epilogue,
        gather=epilogue == "none",
        bias=epilogue != "none",
        out_dtype=torch.float32 if epilogue == "none" else None,
        monkeypatch=monkeypatch,
    )


def test_rows_do_not_depend_on_their_batch(device: str) -> None:
    """The same row in a segment of 1 and of 9 rows: one kernel sums it in one order."""
    weight = Weight(random(1, 1, 32, 256, dtype=torch.bfloat16).to(device), 32, 256, "dense")
    x = random(2, 9, 256, dtype=torch.bfloat16).to(device)
    whole = cuda.segment_matmul(x, weight)
    for n in range(9):
        same_bits(cuda.segment_matmul(x[n : n + 1].contiguous(), weight), whole[n : n + 1])


# ---- refusals ----


def test_wrong_arguments_are_named(device: str) -> None:
    plan = cuda.plan_threshold(torch.ones(4).to(device), torch.tensor(0.0).to(device))
    with pytest.raises(InvalidInput, match=r"gather: x must be .* \[4, \?\], got .* \[3, 8\]"):
        cuda.gather(torch.zeros(3, 8).to(device), plan)
    with pytest.raises(InvalidInput, match=r"scores must be a contiguous CUDA torch\.float32"):
        cuda.plan_threshold(torch.zeros(4, dtype=torch.float64).to(device), torch.tensor(0.0))
    weight = Weight.pack(torch.zeros(8, 8).to(device))
    with pytest.raises(InvalidInput, match="layout dense, got panel"):
        cuda.segment_matmul(torch.zeros(4, 8).to(device), weight, plan)
    with pytest.raises(InvalidInput, match="segments must lie in"):
        cuda.plan_partition(torch.zeros(4, dtype=torch.int32).to(device), 0)


def test_zero_rows_launch_nothing(
    monkeypatch: pytest.MonkeyPatch, emulator: cuda_emulator.EmulatedKernels
) -> None:
    cuda_emulator.install(monkeypatch, emulator)
    before = len(emulator.launched)
    plan = cuda.plan_threshold(torch.zeros(0), torch.tensor(0.0))
    x = torch.zeros(0, 8, dtype=torch.bfloat16)
    assert cuda.gather(x, plan).shape == (0, 8)
    assert cuda.compact(x, plan).shape == (0, 8)
    assert cuda.combine(x, plan, x).shape == (0, 8)
    weight = Weight(torch.zeros(1, 24, 8, dtype=torch.bfloat16), 24, 8, "dense")
    assert cuda.segment_matmul(x, weight, plan).shape == (0, 24)
    assert cuda.plan_topk(torch.zeros(0, 4), TopK(2)).offsets.tolist() == [0] * 5
    assert len(emulator.launched) == before


def test_choice_of_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The documented rule, on shapes from the field."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def chosen(rows: int, segments: int, width: int, depth: int, planned: bool = True) -> str:
        data = torch.empty(segments, width, depth, dtype=torch.bfloat16)
        x = torch.empty(1, depth, dtype=torch.bfloat16)
        weight = Weight(data, width, depth, "dense")
        return cuda.choose_kernel(x, weight, rows, planned)

    assert chosen(16, 8, 512, 64) == "small_16"
    assert chosen(1, 1, 16_384, 64, planned=False) == "small_32"
    assert chosen(17, 1, 512, 64, planned=False) == "linear"
    assert chosen(8 * 64, 8, 512, 64) == "tile_64"
    assert chosen(8 * 65, 8, 512, 64) == "tile_128"
    assert chosen(8 * 256, 8, 512, 64) == "grouped"
    assert chosen(16, 8, 512, 63) == "simt_bf16"
    assert cuda_plan.HISTOGRAM * 4 < 48 << 10
