"""Vision checkpoints that cannot be converted: all that is wrong is named, nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.errors import ConversionError, UnsupportedModel
from pyruntime.format.convert import convert
from tests.checkpoints import write_hf_folder, write_json
from tests.vision_checkpoints import (
    PREPROCESS,
    write_acm,
    write_hf_vision_folder,
    write_jei_dnn,
    write_pth,
    write_timm_folder,
)
from tests.vision_states import t2t_state, timm_state


def refusal(tmp_path: Path, source: str = "src", **options: Any) -> str:
    """The message of a refused conversion, after checking that nothing was left behind."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConversionError) as caught:
        convert(tmp_path / source, tmp_path / "dst", **options)
    assert sorted(tmp_path.rglob("*")) == before
    return str(caught.value)


def test_all_tensor_problems_at_once(tmp_path: Path) -> None:
    extra = {
        "blocks.1.attn.query.weight": torch.ones(40, 40),
        "blocks.1.mlp.fc1.weight": torch.ones(51, 40),
        "blocks.2.norm1.weight": torch.ones(40, dtype=torch.int32),
        "blocks.0.ls1.gamma": torch.ones(41),
    }
    write_timm_folder(
        tmp_path / "src", extra=extra, layer_scale="ls{n}.gamma", drop=("blocks.1.norm2.bias",)
    )
    lines = refusal(tmp_path).splitlines()
    assert lines[0].endswith("5 problems")
    assert set(lines[1:]) == {
        "missing blocks.1.norm2.bias [40]",
        "unused blocks.1.attn.query.weight [40, 40], nearest name: blocks.1.attn.qkv.weight",
        "misshapen blocks.1.mlp.fc1.weight [51, 40], expected [52, 40]",
        "mistyped blocks.2.norm1.weight I32, expected float32 or float16 or bfloat16",
        "misshapen blocks.0.ls1.gamma [41], expected [40]",
    }  # fmt: skip


def test_a_layer_scale_in_some_layers_only(tmp_path: Path) -> None:
    write_timm_folder(tmp_path / "src", layer_scale="ls{n}.gamma", drop=("blocks.1.ls2.gamma",))
    assert "missing blocks.1.ls2.gamma [40]" in refusal(tmp_path)


def test_a_gap_between_layers(tmp_path: Path) -> None:
    gone = tuple(name for name in timm_state() if name.startswith("blocks.1."))
    write_timm_folder(tmp_path / "src", drop=gone)
    lines = refusal(tmp_path).splitlines()[1:]
    assert {line.split()[1][:9] for line in lines if line.startswith("missing")} == {"blocks.1."}
    assert {line.split()[1][:9] for line in lines if line.startswith("unused")} == {"blocks.2."}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "resnet50"}, "'resnet50' is not supported (supported: vit_*"),
        ({"architecture": "vit_base_patch16_siglip_224"}, "siglip is not implemented"),
        ({"architecture": "vit_base_patch32_clip_quickgelu_224"}, "quickgelu is not implemented"),
        ({"global_pool": "map"}, "global_pool 'map' is not implemented (must be 'token' or 'avg')"),
        ({"num_classes": 0}, "num_classes is 0: a backbone without a classifier"),
        ({"num_classes": 8}, "head.weight has 7 rows, "),
        ({"num_heads": 7}, "7 heads do not divide 40 channels"),
        ({"num_heads": None}, "num_heads is needed: 40 channels do not tell it"),
        ({"model_args": {"mlp_layer": "GluMlp", "act_layer": "relu"}},
         "model_args act_layer 'relu' is not implemented"),
        ({"pretrained_cfg": []}, "pretrained_cfg and model_args must be objects"),
        ({"label_names": ["a"]}, "1 labels for 7 classes"),
        ({"label_names": [1, 2]}, "labels must be"),
    ],
)  # fmt: skip
def test_timm_config(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    write_timm_folder(tmp_path / "src", config_extra=config)
    assert message in refusal(tmp_path)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"interpolation": "lanczos"}, "interpolation 'lanczos' is not implemented"),
        ({"crop_mode": "border"}, "crop_mode 'border' is not implemented"),
        ({"input_size": [3, 224]}, "input_size must be [channels, height, width]"),
        ({"input_size": [3, 16, 16]}, "pos_embed has 7 rows, expected 16 or 17 for 16 x 16 pixels "
                                      "in patches of 4; positions of another image size"),
        ({"crop_pct": 1.5}, "crop must be in (0, 1], is 1.5"),
        ({"std": [0.5, 0.0, 0.5]}, "std must be positive"),
        ({"mean": [0.5], "std": [0.5]}, "expected [width, 1, p, p]"),
        ({"mean": "imagenet"}, "mean must be"),
    ],
)  # fmt: skip
def test_timm_preprocessing(tmp_path: Path, described: dict[str, Any], message: str) -> None:
    write_timm_folder(tmp_path / "src")
    path = tmp_path / "src/config.json"
    config = json.loads(path.read_text())
    config["pretrained_cfg"] |= described
    write_json(path, config)
    assert message in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("attn_pool.q.weight", "attention pooling is not implemented"),
        ("blocks.0.mlp.w12.weight", "a SwiGLU feed-forward part is not implemented"),
        ("rope.freqs", "rotary positions is not implemented"),
        ("patch_embed.backbone.stem.conv.weight", "a convolutional stem is not implemented"),
        ("blocks.0.attn.q_bias", "unused blocks.0.attn.q_bias"),
        ("norm_pre.weight", "missing norm_pre.bias"),
        ("fc_norm.weight", "unused norm.weight"),
    ],
)
def test_parts_that_are_not_implemented(tmp_path: Path, name: str, message: str) -> None:
    write_timm_folder(tmp_path / "src", extra={name: torch.ones(40)})
    assert message in refusal(tmp_path)


