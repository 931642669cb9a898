"""A trained mixed-scale model in the msvit-1 container, and what the code that trained it said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import pyruntime
from pyruntime.engine.vision import VisionRuntime

DATA = Path(__file__).resolve().parents[1] / "data"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    found = load_file(DATA / "vectors.safetensors")
    pixels = found["images_u8_nhwc"].permute(0, 3, 1, 2).float()
    return {**found, "images": (pixels / 127.5 - 1).contiguous()}


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> VisionRuntime:
    folder = tmp_path_factory.mktemp("msvit") / "model"
    pyruntime.convert(DATA / "msvit_digits_r4.safetensors", folder)
    return pyruntime.load_vision(folder)


def test_logits(runtime: VisionRuntime, golden: dict[str, Tensor]) -> None:
    output = runtime.forward(golden["images"])
    torch.testing.assert_close(output.logits, golden["logits"], atol=1e-4, rtol=0)
    assert output.trace.tokens.tolist() == [32, 47] + [32] * 14
    assert int((output.logits.argmax(1) == golden["labels"]).sum()) == 14


def test_gate(runtime: VisionRuntime, golden: dict[str, Tensor]) -> None:
    logits = runtime.model.scale_logits(golden["images"]).view(16, 16)
    torch.testing.assert_close(logits, golden["gate_logits"], atol=1e-4, rtol=0)
    alone = [runtime.model.scale_logits(image[None]) for image in golden["images"]]
    assert torch.equal(torch.stack(alone), logits)


def test_all_fine(runtime: VisionRuntime, golden: dict[str, Tensor]) -> None:
    policy = pyruntime.ComputePolicy(scales="all_fine")
    output = runtime.forward(golden["images"], policy)
    torch.testing.assert_close(output.logits, golden["logits_all_fine"], atol=1e-5, rtol=0)
    assert torch.equal(output.logits, runtime.model.forward(golden["images"]))
    assert output.trace.macs_executed == output.trace.macs_dense


def test_exact_work(runtime: VisionRuntime, golden: dict[str, Tensor]) -> None:
    """By hand: 32 or 47 rows of four blocks, the last for the class row alone."""
    trace = runtime.forward(golden["images"]).trace
    gate = 16 * (768 * 64 + 64 * 64 + 64 * 32 + 32)
    for number, tokens in ((0, 32), (1, 47)):
        block = 12 * 96**2 * tokens + 2 * 96 * tokens**2
        last = 2 * 96**2 * (tokens + 1) + 2 * 96 * tokens + 8 * 96**2
        stem = (tokens - 1) * 48 * 96
        wanted = stem + gate + 3 * block + last + 960
        assert int(trace.macs_per_image[number]) == wanted
