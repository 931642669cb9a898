"""The CUDA ops against the reference: on the emulated device everywhere, on a GPU where one is.

Plans, gather, compact and combine must agree bit for bit, segment_matmul within its rounding.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import cuda_emulator
from pyruntime.errors import InvalidInput
from pyruntime.ops import Weight, cuda, reference
from pyruntime.ops.cuda import matmul as cuda_matmul
from pyruntime.ops.cuda import plan as cuda_plan
from pyruntime.ops.weight import PAIRED
from pyruntime.plan import Plan

GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.cuda,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    ],
)
CPP = shutil.which("g++") is not None
EMULATED = pytest.param(
    "cpu", marks=pytest.mark.skipif(not CPP, reason="g++ is missing: no emulated device")
)
few = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> cuda_emulator.EmulatedKernels:
    library = cuda_emulator.build(tmp_path_factory.mktemp("emulator"))
    return cuda_emulator.EmulatedKernels(library)


@pytest.fixture(params=[EMULATED, GPU])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """ "cuda", or "cpu" with every launch sent to the emulator."""
    if request.param == "cpu":
        cuda_emulator.install(monkeypatch, request.getfixturevalue("emulator"))
    yield request.param


def same_bits(actual: Tensor, expected: Tensor) -> None:
    actual, expected = actual.cpu(), expected.cpu()
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    kind = {2: torch.int16, 4: torch.int32}.get(actual.itemsize, actual.dtype)
    assert torch.equal(actual.contiguous().view(kind), expected.contiguous().view(kind))


def same_plan(actual: Plan, expected: Plan) -> None:
    kept = int(actual.offsets[-1])
    same_bits(actual.offsets, expected.offsets)
    same_bits(actual.inverse, expected.inverse)
    same_bits(actual.rows[:kept], expected.rows)
    assert actual.rows.numel() == actual.capacity == actual.inverse.numel()
    assert bool((actual.rows[kept:] == -1).all())
    assert (actual.weights is None) == (expected.weights is None)
    if actual.weights is not None and expected.weights is not None:
        same_bits(actual.weights[:kept], expected.weights)


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scores_with_ties(seed: int, *shape: int) -> Tensor:
    """Few distinct values, both zeros, infinities, a denormal and NaN: what breaks comparisons."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-40, math.inf, -math.inf, math.nan, 0.5])
    generator = torch.Generator().manual_seed(seed)
    return values[torch.randint(len(values), shape, generator=generator)]


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


@few
@given(seeds, st.integers(0, 700), st.sampled_from([1, 2, 31, 32, 33, 257, 1500]))
def test_plan_partition(device: str, seed: int, count: int, segments: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, segments, (count,), generator=generator).int()
    actual = cuda.plan_partition(labels.to(device), segments)
    same_plan(actual, reference.plan_partition(labels, segments))


@few
@given(seeds, st.integers(0, 60), st.sampled_from([1, 3, 8, 40, 300]), st.booleans(), st.data())
def test_plan_topk(
    device: str, seed: int, count: int, experts: int, renormalize: bool, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, min(experts, 9)))
    scores = scores_with_ties(seed, count, experts)
    if renormalize:  # NaN and infinities would only compare the bits of NaN
        scores = random(seed, count, experts).abs()
    actual = cuda.plan_topk(scores.to(device), k, renormalize)
    same_plan(actual, reference.plan_topk(scores, k, renormalize))


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
    scores = random(3, count // 4, 16)
    same_plan(cuda.plan_topk(scores.to(device), 4), reference.plan_topk(scores, 4))


def test_an_unknown_label_is_dropped(device: str) -> None:
    labels = torch.tensor([0, 5, -7, 1], dtype=torch.int32)
    plan = cuda.plan_partition(labels.to(device), 2)
    assert plan.inverse.flatten().tolist() == [0, -1, -1, 1]
    assert plan.offsets.tolist() == [0, 1, 2]


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
    plan, expected = cuda.plan_topk(scores.to(device), k), reference.plan_topk(scores, k)
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
    with pytest.raises(InvalidInput, match="k must lie in"):
        cuda.plan_topk(torch.zeros(4, 2).to(device), 3)
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
    assert cuda.plan_topk(torch.zeros(0, 4), 2).offsets.tolist() == [0] * 5
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