@pytest.mark.parametrize(
    ("drop", "extra", "message"),
    [
        (("head.weight",), {}, "no head.weight: a backbone without a classifier"),
        (("pos_embed", "blocks.0.mlp.fc1.weight"), {}, "missing pos_embed"),
        (("patch_embed.proj.weight",), {}, "patch_embed.proj.weight is missing, expected [width"),
        ((), {"patch_embed.proj.weight": torch.ones(40, 3, 4, 5)}, "is [40, 3, 4, 5], expected"),
        ((), {"patch_embed.proj.weight": torch.ones(40, 47)}, "is [40, 47], expected [width, 3"),
        ((), {"cls_token": torch.ones(40)}, "misshapen cls_token [40], expected 3 axes"),
        ((), {"head.weight": torch.ones(7, 0)}, "misshapen head.weight [7, 0], expected 2 axes"),
    ],
)
def test_what_the_shape_is_read_from(
    tmp_path: Path, drop: tuple[str, ...], extra: dict[str, Any], message: str
) -> None:
    write_timm_folder(tmp_path / "src", drop=drop, extra=extra)
    assert message in refusal(tmp_path)


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        ("vit", {"architectures": ["ViTForMaskedImageModeling"]}, "not supported (supported for"),
        ("vit", {"hidden_act": "gelu_new"}, "hidden_act 'gelu_new' is not implemented"),
        ("dinov2", {"use_swiglu_ffn": True}, "use_swiglu_ffn True is not implemented"),
        ("vit", {"num_attention_heads": 0}, "num_attention_heads must be a positive integer"),
        ("vit", {"image_size": [12]}, "image_size must be a side, or a height and"),
        ("deit", {"architectures": ["DeiTForImageClassification"]}, "no classifier.weight"),
        ("vit", {"id2label": {"0": "a", "1": "b"}}, "2 labels for 7 classes"),
    ],
)  # fmt: skip
def test_transformers_config(
    tmp_path: Path, model: str, config: dict[str, Any], message: str
) -> None:
    write_hf_vision_folder(tmp_path / "src", model, config_extra=config)
    assert message in refusal(tmp_path)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ({"do_resize": False}, "do_resize False is not implemented (must be True)"),
        ({"rescale_factor": 1.0}, "rescale_factor 1.0 is not implemented"),
        ({"resample": 1}, "resample 1 is not implemented"),
        ({"size": {"longest_edge": 8}}, "do not say what is resized and cropped"),
        ({"image_mean": [0.5]}, "need a number per channel each"),
    ],
)
def test_processors(tmp_path: Path, processor: dict[str, Any], message: str) -> None:
    write_hf_vision_folder(tmp_path / "src", "vit", processor=processor)
    assert message in refusal(tmp_path)


def test_a_transformers_folder_without_a_processor(tmp_path: Path) -> None:
    write_hf_vision_folder(tmp_path / "src", "vit")
    (tmp_path / "src/preprocessor_config.json").unlink()
    assert "a preprocess.json can be given instead" in refusal(tmp_path)


def test_a_backbone_of_transformers(tmp_path: Path) -> None:
    write_hf_vision_folder(tmp_path / "src", "vit", drop=("classifier.weight", "classifier.bias"))
    assert "a backbone without a classifier" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("sidecar", "message"),
    [
        ({"meen": [0.5]}, "unknown key 'meen', nearest: 'mean'"),
        ({"mean": "x"}, "mean must be"),
        ({"interpolation": "nearest"}, "interpolation 'nearest' is not implemented"),
        ({"image_size": [32]}, "image_size must be a height and a width, is [32]"),
        ({"image_size": [64, 30]}, "patches of 16 do not tile (64, 30)"),
        ({"position_resize": "bilinear"}, "'bilinear' is not implemented (must be 'bicubic_aa' or"),
        ({"crop_pct": 0}, "crop must be in (0, 1], is 0"),
        ({"num_heads": 3}, "3 heads do not divide 128 channels"),
        ({"labels": ["a", "b"]}, "2 labels for 7 classes"),
    ],
)
def test_sidecars(tmp_path: Path, sidecar: dict[str, Any], message: str) -> None:
    write_jei_dnn(tmp_path / "joint.pth", preprocess=sidecar)
    assert message in refusal(tmp_path, "joint.pth")


