"""Conversions that change a vision transformer: image and patch sizes, scales, token reduction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pyruntime.errors import ConversionError
from pyruntime.format.convert import Report, convert
from pyruntime.format.convert.kernels import resize_matrix
from pyruntime.format.load import read
from pyruntime.format.spec.positions import ResizeRule, resize_positions
from tests.checkpoints import write_json
from tests.format.vision_logits import logits, spec_of
from tests.format.vision_values import to_timm, values
from tests.vision_checkpoints import (
    PREPROCESS,
    write_hf_vision_folder,
    write_pth,
    write_timm_folder,
)
from tests.vision_states import t2t_state, timm_state


def refusal(source: Path, **options: Any) -> str:
    with pytest.raises(ConversionError) as caught:
        convert(source, source.parent / "dst", **options)
    assert not (source.parent / "dst").exists()
    return str(caught.value)


def positions_of(folder: Path) -> torch.Tensor:
    return values(read(folder).tensors["positions"])


@pytest.mark.parametrize("to_grid", [(2, 5), (6, 4), (1, 1)])
@pytest.mark.parametrize("model", ["timm", "vit", "dinov2", "dinov2_with_registers", "t2t"])
def test_positions_by_the_rule_of_the_family(
    tmp_path: Path, model: str, to_grid: tuple[int, int]
) -> None:
    """Prefix rows keep theirs; only transformers' DINOv2 with registers has antialias as timm."""
    side = 16 if model == "t2t" else 4
    size = to_grid[0] * side, to_grid[1] * side
    source = tmp_path / "src"
    if model == "t2t":
        source = source / "t2t.pth"
        state = write_pth(source, t2t_state(image=(48, 48), exits=0))
    elif model == "timm":
        state = write_timm_folder(source, image=(12, 12))
    else:
        state = to_timm(write_hf_vision_folder(source, model, image=(12, 12)))
    report = convert(source, tmp_path / "dst", image_size=size)
    spec = spec_of(read(tmp_path / "dst"))
    antialias = model in ("timm", "dinov2_with_registers")
    rule: ResizeRule = "bicubic_aa" if antialias else "bicubic"
    assert (spec.position_resize, spec.image_size) == (rule, size)
    wanted = resize_positions(state["pos_embed"][0, 1:], (3, 3), to_grid, rule)
    assert torch.equal(positions_of(tmp_path / "dst"), wanted)
    text = f"from 3 x 3 to {to_grid[0]} x {to_grid[1]} patches (bicubic with"
    assert any(text in note for note in report.notes)
    convert(source, tmp_path / "same", image_size=3 * side)
    one, other = (read(tmp_path / name).tensors["prefix"] for name in ("dst", "same"))
    assert torch.equal(values(one), values(other))
    assert torch.equal(positions_of(tmp_path / "same"), state["pos_embed"][0, 1:])


def test_a_sidecar_decides_the_image_size_and_the_rule(tmp_path: Path) -> None:
    state = write_timm_folder(tmp_path / "src", image=(12, 12))
    how = PREPROCESS | {"image_size": [8, 20], "position_resize": "bicubic"}
    write_json(tmp_path / "how.json", how)
    convert(tmp_path / "src", tmp_path / "dst", preprocess=tmp_path / "how.json")
    spec = spec_of(read(tmp_path / "dst"))
    assert (spec.image_size, spec.position_resize) == ((8, 20), "bicubic")
    wanted = resize_positions(state["pos_embed"][0, 1:], (3, 3), (2, 5), "bicubic")
    assert torch.equal(positions_of(tmp_path / "dst"), wanted)


def test_a_bare_checkpoint_for_another_size(tmp_path: Path) -> None:
    """The grid of its positions is the one square they can be; registers have none."""
    state = timm_state(image=(12, 12), registers=3, prefix_positions=False, heads=5)
    write_pth(tmp_path / "a.pth", state, image=(20, 8), preprocess={"num_heads": 5})
    report = convert(tmp_path / "a.pth", tmp_path / "dst")
    assert any("from 3 x 3 to 5 x 2 patches" in note for note in report.notes)
    wanted = resize_positions(state["pos_embed"][0], (3, 3), (5, 2), "bicubic_aa")
    assert torch.equal(positions_of(tmp_path / "dst"), wanted)


