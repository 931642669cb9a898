"""timm's NaFlexVit checkpoints: the same numbers as a plain ViT's, stored otherwise; refusals."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyruntime.errors import ConversionError
from pyruntime.format.convert import convert
from pyruntime.format.load import read
from tests.checkpoints import State, write_json, write_weights
from tests.format.vision_logits import spec_of
from tests.format.vision_values import check, values
from tests.vision_checkpoints import PREPROCESS, write_pth, write_timm_folder
from tests.vision_states import timm_state


def naflex_state(state: State, grid: tuple[int, int], channels_last: bool = True) -> State:
    """A plain state without positions of prefix rows, as NaFlexVit stores it."""
    made: State = {}
    for name, tensor in state.items():
        if name == "patch_embed.proj.weight":
            tensor = tensor.permute(0, 2, 3, 1) if channels_last else tensor
            made["embeds.proj.weight"] = tensor.flatten(1).contiguous()
        elif name == "pos_embed":
            made["embeds.pos_embed"] = tensor.view(1, *grid, -1)
        elif name in ("cls_token", "reg_token", "patch_embed.proj.bias"):
            made[f"embeds.{name.removeprefix('patch_embed.')}"] = tensor
        else:
            made[name] = tensor
    return made


def small(**shape: Any) -> State:
    whole = {"class_token": False, "fc_norm": True, "registers": 2} | shape
    return naflex_state(timm_state(prefix_positions=False, **whole), (3, 2))


def write_folder(
    folder: Path,
    state: State,
    *,
    architecture: str = "naflexvit_tiny_patch4_gap",
    channels: int = 3,
    **config: Any,
) -> None:
    folder.mkdir()
    described = {**PREPROCESS, "input_size": [channels, 64, 48]}
    described |= {key: (PREPROCESS[key] * 2)[:channels] for key in ("mean", "std")}
    write_json(folder / "config.json", {
        "architecture": architecture, "num_classes": 7, "num_heads": 5, "global_pool": "avg",
        "pretrained_cfg": described, **config,
    })  # fmt: skip
    write_weights(folder, state, "safetensors", 1)


def refusal(source: Path) -> str:
    with pytest.raises(ConversionError) as caught:
        convert(source, source.parent / "dst")
    assert not (source.parent / "dst").exists()
    return str(caught.value)


@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    patch=st.integers(1, 5),
    channels=st.sampled_from([1, 3, 4]),
    channels_last=st.booleans(),
    registers=st.integers(0, 3),
    class_token=st.booleans(),
    layer_scale=st.sampled_from([None, "ls{n}.gamma"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=15)
def test_every_tensor_is_that_of_a_plain_model(
    grid: tuple[int, int],
    patch: int,
    channels: int,
    channels_last: bool,
    registers: int,
    class_token: bool,
    layer_scale: str | None,
    seed: int,
) -> None:
    plain = timm_state(
        patch=patch, image=(grid[0] * patch, grid[1] * patch), channels=channels, seed=seed,
        registers=registers, class_token=class_token, layer_scale=layer_scale, fc_norm=True,
        prefix_positions=False, layers=1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as at:
        state = naflex_state(plain, grid, channels_last)
        arguments = {"patchify_channels_last": channels_last}
        write_folder(Path(at, "src"), state, channels=channels, model_args=arguments)
        convert(Path(at, "src"), Path(at, "dst"), dtype="float32")
        spec = spec_of(check(Path(at, "dst"), plain))
    assert (spec.source_family, spec.pool, spec.norm_eps) == ("timm_naflexvit", "mean", 1e-6)
    assert (spec.grid, spec.position_resize) == (grid, "bicubic_aa")
    assert spec.prefix_tokens == registers + class_token and spec.norm_after_pool


def test_a_class_token_under_wrappers(tmp_path: Path) -> None:
    plain = timm_state(registers=1, prefix_positions=False)
    state = naflex_state(plain, (3, 2))
    write_pth(
        tmp_path / "a.pth", state, prefix="module.", wrapper="state_dict",
        preprocess={"num_heads": 5},
    )  # fmt: skip
    report = convert(tmp_path / "a.pth", tmp_path / "dst", dtype="float32")
    spec = spec_of(check(tmp_path / "dst", plain))
    assert (spec.pool, spec.prefix_tokens, spec.image_size) == ("class", 2, (12, 8))
    assert any("timm's defaults, which no tensor tells" in note for note in report.notes)


def test_the_rule_of_positions(tmp_path: Path) -> None:
    """timm's switch of the antialias; a sidecar that says nothing of it leaves it alone."""
    write_folder(tmp_path / "src", small(), model_args={"pos_embed_antialias": False})
    write_json(tmp_path / "how.json", PREPROCESS)
    convert(tmp_path / "src", tmp_path / "dst", preprocess=tmp_path / "how.json")
    assert spec_of(read(tmp_path / "dst")).position_resize == "bicubic"


