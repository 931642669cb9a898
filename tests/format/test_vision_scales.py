"""Conversions that give a vision transformer scales, or blocks that drop or merge rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.cli import main
from pyruntime.errors import ConversionError, UnsupportedModel
from pyruntime.format.convert import convert
from pyruntime.format.inspect import describe
from pyruntime.format.spec import ReductionSpec, ScaleSpec
from tests.checkpoints import State
from tests.format.vision_logits import spec_of
from tests.format.vision_values import check, to_timm
from tests.vision_checkpoints import (
    write_hf_vision_folder,
    write_msvit,
    write_pth,
    write_timm_folder,
)
from tests.vision_states import apt_state, dynamicvit_state, timm_state


def refusal(source: Path, **options: Any) -> str:
    with pytest.raises(ConversionError) as caught:
        convert(source, source.parent / "dst", **options)
    assert not (source.parent / "dst").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("ratio=2", {"ratios": (2,)}),
        ("ratio=2/4", {"ratios": (2, 4)}),
        ("ratio=3", {"ratios": (3,)}),
        ("ratio=2/4,source=entropy,thresholds=5.5/4",
         {"ratios": (2, 4), "source": "entropy", "thresholds": (5.5, 4.0)}),
        ("source=quadtree,positions=sinusoidal,ratio=2",
         {"ratios": (2,), "source": "quadtree", "positions": "sinusoidal"}),
        ("ratio=2, embed=shared, resize=bilinear, pool_weight=area, positions=bicubic_aa",
         {"ratios": (2,), "resize": "bilinear", "pool_weight": "area", "positions": "bicubic_aa"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("model", ["timm", "vit"])
def test_scales_of_a_plain_model(
    tmp_path: Path, model: str, text: str, fields: dict[str, Any]
) -> None:
    """No tensor is added; by default every patch is fine."""
    state: State
    if model == "timm":
        state = write_timm_folder(tmp_path / "src", image=(48, 48))
    else:
        state = to_timm(write_hf_vision_folder(tmp_path / "src", model, image=(48, 48)))
    convert(tmp_path / "src", tmp_path / "dst", scales=text)
    spec = spec_of(check(tmp_path / "dst", state))
    assert spec.scales == ScaleSpec(**({"source": "all_fine"} | fields))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not one of ratio=, thresholds=, source=, "),
        ("source=random", "ratio is missing"),
        ("ratio=2,source=magic", "source 'magic' is not known (known: learned, variance, "),
        ("ratio=2,positions=nearest", "positions 'nearest' is not known (known: area, "),
        ("ratio=2,ratio=4", "ratio is given twice"),
        ("ratio=two", "ratio 'two': expected int numbers joined by /"),
        ("ratio=2,thresholds=nan", "thresholds 'nan': expected float numbers joined by /"),
        ("ratio=2,gate=x", "'gate=x' is not one of ratio="),
        ("ratio=2,source", "'source' is not one of"),
        ("ratio=4/2", "ratios must rise and divide one another, are [4, 2]"),
        ("ratio=1", "ratios must rise and divide one another, are [1]"),
        ("ratio=2,source=learned", "source 'learned' needs a gate"),
        ("ratio=2,source=entropy", "source 'entropy' needs a threshold for each of [2]"),
        ("ratio=2,embed=separate", "embed 'separate', but the tensors are those of 'shared'"),
        ("ratio=2,embed=conv", "embed 'conv', but the tensors are those of 'shared'"),
        ("ratio=5", "coarse patches of 20 do not tile (16, 16)"),
    ],
)
def test_scales_refusals(tmp_path: Path, text: str, message: str) -> None:
    write_timm_folder(tmp_path / "src", image=(16, 16))
    assert message in refusal(tmp_path / "src", scales=text)


def test_options_of_vision_models_alone(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1)}, tmp_path / "a.pt")
    options = {"scales": "ratio=2", "reduce": "tome:1", "image_size": 8, "patch_size": 2}
    text = refusal(tmp_path / "a.pt", **options)
    assert "image_size and patch_size and scales and reduce given, but it is no vision" in text


def test_keys_of_containers_in_other_sidecars(tmp_path: Path) -> None:
    write_pth(tmp_path / "a.pth", timm_state(), image=(12, 8),
              preprocess={"num_heads": 5, "ratio": 2, "coarse_pos": "area"})  # fmt: skip
    text = refusal(tmp_path / "a.pth")
    assert "preprocess.json: ratio, coarse_pos are of MSViT checkpoints, which this is not" in text


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("prefix", ["net.", "net._orig_mod.", ""])
def test_apt(tmp_path: Path, prefix: str, trained: bool) -> None:
    """Lightning's file of the released code, whose module of mixed patches shares parameters."""
    state = apt_state(trained=trained, image=(16, 16))
    write_pth(tmp_path / "last.ckpt.pth", state, wrapper="state_dict", prefix=prefix,
              beside={"epoch": 3, "pytorch-lightning_version": "2.4"},
              preprocess={"num_heads": 5})  # fmt: skip
    convert(tmp_path / "last.ckpt.pth", tmp_path / "dst", scales="ratio=2/4,thresholds=5.5/4.0")
    if trained:
        state["cls_token"] = state.pop("mixed_patch.cls_token")
    spec = spec_of(check(tmp_path / "dst", state))
    assert spec.source_family == "apt"
    assert spec.scales == ScaleSpec(
        (2, 4), embed="conv", resize="bilinear", positions="bicubic_aa", source="entropy",
        thresholds=(5.5, 4.0),
    )  # fmt: skip