def test_a_bare_checkpoint_says_what_it_needs(tmp_path: Path) -> None:
    write_jei_dnn(tmp_path / "joint.pth", sidecar=False)
    text = refusal(tmp_path, "joint.pth")
    assert str(tmp_path / "preprocess.json") in text
    for key in ("mean", "std", "interpolation", "image_size"):
        assert f'"{key}"' in text
    assert "nowhere.json: no such file" in refusal(
        tmp_path, "joint.pth", preprocess=tmp_path / "nowhere.json"
    )
    (tmp_path / "preprocess.json").write_text("[")
    assert "cannot be read" in refusal(tmp_path, "joint.pth")
    (tmp_path / "preprocess.json").write_text('{"mean": [0.5]}')
    assert len(refusal(tmp_path, "joint.pth").splitlines()) == 2


def test_positions_that_do_not_tell_the_grid(tmp_path: Path) -> None:
    write_pth(tmp_path / "vit.pth", timm_state(), preprocess={"num_heads": 5})
    assert "do not tell the grid of the patches: image_size" in refusal(tmp_path, "vit.pth")
    # 9 rows: 3 x 3 patches without the prefix, or 2 x 2 after five prefix rows.
    state = timm_state(image=(12, 12), registers=4, prefix_positions=False)
    write_pth(tmp_path / "vit.pth", state, preprocess={"num_heads": 5})
    assert "do not tell the grid" in refusal(tmp_path, "vit.pth")


def test_unknown_wrappers(tmp_path: Path) -> None:
    write_pth(tmp_path / "vit.pth", timm_state(), wrapper="weights", beside={"epoch": 1})
    text = refusal(tmp_path, "vit.pth")
    assert "no state dict: it holds weights, epoch (known: state_dict_ema, model_ema," in text


def test_transformer_tokens(tmp_path: Path) -> None:
    state = {n.replace(".kqv.", ".attn.qkv."): t for n, t in t2t_state(exits=0).items()}
    write_pth(tmp_path / "t2t.pth", state)
    text = refusal(tmp_path, "t2t.pth")
    assert "T2T-ViT with transformer tokens (T2T-ViT_t) is not implemented" in text


def test_damaged_files(tmp_path: Path) -> None:
    write_jei_dnn(tmp_path / "joint.pth")
    whole = (tmp_path / "joint.pth").read_bytes()
    (tmp_path / "joint.pth").write_bytes(whole[: len(whole) // 2])
    assert f"{tmp_path / 'joint.pth'}: damaged torch file" in refusal(tmp_path, "joint.pth")
    write_timm_folder(tmp_path / "src")
    path = tmp_path / "src/model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert "not a whole safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["cls_token", "blocks.1.attn.proj.bias", "blocks.1.ls1.gamma"])
def test_numbers_that_are_not_finite(tmp_path: Path, name: str) -> None:
    state = timm_state(layer_scale="ls{n}.gamma")
    state[name].view(-1)[-1] = float("nan")
    write_timm_folder(tmp_path / "src", layer_scale="ls{n}.gamma", extra={name: state[name]})
    text = refusal(tmp_path)
    assert name in text and "NaN, infinity" in text


@pytest.mark.parametrize("kind", ["timm", "joint.pth", "final.pth"])
def test_int8(tmp_path: Path, kind: str) -> None:
    write_timm_folder(tmp_path / "timm")
    write_jei_dnn(tmp_path / "joint.pth", preprocess={"num_heads": 2})
    if kind == "final.pth":
        write_acm(tmp_path / "final.pth")
    text = refusal(tmp_path, kind, quantize="int8")
    assert "int8 matrices of a vision model are not implemented" in text


def test_options_of_other_models(tmp_path: Path) -> None:
    write_timm_folder(tmp_path / "src")
    write_jei_dnn(tmp_path / "joint.pth")
    assert "sidecar given, but it is not a file" in refusal(tmp_path, sidecar=tmp_path / "x")
    assert "base given, but it is a vision transformer" in refusal(
        tmp_path, "joint.pth", base=tmp_path
    )
    assert "width_rule given, but nothing in it is adaptive" in refusal(
        tmp_path, "joint.pth", width_rule="paper"
    )
    assert "width_rule must be one of paper, official, kminus" in refusal(
        tmp_path, "joint.pth", width_rule="fast"
    )
    write_hf_folder(tmp_path / "llm")
    text = refusal(tmp_path, "llm", exit="margin", preprocess=tmp_path / "x")
    assert "preprocess and exit given, but it is no vision transformer" in text


def test_the_list_of_what_is_supported(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "src", config_extra={"model_type": "swin"})
    with pytest.raises(UnsupportedModel, match=r"supported: llama, .*vit, deit, dinov2"):
        convert(tmp_path / "src", tmp_path / "dst")
    write_json(tmp_path / "preprocess.json", PREPROCESS)
    torch.save({"w": torch.ones(2)}, tmp_path / "what.pth")
    assert "no vision transformer" in refusal(tmp_path, "what.pth")
