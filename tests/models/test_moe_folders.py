"""Every form of every family, converted, through the runtime: it computes what the folder says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from pyruntime.format.convert import convert
from tests.models.session import opened, random_tokens
from tests.moe_checkpoints import write_moe_folder
from tests.oracle.decoder import logits_of_folder

pytestmark = pytest.mark.usefixtures("one_thread")
CASES: dict[str, dict[str, Any]] = {
    "mixtral": {"experts": 5, "top_k": 1},
    "qwen2_moe": {"experts": 60, "top_k": 4, "dense_layers": (0,)},
    "qwen3_moe": {"experts": 7, "top_k": 7, "bias": True},
    "olmoe": {"experts": 60, "top_k": 8},
    "granitemoe": {"tie": True},
    "phimoe": {"bias": True, "config_extra": {"router_jitter_noise": 0.3}},
    "gpt_oss": {"form": "mxfp4", "hidden_size": 64, "expert_size": 96},
    "deepseek_v2": {"q_rank": None, "dense_layers": (0,)},
    "deepseek_v3": {"form": "fp8", "experts": 6, "config_extra": {"n_group": 3, "topk_group": 2}},
}


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("family", CASES)
def test_the_runtime_computes_what_the_folder_says(
    tmp_path: Path, family: str, quantize: Literal["int8"] | None
) -> None:
    write_moe_folder(tmp_path / "hf", family, **CASES[family])
    convert(tmp_path / "hf", tmp_path / "model", dtype="float32", quantize=quantize)
    runtime = opened(tmp_path / "model")
    tokens = random_tokens(1, 2, 70)
    actual = runtime.forward(tokens).logits
    expected = torch.stack([logits_of_folder(tmp_path / "model", row) for row in tokens])
    assert isinstance(actual, Tensor)
    assert float(expected.std()) > 0.1
    assert float((actual - expected).abs().max()) <= 1e-4 * max(1.0, float(expected.abs().max()))
