"""MSViT containers: the golden one, every shape of a gate, and all that is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pyruntime.cli import main
from pyruntime.errors import ConversionError, UnsupportedModel
from pyruntime.format.convert import convert
from pyruntime.format.load import read
from pyruntime.format.spec import Preprocess, ScaleGateSpec, ScaleSpec
from pyruntime.format.spec.positions import resize_positions
from tests.checkpoints import write_json
from tests.format.vision_logits import gate_logits, logits, spec_of
from tests.format.vision_values import check, values
from tests.vision_checkpoints import METADATA, PREPROCESS, write_msvit
from tests.vision_states import msvit_state

DATA = Path(__file__).resolve().parents[1] / "data"
GOLDEN = DATA / "msvit_digits_r4.safetensors"


def test_golden(tmp_path: Path) -> None:
    """The trained container: every number, and the answers that were recorded with it."""
    report = convert(GOLDEN, tmp_path / "dst")
    state = load_file(GOLDEN)
    spec = spec_of(check(tmp_path / "dst", state))
    assert spec.scales == ScaleSpec((4,), gate=ScaleGateSpec((64, 64, 32), True, True, 0.0))
    assert (spec.num_heads, spec.norm_eps, spec.image_size) == (3, 1e-6, (64, 64))
    assert spec.preprocess == Preprocess((0.5,) * 3, (0.5,) * 3, "bicubic")
    assert any("does not say how images are resized" in note for note in report.notes)
    golden = load_file(DATA / "vectors.safetensors")
    images = golden["images_u8_nhwc"].permute(0, 3, 1, 2).float() / 127.5 - 1
    gated = gate_logits(tmp_path / "dst", images)
    torch.testing.assert_close(gated, golden["gate_logits"], rtol=0, atol=1e-4)
    assert torch.equal(gated > 0, golden["gate_logits"] > 0)
    found = logits(tmp_path / "dst", images)
    torch.testing.assert_close(found, golden["logits_all_fine"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "metadata", "scales"),
    [
        ({}, {}, {}),
        ({"norms": False, "positions": False}, {},
         {"gate": ScaleGateSpec((11, 6), threshold=0.25)}),
        ({"widths": (7,)}, {}, {"gate": ScaleGateSpec((7,), True, True, 0.25)}),
        ({"widths": (5, 9, 4, 3), "norms": False}, {"gate_threshold": "-1.5"},
         {"gate": ScaleGateSpec((5, 9, 4, 3), False, True, -1.5)}),
        ({"separate": 4}, {"coarse_embed": "separate"}, {"embed": "separate", "kernel": "patch"}),
        ({"separate": 8}, {"coarse_embed": "separate"}, {"embed": "separate", "kernel": "region"}),
        ({"separate": 8, "patch_bias": False}, {"coarse_embed": "separate"},
         {"embed": "separate", "kernel": "region"}),
        ({}, {"coarse_embed": "bilinear_resize_shared"}, {"resize": "bilinear"}),
        ({}, {"coarse_pos": "bilinear"}, {"positions": "bilinear"}),
        ({}, {"coarse_pos": "bicubic_aa"}, {"positions": "bicubic_aa"}),
        ({}, {"pool_weight": "r2"}, {"pool_weight": "area"}),
        ({}, {"pool_weight": "area"}, {"pool_weight": "area"}),
        ({}, {"pool_weight": "1"}, {}),
        ({}, {"pool_weight": None, "ratio": None, "patch": None, "embed_dim": None}, {}),
        ({"image": (16, 16)}, {"img_size": "16"}, {}),
        ({"image": (16, 16)}, {"img_size": None}, {}),
        ({"ratio": 3, "image": (24, 12)}, {"img_size": "24,12", "ratio": "3"}, {"ratios": (3,)}),
        ({"registers": 2, "distilled": True},
         {"token_order": "cls,dist,reg,coarse_raster,fine_raster"}, {}),
        ({"class_token": False}, {"token_order": "coarse_raster,fine_raster"}, {}),
        ({"layer_scale": "ls{n}.gamma", "fc_norm": True}, {}, {}),
    ],
)  # fmt: skip
def test_shapes(
    tmp_path: Path, shape: dict[str, Any], metadata: dict[str, Any], scales: dict[str, Any]
) -> None:
    state = write_msvit(tmp_path / "a.safetensors", metadata=metadata, **shape)
    convert(tmp_path / "a.safetensors", tmp_path / "dst")
    spec = spec_of(check(tmp_path / "dst", state))
    usual: dict[str, Any] = {"ratios": (2,), "gate": ScaleGateSpec((11, 6), True, True, 0.25)}
    assert spec.scales == ScaleSpec(**(usual | scales))
    assert (spec.source_family, spec.num_heads) == ("msvit", 5)
    assert spec.preprocess == Preprocess((0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "bicubic")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gates_stay_float32(tmp_path: Path, dtype: Any) -> None:
    state = write_msvit(tmp_path / "a.safetensors", separate=8,
                        metadata={"coarse_embed": "separate"})  # fmt: skip
    convert(tmp_path / "a.safetensors", tmp_path / "dst", dtype=dtype)
    tensors = check(tmp_path / "dst", state).tensors
    for name in ("gate.fc0.weight", "gate.fc2.weight", "gate.norm1.bias", "gate.positions"):
        assert tensors[name].dtype == torch.float32
    assert tensors["coarse.0.weight"].dtype == getattr(torch, dtype)


def test_a_folder_with_one(tmp_path: Path) -> None:
    state = write_msvit(tmp_path / "src/model.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "src/other.safetensors")
    convert(tmp_path / "src", tmp_path / "dst")
    check(tmp_path / "dst", state)
    write_msvit(tmp_path / "src/second.safetensors")
    with pytest.raises(ConversionError, match=r"2 MSViT containers: model\.safetensors, sec"):
        convert(tmp_path / "src", tmp_path / "again")


@pytest.mark.parametrize(
    "order", ["cls,fine_raster,coarse_raster", "fine_raster,coarse_raster,cls"]
)
def test_another_order_is_told(tmp_path: Path, order: str) -> None:
    write_msvit(tmp_path / "a.safetensors", metadata={"token_order": order, "trained_by": "me"})
    report = convert(tmp_path / "a.safetensors", tmp_path / "dst")
    assert any(f"token_order {order}: rows are kept as" in note for note in report.notes)
    assert any("metadata trained_by 'me' is not known and was not read" in n for n in report.notes)


def given_by_hand() -> dict[str, Any]:
    """METADATA in the words of preprocess.json."""
    words = ("token_order", "coarse_embed", "coarse_pos", "gate_input", "gate_positive", "act")
    return {
        **PREPROCESS, **{key: METADATA[key] for key in words}, "image_size": [16, 8],
        "num_heads": 5, "norm_eps": 1e-6, "gate_threshold": 0.25, "ratio": 2, "patch": 4,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_a_sidecar_says_what_no_metadata_does(tmp_path: Path, name: str) -> None:
    state = msvit_state()
    if name == "a.pth":
        torch.save({"model": state}, tmp_path / name)
    else:
        save_file(state, tmp_path / name)
    write_json(tmp_path / "preprocess.json", given_by_hand() | {"labels": [*"abcdefg"]})
    convert(tmp_path / name, tmp_path / "dst")
    spec = spec_of(check(tmp_path / "dst", state))
    assert spec.scales == ScaleSpec((2,), gate=ScaleGateSpec((11, 6), True, True, 0.25))
    assert (spec.preprocess.interpolation, spec.preprocess.crop) == ("bilinear", 0.9)
    assert spec.labels == (*"abcdefg",)


def test_a_sidecar_completes_the_metadata(tmp_path: Path) -> None:
    write_msvit(tmp_path / "a.safetensors", metadata={"coarse_pos": None, "num_heads": None})
    more = {"coarse_pos": "bilinear", "num_heads": 5, "interpolation": "bilinear", "norm_eps": 1e-6}
    write_json(tmp_path / "how.json", more)
    report = convert(tmp_path / "a.safetensors", tmp_path / "dst", preprocess=tmp_path / "how.json")
    spec = spec_of(read(tmp_path / "dst"))
    assert spec.scales is not None and spec.scales.positions == "bilinear"
    assert spec.preprocess.interpolation == "bilinear"
    assert not report.notes


@pytest.mark.parametrize("by", ["option", "sidecar"])
def test_another_image_size(tmp_path: Path, by: str) -> None:
    """Positions of the backbone and of the gate are resized by one rule, each on its grid."""
    state = write_msvit(tmp_path / "a.safetensors")
    options: dict[str, Any] = {"image_size": (8, 24)}
    if by == "sidecar":
        options = {}
        write_json(tmp_path / "preprocess.json", {"image_size": [8, 24]})
    report = convert(tmp_path / "a.safetensors", tmp_path / "dst", **options)
    tensors = read(tmp_path / "dst").tensors
    learned = state["pos_embed"][0, 1:], state["msvit.gate.pos_embed"][0]
    wanted = resize_positions(learned[0], (4, 2), (2, 6), "bicubic_aa")
    assert torch.equal(values(tensors["positions"]), wanted)
    wanted = resize_positions(learned[1], (2, 1), (1, 3), "bicubic_aa")
    assert torch.equal(values(tensors["gate.positions"]), wanted)
    assert any("resized from 4 x 2 to 2 x 6 patches (bicubic with" in n for n in report.notes)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "msvit-2"}, "format 'msvit-2' is not known (known: msvit-1)"),
        ({"format": "MSViT"}, "format 'MSViT' is not known (known: msvit-1)"),
        ({"token_order": "cls,region_major"}, "token_order 'cls,region_major' is not known (kno"),
        ({"token_order": "cls,coarse_raster"}, "token_order 'cls,coarse_raster' is not known"),
        ({"token_order": "cls,cls,coarse_raster,fine_raster"}, "is not known (known: cls,coarse"),
        ({"gate_input": "mean_rgb"}, "'mean_rgb' is not known (known: normalized_rgb_coarse_patch"),
        ({"gate_positive": "fine"}, "gate_positive 'fine' is not known (known: coarse)"),
        ({"coarse_embed": "crop"}, "coarse_embed 'crop' is not known (known: area_resize_shared, "),
        ({"coarse_pos": "nearest"}, "'nearest' is not known (known: area, bilinear, bicubic_aa)"),
        ({"act": "relu"}, "act 'relu' is not known (known: gelu, gelu_erf)"),
        ({"pool_weight": "2"}, "pool_weight '2' is not known (known: token, area, 1, r2)"),
        ({"gate_threshold": "nan"}, "metadata gate_threshold 'nan': expected a number"),
        ({"ratio": "2.5"}, "metadata ratio '2.5': expected a positive whole number"),
        ({"img_size": "16,8,3"}, "metadata img_size '16,8,3': expected a side, or height,width"),
        ({"mean": "0.5;0.5"}, "metadata mean '0.5;0.5': expected numbers joined by commas"),
        ({"std": "0.5,0.5"}, "mean (0.5, 0.4, 0.3) and std (0.5, 0.5) need a number per channel"),
        ({"num_heads": "7"}, "7 heads do not divide 40 channels"),
        ({"interpolation": "nearest"}, "interpolation 'nearest' is not implemented"),
        ({"patch": "8"}, "metadata patch is 8, the tensors have 4"),
        ({"embed_dim": "48"}, "metadata embed_dim is 48, the tensors have 40"),
        ({"depth": "4"}, "metadata depth is 4, the tensors have 3"),
        ({"mlp_ratio": "4"}, "metadata mlp_ratio is 4, the tensors have 1.3"),
        ({"img_size": "8,24"}, "img_size is 8 x 24, 2 x 6 patches of 4; pos_embed has 9 rows"),
        ({"ratio": "4"}, "msvit.gate.fc0.weight reads 192 numbers, expected 768: 3 channels of 16 "
                         "x 16 pixels, ratio 4 times patch 4"),
        ({"coarse_embed": "separate"}, "missing msvit.coarse_embed.proj.weight"),
    ],
)  # fmt: skip
def test_metadata_refusals(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    write_msvit(tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(ConversionError) as caught:
        convert(tmp_path / "a.safetensors", tmp_path / "dst")
    assert message in str(caught.value)
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    "key",
    ["mean", "std", "num_heads", "ln_eps", "act", "token_order", "coarse_embed", "coarse_pos",
     "gate_input", "gate_positive", "gate_threshold"],
)  # fmt: skip
def test_every_needed_key(tmp_path: Path, key: str) -> None:
    write_msvit(tmp_path / "a.safetensors", metadata={key: None})
    with pytest.raises(
        ConversionError, match=f"no metadata {key}.* is needed in a preprocess.json"
    ):
        convert(tmp_path / "a.safetensors", tmp_path / "dst")


def test_all_problems_at_once(tmp_path: Path) -> None:
    wrong = {"act": "relu", "coarse_pos": "nearest", "patch": "x", "num_heads": None}
    write_msvit(tmp_path / "a.safetensors", metadata=wrong)
    with pytest.raises(ConversionError) as caught:
        convert(tmp_path / "a.safetensors", tmp_path / "dst")
    assert len(str(caught.value).splitlines()) == 4


@pytest.mark.parametrize(
    ("sidecar", "message"),
    [
        ({"ratio": 4}, "metadata ratio is 2, "),
        ({"mean": [0.5, 0.5, 0.5]}, "metadata mean is [0.5, 0.4, 0.3], "),
        ({"norm_eps": 1e-5}, "metadata norm_eps is 1e-06, "),
        ({"coarse_embed": "separate"}, "metadata coarse_embed is 'area_resize_shared', "),
        ({"ratio": "2"}, "metadata ratio is 2, "),
        ({"gate_treshold": 1.0}, "unknown key 'gate_treshold', nearest: 'gate_threshold'"),
    ],
)
def test_sidecar_refusals(tmp_path: Path, sidecar: dict[str, Any], message: str) -> None:
    write_msvit(tmp_path / "a.safetensors")
    write_json(tmp_path / "preprocess.json", sidecar)
    with pytest.raises(ConversionError) as caught:
        convert(tmp_path / "a.safetensors", tmp_path / "dst")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "metadata", "message"),
    [
        ({"extra": {"msvit.gate.pos_embed": torch.ones(1, 4, 11)}}, {},
         "msvit.gate.pos_embed has 4 rows, expected one for each of 4 x 2 patches by 2 x 2: 2 x 1"),
        ({"extra": {"msvit.gate.fc0.weight": torch.ones(11, 190)}}, {"ratio": None},
         "reads 190 numbers, which are not 3 channels of a square of patches of 4 pixels"),
        ({"extra": {"msvit.gate.fc0.weight": torch.ones(11, 48)}}, {"ratio": None},
         "reads 48 numbers, which are not 3 channels"),
        ({"extra": {"msvit.gate.fc0.weight": torch.ones(11)}}, {},
         "misshapen msvit.gate.fc0.weight [11], expected 2 axes"),
        ({"extra": {"msvit.gate.fc2.weight": torch.ones(2, 6)}}, {},
         "misshapen msvit.gate.fc2.weight [2, 6], expected [1, 6]"),
        ({"extra": {"msvit.gate.fc1.weight": torch.ones(6, 10)}}, {},
         "misshapen msvit.gate.fc1.weight [6, 10], expected [6, 11]"),
        ({"drop": ("msvit.gate.fc1.weight",)}, {}, "missing msvit.gate.fc1.weight"),
        ({"drop": ("msvit.gate.norm1.bias",)}, {}, "missing msvit.gate.norm1.bias [6]"),
        ({"extra": {"msvit.gate.scale": torch.ones(1)}}, {}, "unused msvit.gate.scale [1]"),
        ({"widths": ()}, {}, "a gate of 1 layers (msvit.gate.fc0.weight, …) is not implemented"),
        ({"separate": 4}, {}, "coarse_embed is 'area_resize_shared', but there is msvit.coarse"),
        ({"separate": 6}, {"coarse_embed": "separate"},
         "is [40, 3, 6, 6], expected a kernel of 4 or 8 pixels"),
        ({"image": (16, 12)}, {"img_size": "16,12"}, "1.5: 2 x 1.5"),
        ({"image": (16, 12), "positions": False}, {"img_size": "16,12"},
         "coarse patches of 8 do not tile (16, 12)"),
        ({"drop": ("head.weight",)}, {}, "no head.weight: a backbone without a classifier"),
    ],
)  # fmt: skip
def test_tensor_refusals(
    tmp_path: Path, shape: dict[str, Any], metadata: dict[str, Any], message: str
) -> None:
    write_msvit(tmp_path / "a.safetensors", metadata=metadata, **shape)
    with pytest.raises(ConversionError) as caught:
        convert(tmp_path / "a.safetensors", tmp_path / "dst")
    assert message in str(caught.value).replace("by 2 x 2: 2 x 1.5", "1.5: 2 x 1.5")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": "ratio=2"}, "scales given, but the checkpoint has its own"),
        ({"patch_size": 8}, "patch_size 8 given, but its patches have 4 pixels, and only"),
        ({"image_size": (16, 12)}, "coarse patches of 8 do not tile (16, 12)"),
        ({"reduce": "tome:1"}, "mixed scales together with token reduction are not implemented"),
    ],
)
def test_option_refusals(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    write_msvit(tmp_path / "a.safetensors")
    with pytest.raises(ConversionError) as caught:
        convert(tmp_path / "a.safetensors", tmp_path / "dst", **options)
    assert message in str(caught.value)


def test_another_version_is_refused_whatever_it_holds(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "a.safetensors", {"format": "msvit-9"})
    with pytest.raises(UnsupportedModel, match="format 'msvit-9' is not known"):
        convert(tmp_path / "a.safetensors", tmp_path / "dst")


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(GOLDEN), str(tmp_path / "dst"), "--image-size", "96,64"]) == 0
    assert "with 2 scales" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "dst")]) == 0
    out = capsys.readouterr().out
    for text in (
        "patches of 16 and 4, chosen by learned", "of widths 64, 64, 32, layer norms, positions",
        "coarse above 0", "resized bicubic with antialias", "96 x 64, patches of 4: 1 + 384 tokens",
        "--image-size 96,64",
    ):  # fmt: skip
        assert text in out


def test_golden_metadata_is_of_its_format() -> None:
    with safe_open(GOLDEN, "pt") as file:
        assert file.metadata()["format"] == METADATA["format"]