def test_what_is_changed_is_changed_as_in_a_plain_model(tmp_path: Path) -> None:
    """Other patches, another size, coarser patches: one path for both."""
    shape = {"class_token": False, "fc_norm": True, "prefix_positions": False}
    write_timm_folder(tmp_path / "plain", config_extra={"global_pool": "avg"}, **shape)
    write_folder(tmp_path / "naflex", naflex_state(timm_state(**shape), (3, 2)))
    options = {"patch_size": 6, "image_size": (24, 36), "scales": "ratio=2"}
    found = []
    for name in ("plain", "naflex"):
        convert(tmp_path / name, tmp_path / f"{name}.out", **options)
        found.append(read(tmp_path / f"{name}.out"))
    one, other = found
    assert spec_of(one) == replace(spec_of(other), source_family="timm_vit")
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.equal(values(tensor), values(other.tensors[name])), name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "naflexvit_base_patch16_par_gap"}, "(pos_embed_ar_preserving) is not"),
        ({"architecture": "naflexvit_base_patch16_parfac_gap"}, "factorized positions is not"),
        ({"architecture": "naflexvit_base_patch16_siglip"}, "siglip is not implemented"),
        ({"architecture": "naflexvit_large_patch16_radio_v3"}, "radio is not implemented"),
        ({"global_pool": "map"}, "global_pool 'map' is not implemented (must be 'token' or 'avg')"),
        ({"global_pool": None, "model_args": {"global_pool": "max"}}, "'max' is not implemented"),
        ({"num_classes": 0}, "num_classes is 0: a backbone without a classifier"),
    ],
)  # fmt: skip
def test_configurations(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    write_folder(tmp_path / "src", small(), **config)
    assert message in refusal(tmp_path / "src")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pos_embed", "factorized"), ("pos_embed", "none"), ("rope_type", "axial"),
        ("rope_type", "mixed"), ("pos_embed_ar_preserving", True), ("attn_type", "eva"),
        ("pos_embed_interp_mode", "bilinear"), ("pos_embed_align_corners", True),
        ("pos_embed_use_grid_sample", True), ("pool_include_prefix", True),
        ("act_layer", "gelu_tanh"), ("norm_layer", "rmsnorm"), ("swiglu_mlp", True),
        ("attn_gated", True), ("num_kv_heads", 1), ("patchify_channels_last", "yes"),
    ],
)  # fmt: skip
def test_arguments_of_the_model(tmp_path: Path, key: str, value: Any) -> None:
    write_folder(tmp_path / "src", small(), model_args={key: value, "reg_tokens": 2})
    assert f"model_args {key} {value!r} is not implemented" in refusal(tmp_path / "src")


def test_all_that_is_wrong_with_a_configuration(tmp_path: Path) -> None:
    wrong = {"pos_embed": "factorized", "rope_type": "dinov3"}
    write_folder(tmp_path / "src", small(), global_pool="map", model_args=wrong)
    text = refusal(tmp_path / "src")
    assert all(what in text for what in ("'map'", "'factorized'", "'dinov3'"))


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize(
    ("drop", "extra", "message"),
    [
        ((), {"attn_pool.latent": (1, 1, 40)}, "attention pooling is not implemented"),
        (("embeds.pos_embed",),
         {"embeds.pos_embed_y": (1, 3, 40), "embeds.pos_embed_x": (1, 2, 40)},
         "factorized positions is not implemented"),
        ((), {"rope.freqs": (2, 3, 8)}, "rotary positions is not implemented"),
        ((), {"embeds.norm.weight": (40,)}, "a norm of the embeddings is not implemented"),
        ((), {"embeds.norm_input.weight": (48,)}, "a norm of the pixels is not implemented"),
        (("embeds.pos_embed",), {}, "embeds.pos_embed is missing, expected a learned grid"),
        ((), {"embeds.pos_embed": (1, 6, 40)}, "embeds.pos_embed is [1, 6, 40], expected"),
        ((), {"embeds.pos_embed": (1, 3, 2, 35)}, "embeds.proj.weight [40, 48], expected [35, 48]"),
        ((), {"embeds.proj.weight": (40, 47)}, "embeds.proj.weight is [40, 47], expected"),
        ((), {"embeds.proj.weight": (40, 3, 4, 5)}, "embeds.proj.weight is [40, 3, 4, 5]"),
        (("fc_norm.weight", "fc_norm.bias"), {}, "missing norm.weight"),
        ((), {"blocks.0.mlp.norm.weight": (52,)}, "unused blocks.0.mlp.norm.weight"),
        (("head.weight",), {}, "no head.weight: a backbone without a classifier"),
    ],
)  # fmt: skip
def test_tensors(
    tmp_path: Path,
    folder: bool,
    drop: tuple[str, ...],
    extra: dict[str, tuple[int, ...]],
    message: str,
) -> None:
    state = {name: tensor for name, tensor in small().items() if name not in drop}
    state |= {name: torch.ones(shape) for name, shape in extra.items()}
    if folder:
        write_folder(tmp_path / "src", state)
        assert message in refusal(tmp_path / "src")
    else:
        write_pth(tmp_path / "a.pth", state, preprocess={"num_heads": 5})
        assert message in refusal(tmp_path / "a.pth")


def test_a_name_that_says_more_than_the_tensors(tmp_path: Path) -> None:
    how = {"num_heads": 5, "architecture": "naflexvit_base_patch16_par_gap"}
    write_pth(tmp_path / "a.pth", small(), preprocess=how)
    assert "pos_embed_ar_preserving" in refusal(tmp_path / "a.pth")


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    state = small()
    state["embeds.proj.weight"][3, 5] = float("inf")
    write_folder(tmp_path / "src", state)
    text = refusal(tmp_path / "src")
    assert "embeds.proj.weight" in text and "NaN, infinity" in text