def test_apt_refusals(tmp_path: Path) -> None:
    path, said = tmp_path / "a.pth", {"num_heads": 5}
    state = apt_state(image=(16, 16))
    write_pth(path, state, preprocess=said)
    with pytest.raises(UnsupportedModel, match=r"scales are needed \(such as ratio=2,thresholds"):
        convert(path, tmp_path / "dst")
    assert "needs a threshold for each of [2]" in refusal(path, scales="ratio=2")
    assert "needs powers of two, ratios are [3]" in refusal(path, scales="ratio=3,thresholds=5")
    text = refusal(path, scales="ratio=2,thresholds=5,embed=shared")
    assert "embed 'shared', but the tensors are those of 'conv'" in text
    options = {"scales": "ratio=2,thresholds=5", "patch_size": 8}
    assert "only the kernel of a plain ViT can be resized" in refusal(path, **options)
    altered = state["pos_embed"].clone()
    altered[0, -1, -1] += 1
    write_pth(path, state | {"mixed_patch.base_pos_embed": altered}, preprocess=said)
    text = refusal(path, scales="ratio=2,thresholds=5")
    assert "contradicting mixed_patch.base_pos_embed: differs from pos_embed" in text
    write_pth(path, state, preprocess=said, drop=("mixed_patch.zero_conv.bias",))
    assert "missing mixed_patch.zero_conv.bias [40]" in refusal(path, scales="ratio=2,thresholds=5")
    for shape in ({"registers": 2}, {"prefix_positions": False}):
        write_pth(path, apt_state(image=(16, 16), **shape), preprocess=said)
        assert "(one with one is: the class token)" in refusal(path, scales="ratio=2,thresholds=5")


@pytest.mark.parametrize(
    ("text", "layers", "reduction"),
    [
        ("tome:3", 3, ReductionSpec("tome", (0, 1, 2), merge=(3, 3, 3))),
        ("tome:2+mae", 2, ReductionSpec("tome", (0, 1), merge=(2, 2), proportional=False)),
        ("evit:0.7", 12, ReductionSpec("evit", (3, 6, 9), keep=(0.7,) * 3)),
        ("evit:0.5+fuse", 4, ReductionSpec("evit", (1, 2, 3), keep=(0.5,) * 3, fuse=True)),
    ],
)
def test_reduction(tmp_path: Path, text: str, layers: int, reduction: ReductionSpec) -> None:
    """EViT's code resizes positions without antialias; what merges or drops has no tensors."""
    state = write_timm_folder(tmp_path / "src", layers=layers)
    convert(tmp_path / "src", tmp_path / "dst", reduce=text)
    spec = spec_of(check(tmp_path / "dst", state))
    assert spec.reduction == reduction
    rule = "bicubic" if text.startswith("evit") else "bicubic_aa"
    assert spec.position_resize == rule


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dynamicvit(tmp_path: Path, dtype: Any) -> None:
    state = write_pth(tmp_path / "a.pth", dynamicvit_state(layers=12), wrapper="model",
                      image=(12, 8), preprocess={"num_heads": 5})  # fmt: skip
    convert(tmp_path / "a.pth", tmp_path / "dst", reduce="dynamicvit:0.7", dtype=dtype)
    container = check(tmp_path / "dst", state)
    spec = spec_of(container)
    assert spec.reduction == ReductionSpec("dynamicvit", (3, 6, 9), keep=(0.7, 0.7**2, 0.7**3))
    for name in ("reduce.0.in.weight", "reduce.2.out.0.weight", "reduce.1.out.2.weight"):
        assert container.tensors[name].dtype == torch.float32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prune:3", "no method 'prune' (one of tome, evit, dynamicvit)"),
        ("tome", "'' is not a whole number of pairs"),
        ("tome:1.5", "'1.5' is not a whole number of pairs"),
        ("tome:-1", "merge must be 0 or more"),
        ("evit:x", "'x' is not a share of the rows"),
        ("evit:1.5", "keep must be in (0, 1]"),
        ("evit:0.5+mae", "no option 'mae' (evit has +fuse)"),
        ("tome:1+fuse", "no option 'fuse' (tome has +mae)"),
        ("dynamicvit:0.5+fuse", "no option 'fuse' (dynamicvit has none)"),
        ("evit:0.5", "blocks must rise, are [0, 1, 1] (a model of 2 blocks)"),
    ],
)
def test_reduction_refusals(tmp_path: Path, text: str, message: str) -> None:
    write_timm_folder(tmp_path / "src", layers=2)
    assert message in refusal(tmp_path / "src", reduce=text)