def test_a_killed_conversion_continues_for_the_same_size_alone(tmp_path: Path) -> None:
    write_timm_folder(tmp_path / "src", image=(12, 12))

    def convert_to(side: int, most: float) -> Report:
        def stop(done: int, _: int) -> None:
            if done > most:
                raise KeyboardInterrupt

        return convert(tmp_path / "src", tmp_path / f"dst{side}", image_size=side,
                       shard_bytes=20_000, progress=stop)  # fmt: skip

    for side in (8, 20):
        with pytest.raises(KeyboardInterrupt):
            convert_to(side, 70_000)
    for left in tmp_path.glob("dst8.partial-*"):  # as if both had been meant for one folder
        left.rename(left.with_name(left.name.replace("dst8", "dst20")))
    report = convert_to(20, float("inf"))
    assert 0 < report.resumed < report.shards
    convert(tmp_path / "src", tmp_path / "whole", image_size=20)
    assert torch.equal(positions_of(tmp_path / "dst20"), positions_of(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((12, 10), "patches of 4 do not tile (12, 10)"),
        ((0, 4), "image_size must be a side, or a height and a width, is (0, 4)"),
        ((4, 4, 4), "image_size must be a side"),
    ],
)
def test_image_size_refusals(tmp_path: Path, size: Any, message: str) -> None:
    write_timm_folder(tmp_path / "src", image=(12, 12))
    assert message in refusal(tmp_path / "src", image_size=size)


@pytest.mark.parametrize("size", [None, (8, 20)])
def test_three_names_of_one_model(tmp_path: Path, size: tuple[int, int] | None) -> None:
    """transformers' older names, its newer ones, and timm's: the same numbers, the same answers."""
    images = torch.randn(2, 3, *(size or (12, 12)), generator=torch.Generator().manual_seed(0))
    found = []
    for name in ("legacy", "modern"):
        state = write_hf_vision_folder(
            tmp_path / name, "vit", image=(12, 12), modern=name == "modern"
        )
        convert(tmp_path / name, tmp_path / f"{name}.dst", image_size=size)
        found.append(logits(tmp_path / f"{name}.dst", images))
    write_pth(tmp_path / "timm.pth", to_timm(state), image=(12, 12),
              preprocess={"num_heads": 5, "position_resize": "bicubic"})  # fmt: skip
    convert(tmp_path / "timm.pth", tmp_path / "timm.dst", image_size=size)
    found.append(logits(tmp_path / "timm.dst", images))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@given(side=st.integers(2, 6), factor=st.integers(2, 3), seed=st.integers(0, 99))
def test_a_larger_kernel_says_the_same_of_larger_patches(side: int, factor: int, seed: int) -> None:
    """FlexiViT's property: upsampled patches and kernels resized for them meet again."""
    random = torch.Generator().manual_seed(seed)
    patches, kernels = (
        torch.randn(n, side * side, generator=random, dtype=torch.float64) for n in (5, 3)
    )
    to_side = side * factor
    larger = F.interpolate(
        patches.view(5, 1, side, side), (to_side, to_side), mode="bicubic", antialias=True
    ).flatten(1)
    found = larger @ (kernels @ resize_matrix(side, to_side)).T
    torch.testing.assert_close(found, patches @ kernels.T, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("flat", [False, True])
def test_patch_size(tmp_path: Path, flat: bool) -> None:
    state = write_timm_folder(tmp_path / "src", image=(12, 12), flat_patch=flat)
    report = convert(tmp_path / "src", tmp_path / "dst", patch_size=6, image_size=(18, 30))
    container = read(tmp_path / "dst")
    assert (spec_of(container).patch_size, spec_of(container).grid) == (6, (3, 5))
    assert any("resized from 4 to 6 pixels" in note for note in report.notes)
    kernel = state["patch_embed.proj.weight"].view(40, 3, 16).double()
    wanted = (kernel @ resize_matrix(4, 6)).flatten(1).float()
    torch.testing.assert_close(values(container.tensors["stem.weight"]), wanted)
    assert torch.equal(values(container.tensors["stem.bias"]), state["patch_embed.proj.bias"])


def test_patch_size_refusals(tmp_path: Path) -> None:
    write_timm_folder(tmp_path / "src", image=(12, 12))
    assert "patch_size must be positive, is 0" in refusal(tmp_path / "src", patch_size=0)
    assert "patches of 5 do not tile (12, 12)" in refusal(tmp_path / "src", patch_size=5)
    path = tmp_path / "t2t" / "t2t.pth"
    write_pth(path, t2t_state(exits=0))
    assert "its patches have 16 pixels, and only the kernel of a" in refusal(path, patch_size=8)
