"""The ops under torch.library: schemas and fakes hold, and whole models compile and export."""

from __future__ import annotations

import io
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export, load, save

import pyruntime.ops.library  # noqa: F401 - registers torch.ops.pyruntime
from pyruntime import ops
from pyruntime.errors import InvalidInput
from pyruntime.ops import ExitRule, TopK, Weight

lib = torch.ops.pyruntime
DTYPES = [torch.float32, torch.bfloat16]
# (source rows, segments, choices, columns): one row, no rows, padded panels, more than one panel
SHAPES = [(1, 1, 1, 4), (0, 3, 2, 8), (9, 4, 2, 33), (40, 5, 3, 70)]
BACKEND = "inductor" if shutil.which("g++") else "aot_eager"


def check(op: Any, *args: Any, **kwargs: Any) -> None:
    torch.library.opcheck(op.default, args, kwargs)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", SHAPES)
def test_planners(shape: tuple[int, int, int, int]) -> None:
    count, segments, choices, _ = shape
    scores = torch.rand(count, segments)
    check(lib.plan_topk, scores, choices, normalize=True)
    check(lib.plan_topk, scores, choices, torch.rand(segments), torch.rand(count, 3), "sigmoid")
    check(lib.plan_threshold, scores[:, 0], torch.tensor(0.5))
    check(lib.plan_threshold, scores[:, 0], torch.full((count,), 0.5))
    labels = torch.randint(-1, segments, (count, choices), dtype=torch.int32)
    check(lib.plan_partition, labels, segments)
    check(lib.plan_partition, labels, segments, torch.rand(count, choices))
    check(lib.plan_partition, labels[:, 0], segments)
    if count:
        check(lib.quantile, scores[:, 0], 0.3)


@pytest.mark.parametrize("count", [0, 1, 9])
def test_exits(count: int) -> None:
    x, state, limits = torch.randn(count, 5), torch.rand(count, 3), torch.rand(count, 2)
    gate = [1.0, -1.0, 0.5, 0.5, -0.5]
    check(lib.plan_exit, x, state, limits, "jei_dnn", False, gate, "independent")
    check(lib.plan_exit, x, state, limits.T.contiguous().T, "patience", True)
    check(lib.plan_exit, x, state, limits, "entropy", total=torch.rand(count, 5))
    tokens = torch.randn(3 * count, 8).bfloat16()
    rows = (3 * torch.arange(count)).int()
    data, norm = Weight.pack(torch.randn(6, 8)).data, torch.rand(8)
    head = {"weight": data, "out_features": 6, "bias": torch.rand(6), "norm_weight": norm}
    check(lib.plan_exit, tokens, state, limits, "learned", rows=rows, **head)
    check(lib.plan_exit, tokens, state, limits, "margin", rows=rows, **head, norm_bias=norm)


