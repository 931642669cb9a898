"""Expert models that cannot be converted are refused whole, with everything that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.format.convert import convert
from tests.format.test_refusals import refusal
from tests.moe_checkpoints import write_moe_folder

LAYER = "model.layers.1"


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not implemented"),
        ("mixtral", {"num_experts": 6}, "num_experts is 6, num_local_experts is 5: they must agr"),
        ("mixtral", {"num_experts_per_tok": 6}, "experts_per_token 6 exceeds num_experts 5"),
        ("mixtral", {"sliding_window": "x"}, "sliding_window must be a positive integer, is 'x'"),
        ("mixtral", {"quantization_config": {"bits": 4}}, "quantization_config {'bits': 4}"),
        ("qwen2_moe", {"mlp_only_layers": [True]}, "mlp_only_layers must be a list of layers"),
        ("qwen2_moe", {"norm_topk_prob": 1}, "norm_topk_prob must be true or false, is 1"),
        ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step must be a positive inte"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "moe_intermediate_size must be a positive"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window True"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0 is not implemented (must be absent)"),
        ("phimoe", {"num_experts_per_tok": 3}, "sparse_mixer chooses 2 experts per token"),
        ("gpt_oss", {"layer_types": ["chunked_attention"] * 2}, "layer_types must be 2 times full"),
        ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types must be 2 times full_attent"),
        ("gpt_oss", {"quantization_config": {"quant_method": "awq"}}, "(mxfp4 is)"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not implemented"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid' is not implemented"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob True is not implemented"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
         "5 experts do not form 2 groups"),
        ("deepseek_v2", {"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05 is not implemented"),
        ("deepseek_v2", {"kv_lora_rank": 0}, "kv_lora_rank must be a positive integer, is 0"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func 'softmax' is not implemented"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method 'greedy' is not implemented"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq 2 is not implemented"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads 2 is not implemented"),
        ("deepseek_v3", {"first_k_dense_replace": -1}, "first_k_dense_replace must be a number"),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "with a weight_block_si"),
    ],
)  # fmt: skip
def test_config(tmp_path: Path, family: str, config: dict[str, Any], message: str) -> None:
    write_moe_folder(
        tmp_path / "src", family, form="fused" if family == "gpt_oss" else "apart",
        config_extra=config,
    )  # fmt: skip
    text = refusal(tmp_path)
    assert message in text
    assert "\n" not in text


def test_every_missing_expert_tensor_is_named(tmp_path: Path) -> None:
    block = f"{LAYER}.block_sparse_moe"
    drop = (f"{block}.experts.3.w1.weight", f"{block}.gate.weight")
    extra = {
        f"{block}.experts.4.w2.weight": torch.ones(40, 20),
        f"{block}.experts.5.w2.weight": torch.ones(40, 21),
        "model.layers.0.block_sparse_moe.gate.weight": torch.ones(6, 40),
    }
    write_moe_folder(tmp_path / "src", drop=drop, extra=extra)
    first, *lines = refusal(tmp_path).splitlines()
    assert first.endswith("5 problems")
    assert {line.partition(", nearest name")[0] for line in lines} == {
        f"missing {drop[0]} [21, 40]",
        f"missing {drop[1]} [5, 40]",
        f"unused {block}.experts.5.w2.weight [40, 21]",
        f"misshapen {block}.experts.4.w2.weight [40, 20], expected [40, 21]",
        "misshapen model.layers.0.block_sparse_moe.gate.weight [6, 40], expected [5, 40]",
    }
    assert f"nearest name: {block}.experts.5.w2.weight" in lines[0]


def test_an_expert_in_two_spellings(tmp_path: Path) -> None:
    extra = {
        f"{LAYER}.mlp.experts.2.up_proj.weight": torch.ones(21, 40),
        "model.layers.0.mlp.experts.gate_up_proj": torch.ones(5, 42, 40),
        "model.layers.0.mlp.gate.weight": torch.ones(5, 40),
    }
    write_moe_folder(tmp_path / "src", extra=extra)
    first = "model.layers.0.block_sparse_moe"
    assert set(refusal(tmp_path).splitlines()[1:]) == {
        f"duplicated {LAYER}.mlp.experts.2.up_proj.weight, "
        f"also given as {LAYER}.block_sparse_moe.experts.2.w3.weight",
        "duplicated model.layers.0.mlp.experts.gate_up_proj, "
        f"also given as {first}.experts.0.w1.weight",
        f"duplicated model.layers.0.mlp.gate.weight, also given as {first}.gate.weight",
    }


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("granitemoe", "block_sparse_moe.input_linear.weight", [5, 42, 40]),
        ("granitemoe", "block_sparse_moe.output_linear.weight", [5, 40, 21]),
        ("qwen3_moe", "mlp.experts.4.down_proj.weight", [40, 21]),
        ("gpt_oss", "mlp.experts.gate_up_proj", [5, 40, 42]),
        ("gpt_oss", "mlp.experts.down_proj_bias", [5, 40]),
        ("gpt_oss", "self_attn.sinks", [4]),
        ("deepseek_v2", "self_attn.kv_b_proj.weight", [104, 26]),
        ("deepseek_v2", "self_attn.q_b_proj.weight", [72, 22]),
        ("deepseek_v3", "mlp.gate.e_score_correction_bias", [5]),
        ("phimoe", "input_layernorm.bias", [40]),
    ],
)  # fmt: skip
def test_what_is_missing_or_misshapen_has_its_own_name(
    tmp_path: Path, family: str, name: str, shape: list[int]
) -> None:
    form = "fused" if family == "gpt_oss" else "apart"
    whole = f"{LAYER}.{name}"
    write_moe_folder(tmp_path / "src", family, form=form, drop=(whole,))
    (line,) = refusal(tmp_path).splitlines()[1:]
    assert line == f"missing {whole} {shape}"
    wrong = [*shape[:-1], shape[-1] + 1]
    write_moe_folder(tmp_path / "src", family, form=form, extra={whole: torch.ones(wrong)})
    (line,) = refusal(tmp_path).splitlines()[1:]
    assert line == f"misshapen {whole} {wrong}, expected {shape}"


def test_quantised_tensors_need_their_scales(tmp_path: Path) -> None:
    scale = f"{LAYER}.mlp.experts.2.up_proj.weight_scale_inv"
    other = f"{LAYER}.mlp.experts.3.up_proj.weight_scale_inv"
    write_moe_folder(
        tmp_path / "src", "deepseek_v3", form="fp8", drop=(scale,), extra={other: torch.ones(2, 1)}
    )
    assert set(refusal(tmp_path).splitlines()[1:]) == {
        f"missing {scale} [2, 2]", f"misshapen {other} [2, 1], expected [2, 2]",
    }  # fmt: skip
    blocks = f"{LAYER}.mlp.experts.down_proj_blocks"
    write_moe_folder(
        tmp_path / "src", "gpt_oss", form="mxfp4", hidden_size=64, expert_size=32,
        extra={blocks: torch.ones(5, 64, 1, 16)},
    )  # fmt: skip
    (line,) = refusal(tmp_path).splitlines()[1:]
    assert line == f"mistyped {blocks} float32, expected uint8"


def test_eight_bit_weights_that_no_config_explains(tmp_path: Path) -> None:
    write_moe_folder(tmp_path / "src", "deepseek_v3", form="fp8",
                     config_extra={"quantization_config": None})  # fmt: skip
    lines = refusal(tmp_path).splitlines()
    assert any(line.startswith("mistyped") and "float8_e4m3fn" in line for line in lines)
    assert any(line.startswith("unused") and "weight_scale_inv" in line for line in lines)


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    name = f"{LAYER}.mlp.experts.gate_up_proj"
    bad = torch.ones(5, 42, 40)
    bad[3, 0, 0] = torch.nan
    write_moe_folder(tmp_path / "src", form="fused", extra={name: bad})
    assert refusal(tmp_path) == (
        f"{LAYER}.mlp.experts.3.gate_proj.weight (made of {name}): "
        "NaN, infinity, or out of range of float32"
    )


def test_layers_that_predict_ahead_are_left_out(tmp_path: Path) -> None:
    extra = {"model.layers.2.eh_proj.weight": torch.ones(3, 3)}
    ahead = {"num_nextn_predict_layers": 0}
    write_moe_folder(tmp_path / "src", "deepseek_v3", extra=extra, config_extra=ahead)
    assert "unused model.layers.2.eh_proj.weight" in refusal(tmp_path)
    write_moe_folder(tmp_path / "src", "deepseek_v3", extra=extra)
    convert(tmp_path / "src", tmp_path / "dst")
