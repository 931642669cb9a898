"""Expert models: every number of every form on disk is in the folder, where the runtime looks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pyruntime.errors import ConversionError
from pyruntime.format import inspect
from pyruntime.format.convert import Report, convert
from pyruntime.format.load import read
from pyruntime.format.spec import decoder_tensors
from pyruntime.ops.weight import Weight
from tests.checkpoints import State, write_hf_folder
from tests.moe_checkpoints import write_moe_folder

CASES: dict[str, dict[str, Any]] = {
    "mixtral": {"family": "mixtral"},
    "mixtral, fused": {"family": "mixtral", "form": "fused", "experts": 60, "top_k": 8},
    "mixtral, one expert": {"family": "mixtral", "experts": 1, "top_k": 1, "tie": True},
    "qwen2_moe": {"family": "qwen2_moe", "experts": 60, "top_k": 4, "shards": 3},
    "qwen2_moe, dense layer": {"family": "qwen2_moe", "dense_layers": (1,), "num_layers": 3},
    "qwen2_moe, fused": {"family": "qwen2_moe", "form": "fused"},
    "qwen3_moe": {"family": "qwen3_moe", "dense_layers": (0,)},
    "qwen3_moe, fused": {"family": "qwen3_moe", "form": "fused", "bias": True},
    "olmoe": {"family": "olmoe"},
    "olmoe, fused": {"family": "olmoe", "form": "fused"},
    "granitemoe": {"family": "granitemoe"},
    "granitemoe, fused": {"family": "granitemoe", "form": "fused"},
    "phimoe": {"family": "phimoe", "bias": True},
    "phimoe, fused": {"family": "phimoe", "form": "fused"},
    "gpt_oss, fused": {"family": "gpt_oss", "form": "fused"},
    "gpt_oss, fused, odd": {
        "family": "gpt_oss", "form": "fused", "hidden_size": 51, "expert_size": 33,
    },
    "gpt_oss, mxfp4": {
        "family": "gpt_oss", "form": "mxfp4", "hidden_size": 96, "expert_size": 64,
    },
    "deepseek_v2": {"family": "deepseek_v2", "dense_layers": (0,)},
    "deepseek_v2, lite": {"family": "deepseek_v2", "q_rank": None, "experts": 60, "top_k": 6},
    "deepseek_v2, fused": {"family": "deepseek_v2", "form": "fused"},
    "deepseek_v3": {"family": "deepseek_v3", "dense_layers": (0,)},
    "deepseek_v3, fp8": {"family": "deepseek_v3", "form": "fp8", "dense_layers": (0,)},
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def made(tmp_path: Path, options: dict[str, Any], **how: Any) -> tuple[State, Report]:
    state = write_moe_folder(tmp_path / "src", **options)
    return state, convert(tmp_path / "src", tmp_path / "dst", **how)


def values(tensor: Tensor | Weight) -> Tensor:
    return tensor.dense() if isinstance(tensor, Weight) else tensor


def check(folder: Path, state: State) -> None:
    container = read(folder)
    names = [spec.name for spec in decoder_tensors(container.spec, None)]
    assert sorted(names) == sorted(state)
    for spec in decoder_tensors(container.spec, None):
        found, expected = values(container.tensors[spec.name]), state[spec.name]
        assert found.dtype == getattr(torch, spec.dtype)
        assert torch.equal(found.reshape(spec.shape), expected.to(found.dtype)), spec.name


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values(tmp_path: Path, case: dict[str, Any], dtype: torch.dtype) -> None:
    state, report = made(tmp_path, {**case, "dtype": dtype}, shard_bytes=60_000)
    stored_float32 = dtype == torch.float32 and case.get("form") not in ("fp8",)
    assert report.spec.dtype == ("float32" if stored_float32 else "bfloat16") or (
        dtype == torch.float32
    )
    check(tmp_path / "dst", state)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_torch_files(tmp_path: Path, family: str) -> None:
    form = "apart" if family == "deepseek_v3" else "fused"
    state, _ = made(tmp_path, {"family": family, "form": form, "files": "bin"})
    check(tmp_path / "dst", state)


def test_dequantized_models_are_bfloat16(tmp_path: Path) -> None:
    for options in (CASES["gpt_oss, mxfp4"], CASES["deepseek_v3, fp8"]):
        folder = tmp_path / options["form"]
        _, report = made(folder, {**options, "dtype": torch.bfloat16})
        assert report.spec.dtype == "bfloat16"
        assert report.spec.quantization is None


def test_inspect_names_experts_and_router(tmp_path: Path) -> None:
    state, _ = made(tmp_path, {"family": "qwen2_moe", "dense_layers": (1,)})
    facts = inspect.describe(tmp_path / "dst")
    assert facts["parameters"]["total"] == sum(tensor.numel() for tensor in state.values())
    counted = [t.numel() for n, t in state.items() if ".experts." in n or ".shared." in n]
    assert facts["parameters"]["experts"] == sum(counted)
    assert facts["parameters"]["routers"] == 5 * 40
    text = inspect.text(tmp_path / "dst")
    assert "2 of 5 a token, 21 wide, in 1 of 2 layers; shared 27, gated" in text
    assert "top-k of softmax" in text


def test_a_rank_reads_its_own_experts_alone(tmp_path: Path) -> None:
    state, _ = made(tmp_path, {"family": "qwen3_moe", "experts": 7})
    (path,) = (tmp_path / "dst").glob("weights-*.safetensors")
    with safe_open(path, framework="pt") as file:
        for part in ("gate_up", "down"):
            name = f"layers.1.mlp.experts.{part}.weight"
            mine = file.get_slice(name)[2:5]
            weight = Weight(mine, *state[name].shape[1:], "panel", part == "gate_up")
            assert torch.equal(weight.dense(), state[name][2:5])


def stored(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("weights-*.safetensors"):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe, dense layer", "gpt_oss, mxfp4",
                                  "deepseek_v3, fp8"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    """Every number within half a step of the original, and the largest of a row at 127."""
    options = {**CASES[case], "dtype": dtype}
    state, report = made(tmp_path, options, quantize="int8", shard_bytes=50_000)
    spec, found, quantized = report.spec, stored(tmp_path / "dst"), 0
    assert spec.quantization == "int8" and ", int8) to" in str(report)
    for tensor in decoder_tensors(spec, None):
        if tensor.dtype != "int8":
            continue
        quantized += 1
        pair = tensor.layout == "gate_up"
        numbers = Weight(found[tensor.name], *tensor.shape[-2:], "panel", pair).dense().float()
        original, scale = state[tensor.name].float(), found[f"{tensor.name}_scale"]
        assert torch.equal(scale, original.abs().amax(-1) / 127)
        assert torch.equal(numbers.abs().amax(-1).view(scale.shape), (scale > 0) * 127.0)
        error = (numbers.view(original.shape) * scale[..., None] - original).abs()
        assert bool((error <= scale[..., None] * 0.5001).all())
    kept = {n for n, t in found.items() if t.dtype != torch.int8 and not n.endswith("_scale")}
    assert quantized > 8
    assert {"embed.weight", "norm.weight"} <= kept
    assert any(name.endswith("mlp.router.weight") for name in kept)
    for name in kept:
        found[name] = (
            Weight(found[name], *state[name].shape).dense() if "router.weight" in name
            else found[name]
        )  # fmt: skip
        assert torch.equal(found[name].reshape(state[name].shape).float(), state[name].float())


def test_int8_of_zeros(tmp_path: Path) -> None:
    extra = {"lm_head.weight": torch.zeros(300, 40)}
    extra["lm_head.weight"][7, 3] = 2.0
    write_moe_folder(tmp_path / "src", extra=extra)
    convert(tmp_path / "src", tmp_path / "dst", quantize="int8")
    found = stored(tmp_path / "dst")
    scale = found["lm_head.weight_scale"]
    assert scale[7] == 2.0 / 127 and int((scale != 0).sum()) == 1
    assert int((found["lm_head.weight"] != 0).sum()) == 1


def test_int8_is_loaded_with_its_scales(tmp_path: Path) -> None:
    state, _ = made(tmp_path, {**CASES["deepseek_v2"], "experts": 7}, quantize="int8")
    container = read(tmp_path / "dst")
    for spec in decoder_tensors(container.spec, None):
        weight = container.tensors[spec.name]
        if spec.dtype != "int8":
            continue
        assert isinstance(weight, Weight) and weight.scale is not None
        assert weight.scale.shape == (spec.segments, spec.shape[-2])
        error = (weight.dense() - state[spec.name].view(spec.segments, *spec.shape[-2:])).abs()
        assert bool((error <= weight.scale[..., None] * 0.5001).all())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_int8_of_what_is_not_finite(tmp_path: Path, bad: float) -> None:
    state = write_hf_folder(tmp_path / "src")
    state["lm_head.weight"][3, 4] = bad
    write_hf_folder(tmp_path / "src", extra={"lm_head.weight": state["lm_head.weight"]})
    with pytest.raises(ConversionError, match=r"lm_head.weight: NaN, infinity, or out of range"):
        convert(tmp_path / "src", tmp_path / "dst", quantize="int8")


def test_int8_without_experts(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "src")
    plain = convert(tmp_path / "src", tmp_path / "plain")
    small = convert(tmp_path / "src", tmp_path / "small", quantize="int8")
    assert small.bytes < 0.6 * plain.bytes
    command = inspect.describe(tmp_path / "small")["provenance"]["command"]
    assert command.endswith("--quantize int8")
    assert "matrices int8" in inspect.text(tmp_path / "small")