def test_an_exit_mutates_nothing() -> None:
    x, state, total = torch.randn(4, 3), torch.zeros(4, 3), torch.randn(4, 3)
    limits, before = torch.zeros(4, 2), total.clone()
    out = lib.plan_exit(x, state, limits, "patience", total=total)
    assert torch.equal(total, before) and not state.any() and out[2][:, 2].all()
    after, summed = torch.zeros(4, 3), total.clone()
    logits, confidence, plan = ops.plan_exit(x, ExitRule("patience"), after, limits, total=summed)
    for actual, expected in zip(out, (logits, confidence, after), strict=False):
        assert torch.equal(actual, expected)
    assert out[3].tolist() == [-1] * 4 and torch.equal(out[5], plan.inverse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_movement(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    count, segments, choices, width = shape
    rows, offsets, inverse, weights = lib.plan_topk(torch.rand(count, segments), choices)
    x = torch.randn(count, width).to(dtype)
    check(lib.gather, x, rows, offsets)
    check(lib.gather, x.view(count, width, 1).expand(-1, -1, 3), rows, offsets)
    packed = lib.gather(x, rows, offsets)
    check(lib.combine, packed, rows, offsets, inverse, x, weights)
    channels = torch.rand(count, width)
    check(lib.combine, packed, rows, offsets, inverse, x.T.contiguous().T, None, channels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_segment_matmul(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    count, segments, choices, width = shape
    rows, offsets, _, _ = lib.plan_topk(torch.rand(count, segments), choices)
    x = torch.randn(count, width).to(dtype)
    weight = Weight.pack(torch.randn(segments, 7, width).to(dtype))
    check(lib.segment_matmul, x, weight.data, 7, width, offsets, rows)
    packed = lib.gather(x, rows, offsets)
    bias = torch.randn(segments, 7)
    check(lib.segment_matmul, packed, weight.data, 7, width, offsets, None, bias, "gelu")
    half = torch.randn(5, width).to(dtype)
    pair = Weight.pack_gate_up(half, half)
    out = {"epilogue": "silu_mul", "out_dtype": torch.float32}
    check(lib.segment_matmul, x, pair.data, 10, width, **out)
    small = weight.quantize()
    check(lib.segment_matmul, x, small.data, 7, width, offsets, rows, scale=small.scale)
    out = {"epilogue": "swiglu_oai", "alpha": 1.5, "limit": 2.0}
    check(lib.segment_matmul, x, pair.data, 10, width, **out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_patches(dtype: torch.dtype) -> None:
    x = torch.randn(5, 12).to(dtype)
    rows = torch.tensor([4, 0], dtype=torch.int32)
    check(lib.layer_norm, x, torch.rand(12), torch.rand(12), 1e-6)
    check(lib.layer_norm, x, torch.rand(12), torch.rand(12), 1e-6, rows, torch.float32)
    check(lib.layer_norm, x, torch.rand(12), torch.rand(12), 1e-6, epilogue="gelu")
    images = torch.randn(2, 3, 9, 11).to(dtype)
    check(lib.patches, images, 4, 3, 1)
    check(lib.patches, images.permute(0, 2, 3, 1), 4, 3, 1, True, torch.bfloat16)


def test_padding_is_told_apart_and_not_computed() -> None:
    scores = torch.tensor([0.9, 0.1, 0.8, 0.2])
    rows, offsets, inverse, weights = lib.plan_threshold(scores, torch.tensor(0.5))
    assert rows.tolist() == [0, 2, -1, -1] and offsets.tolist() == [0, 2]
    assert inverse.tolist() == [[0], [-1], [1], [-1]]
    assert torch.equal(weights, torch.tensor([0.9, 0.8, 0.0, 0.0]))
    x = torch.full((4, 3), torch.nan)
    x[[0, 2]] = 1.0
    weight = Weight.pack(torch.ones(2, 3))
    out = lib.segment_matmul(x, weight.data, 2, 3, offsets, rows)
    assert torch.equal(out, torch.tensor([[3.0, 3.0]] * 2 + [[0.0, 0.0]] * 2))
    with pytest.raises(InvalidInput, match="rows need offsets"):
        lib.segment_matmul(x, weight.data, 2, 3, None, rows)


class MoE(nn.Module):
    """Top-2 of 4 experts, each silu(gate) * up and down, added to the input."""

    gate_up: Tensor
    down: Tensor

    def __init__(self, width: int = 24, inner: int = 20, experts: int = 4) -> None:
        super().__init__()
        self.width, self.inner = width, inner
        self.router = nn.Linear(width, experts)
        pair = Weight.pack_gate_up(*torch.randn(2, experts, inner, width) / width**0.5)
        self.register_buffer("gate_up", pair.data)
        down = Weight.pack(torch.randn(experts, width, inner) / inner**0.5)
        self.register_buffer("down", down.data)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        rows, offsets, inverse, weights = lib.plan_topk(scores, 2, score="softmax", normalize=True)
        packed = lib.gather(x, rows, offsets)
        hidden = lib.segment_matmul(
            packed, self.gate_up, 2 * self.inner, self.width, offsets, epilogue="silu_mul"
        )
        out = lib.segment_matmul(hidden, self.down, self.width, self.inner, offsets)
        return lib.combine(out, rows, offsets, inverse, x, weights).relu()

    def plain(self, x: Tensor) -> Tensor:
        """The same by the ops themselves, whose packed tensors are not padded."""
        plan = ops.plan_topk(self.router(x), TopK(2, "softmax", normalize=True))
        pair = Weight(self.gate_up, 2 * self.inner, self.width, "panel", True)
        down = Weight(self.down, self.width, self.inner)
        hidden = ops.segment_matmul(x, pair, plan, gather=True, epilogue="silu_mul")
        return ops.combine(ops.segment_matmul(hidden, down, plan), plan, x.clone()).relu()


class GatedMLP(nn.Module):
    """GateSkip: a vector gate; tokens below the quantile of its mean keep their residual."""

    gate_up: Tensor
    down: Tensor

    def __init__(self, width: int = 24, inner: int = 40) -> None:
        super().__init__()
        self.width, self.inner = width, inner
        self.gate = nn.Linear(width, width)
        pair = Weight.pack_gate_up(*torch.randn(2, inner, width) / width**0.5)
        self.register_buffer("gate_up", pair.data)
        self.register_buffer("down", Weight.pack(torch.randn(width, inner) / inner**0.5).data)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x).sigmoid()
        scores = gate.mean(1)
        rows, offsets, inverse, _ = lib.plan_threshold(scores, lib.quantile(scores, 0.4))
        hidden = lib.segment_matmul(
            x, self.gate_up, 2 * self.inner, self.width, offsets, rows, epilogue="silu_mul"
        )
        out = lib.segment_matmul(hidden, self.down, self.width, self.inner, offsets)
        return lib.combine(out, rows, offsets, inverse, x, channel_weights=gate).relu()

    def plain(self, x: Tensor) -> Tensor:
        """The same by the ops themselves."""
        gate = self.gate(x).sigmoid()
        scores = gate.mean(1)
        plan = ops.plan_threshold(scores, ops.quantile(scores, 0.4))
        assert 0 < plan.kept < len(x)
        pair = Weight(self.gate_up, 2 * self.inner, self.width, "panel", True)
        down = Weight(self.down, self.width, self.inner)
        hidden = ops.segment_matmul(x, pair, plan, gather=True, epilogue="silu_mul")
        return ops.combine(ops.segment_matmul(hidden, down, plan), plan, x.clone(), gate).relu()


@pytest.mark.parametrize("kind", [MoE, GatedMLP])
@torch.inference_mode()
def test_compile(kind: type[MoE | GatedMLP]) -> None:
    model = kind()
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND, dynamic=True)
    for count in (11, 32):
        x = torch.randn(count, model.width)
        expected = model.plain(x)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("kind", [MoE, GatedMLP])
@torch.no_grad()
def test_export(kind: type[MoE | GatedMLP]) -> None:
    model = kind()
    x = torch.randn(11, model.width)
    program = export(model, (x,), dynamic_shapes=({0: Dim("tokens", min=2)},))
    file = io.BytesIO()
    save(program, file)
    loaded = load(io.BytesIO(file.getvalue())).module()
    for rows in (x, torch.randn(32, model.width)):
        torch.testing.assert_close(loaded(rows), model.plain(rows), rtol=0, atol=0)