def test_predictors_and_what_is_asked_for_must_meet(tmp_path: Path) -> None:
    said = {"num_heads": 5}
    write_pth(tmp_path / "a.pth", dynamicvit_state(layers=4), image=(12, 8), preprocess=said)
    for options in ({}, {"reduce": "tome:1"}):
        text = refusal(tmp_path / "a.pth", **options)
        assert "reduce=dynamicvit:SHARE is needed (such as 0.7)" in text
    state = dynamicvit_state(layers=4, stages=2)
    write_pth(tmp_path / "a.pth", state, image=(12, 8), preprocess=said)
    text = refusal(tmp_path / "a.pth", reduce="dynamicvit:0.5")
    assert "missing score_predictor.2.in_conv.1.weight [40, 40]" in text
    write_timm_folder(tmp_path / "plain", layers=4)
    text = refusal(tmp_path / "plain", reduce="dynamicvit:0.5")
    assert "missing score_predictor.0.in_conv.0.weight [40]" in text


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (["--scales", "ratio=2/4,source=entropy,thresholds=5.5/4,pool_weight=area"],
         ["patches of 8, 16 and 4, chosen by entropy (below 5.5 4)", "weighs them by area",
          "resized (area) into the same projection, positions area", "with 3 scales"]),
        (["--reduce", "tome:2+mae"],
         ["tome: 2 pairs merged in each of 4 blocks, keys count once", "token reduction by tome"]),
        (["--reduce", "evit:0.7+fuse"],
         ["evit: keeps 0.7 0.7 0.7 after the attention of blocks 1 2 3, the others fused into one",
          "at other sizes resized bicubic without antialias"]),
        (["--image-size", "32,32", "--patch-size", "8"], ["32 x 32, patches of 8: 1 + 16 tokens"]),
    ],
)  # fmt: skip
def test_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], texts: list[str]
) -> None:
    write_timm_folder(tmp_path / "src", image=(16, 16), layers=4)
    assert main(["convert", str(tmp_path / "src"), str(tmp_path / "dst"), *options]) == 0
    assert main(["inspect", str(tmp_path / "dst")]) == 0
    out = capsys.readouterr().out
    for text in (*texts, " ".join(options)):
        assert text in out
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "src"), str(tmp_path / "x"), "--image-size", "8x8"])


def test_inspect_of_other_embeddings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pth(tmp_path / "a.pth", apt_state(image=(16, 16)), preprocess={"num_heads": 5})
    convert(tmp_path / "a.pth", tmp_path / "apt", scales="ratio=2,thresholds=5.5")
    write_msvit(tmp_path / "b.safetensors", metadata={"coarse_embed": "separate"}, separate=8)
    convert(tmp_path / "b.safetensors", tmp_path / "msvit", preprocess=None)
    for name, text in (
        ("apt", "(bilinear), with a convolution over the finest, positions bicubic"),
        ("msvit", "with a projection of their own on all pixels, positions area"),
    ):
        assert main(["inspect", str(tmp_path / name)]) == 0
        assert text in capsys.readouterr().out


def test_every_row_is_counted_once(tmp_path: Path) -> None:
    """The parts that `inspect` tells add up, whatever has tensors of its own."""
    write_msvit(tmp_path / "b.safetensors", metadata={"coarse_embed": "separate"}, separate=8)
    convert(tmp_path / "b.safetensors", tmp_path / "dst")
    count = describe(tmp_path / "dst")["parameters"]
    assert count["gates"] == 192 * 11 + 11 + 11 * 6 + 6 + 6 + 1 + 2 * 17 + 2 * 11
    assert count["stem"] == 48 * 40 + 40 + 192 * 40 + 40
