"""Vision checkpoints of every family: every number is in the folder, at its place."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from pyruntime.format.convert import convert
from pyruntime.format.load import read
from pyruntime.format.spec import Preprocess, VisionSpec
from tests.checkpoints import write_json
from tests.format.vision_values import check, to_timm
from tests.vision_checkpoints import (
    PREPROCESS,
    read_json,
    write_hf_vision_folder,
    write_jei_dnn,
    write_pth,
    write_timm_folder,
)
from tests.vision_states import t2t_state, timm_state, torchvision_state

SEEN = Preprocess((0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "bilinear", 0.9)


def spec_of(folder: Path) -> VisionSpec:
    spec = read(folder).spec
    assert isinstance(spec, VisionSpec)
    return spec


@pytest.mark.parametrize(
    ("shape", "fields"),
    [
        ({}, {"prefix_tokens": 1, "pool": "class", "image_size": (12, 8)}),
        ({"distilled": True}, {"prefix_tokens": 2, "pool": "distilled"}),
        ({"prefix_positions": False, "layer_scale": "ls{n}.gamma"}, {"prefix_tokens": 1}),
        ({"layer_scale": "gamma_{n}", "files": "bin"}, {"pool": "class"}),
        ({"registers": 4, "prefix_positions": False}, {"prefix_tokens": 5, "pool": "class"}),
        ({"registers": 3}, {"prefix_tokens": 4}),
        ({"fc_norm": True}, {"pool": "mean", "norm_after_pool": True}),
        ({"class_token": False}, {"prefix_tokens": 0, "pool": "mean", "norm_after_pool": False}),
        ({"class_token": False, "registers": 2, "fc_norm": True}, {"prefix_tokens": 2}),
        ({"qk_norm": True, "qkv_bias": False}, {"qk_norm": True, "qkv_bias": False}),
        ({"pre_norm": True, "patch_bias": False}, {"pre_norm": True, "norm_eps": 1e-5}),
        ({"flat_patch": True}, {"patch_size": 4}),
        ({"image": (8, 12), "patch": 2, "hidden": 33, "heads": 3, "mlp": 31}, {"num_heads": 3}),
        ({"layers": 1, "classes": 1}, {"num_layers": 1, "num_classes": 1}),
    ],
)
def test_timm(tmp_path: Path, shape: dict[str, Any], fields: dict[str, Any]) -> None:
    state = write_timm_folder(tmp_path / "src", **shape)
    if shape.get("layer_scale") == "gamma_{n}":
        state = {n.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): t
                 for n, t in state.items()}  # fmt: skip
    convert(tmp_path / "src", tmp_path / "dst")
    spec = check(tmp_path / "dst", state).spec
    assert isinstance(spec, VisionSpec)
    usual: dict[str, Any] = {
        "source_family": "timm_vit", "stem": "patch", "preprocess": SEEN, "norm_eps": 1e-6,
        "hidden_size": 40, "num_heads": 5, "num_layers": 3, "num_classes": 7, "mlp_size": 52,
    }  # fmt: skip
    shape = {"hidden_size": shape.get("hidden", 40), "mlp_size": shape.get("mlp", 52)}
    for name, value in {**usual, **shape, **fields}.items():
        assert getattr(spec, name) == value, name


@given(
    shape=st.fixed_dictionaries({
        "hidden": st.sampled_from([8, 12, 20, 72]), "heads": st.sampled_from([1, 2, 4]),
        "layers": st.integers(1, 3), "patch": st.integers(1, 5), "mlp": st.integers(1, 70),
        "classes": st.integers(1, 40), "channels": st.integers(1, 4), "seed": st.integers(0, 99),
        "class_token": st.booleans(), "distilled": st.booleans(), "registers": st.integers(0, 3),
        "prefix_positions": st.booleans(), "qkv_bias": st.booleans(), "qk_norm": st.booleans(),
        "layer_scale": st.sampled_from([None, "ls{n}.gamma"]), "fc_norm": st.booleans(),
        "pre_norm": st.booleans(), "patch_bias": st.booleans(), "flat_patch": st.booleans(),
    }),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_any_timm(shape: dict[str, Any], grid: tuple[int, int], dtype: torch.dtype) -> None:
    shape["class_token"] |= shape["distilled"]
    image = (grid[0] * shape["patch"], grid[1] * shape["patch"])
    per_channel = {key: [0.5] * shape["channels"] for key in ("mean", "std")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vit.pth"
        state = write_pth(path, timm_state(image=image, **shape), image=image, dtype=dtype,
                          preprocess=per_channel | {"num_heads": shape["heads"]})  # fmt: skip
        convert(path, Path(folder) / "dst")
        check(Path(folder) / "dst", state)


@pytest.mark.parametrize(
    ("architecture", "extra", "heads", "how"),
    [
        ("vit_small_patch16_224", {"num_heads": None}, 6, "of a model called vit_small_patch16"),
        ("vit_base_patch16_224", {"num_heads": None}, 6, "64 channels each, which nothing says"),
        ("deit_tiny_patch16_224", {"num_heads": 12}, 12, "num_heads of"),
        ("vit_small_patch8_8", {"num_heads": None, "model_args": {"num_heads": 4}}, 4, "num_heads"),
    ],
)
def test_timm_heads(
    tmp_path: Path, architecture: str, extra: dict[str, Any], heads: int, how: str
) -> None:
    write_timm_folder(
        tmp_path / "src", architecture=architecture, hidden=384, layers=1, config_extra=extra
    )
    report = convert(tmp_path / "src", tmp_path / "dst")
    assert spec_of(tmp_path / "dst").num_heads == heads
    assert any(f"{heads} heads: {how}" in note for note in report.notes)


def test_timm_config(tmp_path: Path) -> None:
    write_timm_folder(
        tmp_path / "src", config_extra={"global_pool": "avg", "label_names": [*"abcdefg"]}
    )
    config = read_json(tmp_path / "src/config.json")
    # Files of timm before 0.9 have no pretrained_cfg around these keys.
    config |= config.pop("pretrained_cfg") | {"crop_mode": "squash", "crop_pct": 1.0}
    write_json(tmp_path / "src/config.json", config)
    convert(tmp_path / "src", tmp_path / "dst")
    spec = spec_of(tmp_path / "dst")
    assert (spec.pool, spec.norm_after_pool) == ("mean", False)
    assert spec.preprocess == Preprocess(SEEN.mean, SEEN.std, "bilinear", 1.0, squash=True)
    assert spec.labels == tuple("abcdefg")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "state_dict_ema", "net"])
def test_bare_timm(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    state = timm_state(distilled=True)
    path = tmp_path / "src" / "deit.pth"
    write_pth(path, state, image=(12, 8), prefix=prefix, wrapper=wrapper,
              beside={"epoch": 3}, preprocess={"num_heads": 5, "norm_eps": 1e-5})  # fmt: skip
    convert(path, tmp_path / "dst")
    spec = check(tmp_path / "dst", state).spec
    assert isinstance(spec, VisionSpec)
    assert (spec.preprocess, spec.norm_eps, spec.image_size) == (SEEN, 1e-5, (12, 8))


def test_bare_safetensors(tmp_path: Path) -> None:
    """A square grid needs no image_size; --preprocess names the sidecar."""
    state = timm_state(image=(12, 12))
    save_file(state, tmp_path / "vit.safetensors")
    sidecar = tmp_path / "how.json"
    write_json(sidecar, PREPROCESS | {"num_heads": 5})
    convert(tmp_path / "vit.safetensors", tmp_path / "dst", preprocess=sidecar)
    check(tmp_path / "dst", state)
    assert spec_of(tmp_path / "dst").image_size == (12, 12)


def test_the_averaged_weights_come_first(tmp_path: Path) -> None:
    state, other = timm_state(image=(8, 8)), timm_state(image=(8, 8), seed=1)
    path = tmp_path / "vit.pth.tar"
    write_pth(path, state, wrapper="state_dict_ema", beside={"state_dict": other},
              preprocess={"num_heads": 5})  # fmt: skip
    report = convert(path, tmp_path / "dst")
    check(tmp_path / "dst", state)
    assert any("state_dict_ema, state_dict the first is taken" in note for note in report.notes)


@pytest.mark.parametrize("modern", [False, True])
@pytest.mark.parametrize(
    ("model", "shape", "fields"),
    [
        ("vit", {}, {"pool": "class", "prefix_tokens": 1}),
        ("vit", {"qkv_bias": False}, {"qkv_bias": False}),
        ("deit", {}, {"pool": "distilled", "prefix_tokens": 2}),
        ("deit", {"teacher": False}, {"pool": "class", "prefix_tokens": 2}),
        ("dinov2", {}, {"pool": "class_mean", "prefix_tokens": 1}),
        ("dinov2_with_registers", {}, {"pool": "class_mean", "prefix_tokens": 5}),
    ],
)  # fmt: skip
def test_transformers(
    tmp_path: Path, model: str, shape: dict[str, Any], fields: dict[str, Any], modern: bool
) -> None:
    state = write_hf_vision_folder(tmp_path / "src", model, modern=modern, **shape)
    convert(tmp_path / "src", tmp_path / "dst")
    spec = check(tmp_path / "dst", to_timm(state)).spec
    assert isinstance(spec, VisionSpec)
    usual: dict[str, Any] = {
        "source_family": model, "num_heads": 5, "norm_eps": 1e-6, "image_size": (12, 8),
        "labels": tuple(f"class {n}" for n in range(7)),
        "preprocess": Preprocess(SEEN.mean, SEEN.std, "bicubic", 1.0, squash=True),
    }  # fmt: skip
    for name, value in {**usual, **fields}.items():
        assert getattr(spec, name) == value, name


@pytest.mark.parametrize(
    ("processor", "crop", "squash"),
    [
        ({"size": 12}, 1.0, True),
        ({"size": {"shortest_edge": 10}, "do_center_crop": True, "crop_size": 8}, 0.8, False),
        ({"size": {"height": 16, "width": 16}, "do_center_crop": True,
          "crop_size": {"height": 8, "width": 8}}, 0.5, True),
        ({"size": {"shortest_edge": 8}, "do_center_crop": False, "crop_size": 4}, 1.0, False),
    ],
)  # fmt: skip
def test_processors(tmp_path: Path, processor: dict[str, Any], crop: float, squash: bool) -> None:
    write_hf_vision_folder(tmp_path / "src", "vit", processor=processor | {"do_normalize": False})
    convert(tmp_path / "src", tmp_path / "dst")
    seen = spec_of(tmp_path / "dst").preprocess
    assert seen == Preprocess((0.0,) * 3, (1.0,) * 3, "bicubic", crop, squash)


def test_a_processor_for_other_sizes_is_told(tmp_path: Path) -> None:
    settings = {"size": {"shortest_edge": 6}, "do_center_crop": True, "crop_size": 6}
    write_hf_vision_folder(tmp_path / "src", "dinov2", processor=settings)
    report = convert(tmp_path / "src", tmp_path / "dst")
    assert any("takes images of 6 pixels" in note and "12 x 8" in note for note in report.notes)


def test_a_sidecar_replaces_the_processor(tmp_path: Path) -> None:
    write_hf_vision_folder(tmp_path / "src", "vit")
    (tmp_path / "src/preprocessor_config.json").unlink()
    write_json(tmp_path / "how.json", PREPROCESS)
    convert(tmp_path / "src", tmp_path / "dst", preprocess=tmp_path / "how.json")
    assert spec_of(tmp_path / "dst").preprocess == SEEN


@pytest.mark.parametrize("shape", [{}, {"hidden": 64, "layers": 4, "mlp": 33, "classes": 3}])
@pytest.mark.parametrize("image", [(32, 32), (48, 16)])
def test_t2t(tmp_path: Path, shape: dict[str, Any], image: tuple[int, int]) -> None:
    path = tmp_path / "src" / "t2t.pth.tar"
    square = image[0] == image[1]
    state = write_pth(path, t2t_state(image=image, exits=0, **shape), wrapper="state_dict_ema",
                      image=None if square else image)  # fmt: skip
    convert(path, tmp_path / "dst")
    spec = check(tmp_path / "dst", state).spec
    assert isinstance(spec, VisionSpec)
    width = shape.get("hidden", 128)
    assert (spec.stem, spec.patch_size, spec.num_heads) == ("t2t", 16, width // 64)
    assert (spec.image_size, spec.norm_eps, spec.qkv_bias) == (image, 1e-5, False)


@pytest.mark.parametrize("split", [False, True])
def test_torchvision(tmp_path: Path, split: bool) -> None:
    path = tmp_path / "vit.pth"
    state = write_pth(path, torchvision_state(split=split), preprocess={"num_heads": 5})
    convert(path, tmp_path / "dst")
    spec = check(tmp_path / "dst", to_timm(state)).spec
    assert isinstance(spec, VisionSpec)
    assert (spec.source_family, spec.norm_eps, spec.width) == ("torchvision_vit", 1e-6, None)


def test_torchvision_before_0_13(tmp_path: Path) -> None:
    state = torchvision_state()
    renamed = {n.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): tensor
               for n, tensor in state.items()}  # fmt: skip
    write_pth(tmp_path / "vit.pth", renamed, preprocess={"num_heads": 5})
    convert(tmp_path / "vit.pth", tmp_path / "dst")
    check(tmp_path / "dst", to_timm(state))


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_dtypes(tmp_path: Path, source: torch.dtype, dtype: Any) -> None:
    """Heads, gates and the stem of a T2T-ViT stay float32; all else has the model's dtype."""
    state = write_jei_dnn(tmp_path / "a.pth", dtype=source)
    report = convert(tmp_path / "a.pth", tmp_path / "dst", dtype=dtype)
    plain = "float32" if source == torch.float32 else "bfloat16"
    assert report.spec.dtype == (plain if dtype == "auto" else dtype)
    container = check(tmp_path / "dst", state)
    names = ("stem.layers.0.kqv.weight", "stem.project.weight", "head.weight",
             "exits.0.head.weight")  # fmt: skip
    for name in names:
        assert container.tensors[name].dtype == torch.float32
    matrix = container.tensors["layers.0.mlp.up.weight"]
    assert matrix.dtype == getattr(torch, report.spec.dtype)


def test_layer_scale_is_folded_before_rounding(tmp_path: Path) -> None:
    state = write_timm_folder(tmp_path / "src", layer_scale="ls{n}.gamma")
    convert(tmp_path / "src", tmp_path / "dst", dtype="bfloat16")
    check(tmp_path / "dst", state)


def test_unused_parts_of_real_checkpoints_are_left_out(tmp_path: Path) -> None:
    extra = {"mask_token": torch.ones(1, 1, 40), "pre_logits.fc.weight": torch.ones(40, 40)}
    state = write_timm_folder(tmp_path / "src", extra=extra)
    convert(tmp_path / "src", tmp_path / "dst")
    check(tmp_path / "dst", state)
