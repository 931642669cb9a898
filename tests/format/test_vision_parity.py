"""Converted folders against the libraries that made them: the same logits.

The model is computed here from the folder's tensors in a few lines, so that what is compared is the
reading of a checkpoint, not the runtime's layers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pyruntime.format.convert import convert
from pyruntime.format.load import read
from pyruntime.format.spec import VisionSpec
from tests.format.vision_logits import logits
from tests.format.vision_values import values
from tests.parity import need_transformers
from tests.timm_peer import need_timm
from tests.vision_checkpoints import PREPROCESS

need_transformers()
transformers = pytest.importorskip("transformers")
SMALL: dict[str, Any] = {
    "hidden_size": 40, "num_hidden_layers": 3, "num_attention_heads": 5, "intermediate_size": 52,
    "image_size": 12, "patch_size": 4, "num_labels": 7, "layer_norm_eps": 1e-5,
}  # fmt: skip


def randomize(model: torch.nn.Module, std: float = 0.2) -> None:
    """Numbers everywhere: fresh models have zeros and ones where mistakes would hide."""
    random = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=random) * std
        parameter.data = noise + parameter.data.round().clamp(0, 1)
    model.eval()


def compare(
    model: torch.nn.Module,
    folder: Path,
    tmp_path: Path,
    image_size: tuple[int, int] | None = None,
    **arguments: Any,
) -> VisionSpec:
    """`arguments` are the model's; the folder is converted for `image_size`."""
    report = convert(folder, tmp_path / "dst", image_size=image_size)
    spec = read(tmp_path / "dst").spec
    assert isinstance(spec, VisionSpec)
    assert any("positions are resized" in note for note in report.notes) == bool(image_size)
    images = torch.randn(2, 3, *spec.image_size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = model(images, **arguments)
        found = logits(tmp_path / "dst", images)
    wanted = wanted if isinstance(wanted, Tensor) else wanted.logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    return spec


@pytest.mark.parametrize(
    ("config", "model"),
    [
        ("ViTConfig", "ViTForImageClassification"),
        ("DeiTConfig", "DeiTForImageClassification"),
        ("DeiTConfig", "DeiTForImageClassificationWithTeacher"),
        ("Dinov2Config", "Dinov2ForImageClassification"),
        ("Dinov2WithRegistersConfig", "Dinov2WithRegistersForImageClassification"),
    ],
)
@pytest.mark.parametrize("image_size", [None, (20, 12), (8, 28)])
def test_transformers(
    tmp_path: Path, config: str, model: str, image_size: tuple[int, int] | None
) -> None:
    shape, arguments = dict(SMALL), {}
    if config.startswith("Dino"):
        del shape["intermediate_size"]
    elif image_size:
        arguments["interpolate_pos_encoding"] = True
    made = getattr(transformers, model)(getattr(transformers, config)(**shape))
    randomize(made)
    made.save_pretrained(tmp_path / "src")
    settings = {"image_mean": PREPROCESS["mean"], "image_std": PREPROCESS["std"], "resample": 3,
                "size": {"height": 12, "width": 12}}  # fmt: skip
    (tmp_path / "src/preprocessor_config.json").write_text(json.dumps(settings))
    spec = compare(made, tmp_path / "src", tmp_path, image_size, **arguments)
    assert spec.norm_eps == 1e-5 and not spec.labels


def write_timm(model: Any, name: str, folder: Path, shape: dict[str, Any]) -> None:
    """A folder as timm's hub has them; `shape` are the arguments of the model."""
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    size = shape["img_size"]
    sides = list(size) if isinstance(size, tuple) else [size, size]
    pool = {"global_pool": model.global_pool}
    (folder / "config.json").write_text(json.dumps({
        "architecture": name, "num_classes": 7, **pool, "model_args": shape | pool,
        "pretrained_cfg": {**PREPROCESS, "input_size": [3, *sides]},
    }))  # fmt: skip


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_small_patch16_384", {"img_size": (16, 24)}),
        ("vit_base_patch16_224", {"global_pool": "avg"}),
        ("vit_small_patch14_reg4_dinov2", {}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("deit3_small_patch16_224", {}),
        ("vit_base_patch16_clip_224", {}),
        ("vit_medium_patch16_gap_240", {}),
        ("vit_tiny_patch16_224", {"qk_norm": True, "qkv_bias": False}),
    ],
)
@pytest.mark.parametrize("image_size", [None, (20, 12), (28, 8)])
def test_timm(
    tmp_path: Path, name: str, arguments: dict[str, Any], image_size: tuple[int, int] | None
) -> None:
    need_timm()
    import timm

    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 4,
             "num_classes": 7} | arguments  # fmt: skip
    model = timm.create_model(name, pretrained=False, dynamic_img_size=True, **shape)
    randomize(model)
    write_timm(model, name, tmp_path / "src", shape)
    compare(model, tmp_path / "src", tmp_path, image_size)


@pytest.mark.parametrize(
    ("name", "arguments", "image_size"),
    [
        ("vit_tiny_patch16_224", {}, (48, 80)),
        ("vit_small_patch16_224", {}, None),
        ("vit_base_patch16_224", {}, (80, 48)),
        ("deit_small_distilled_patch16_224", {}, (48, 48)),
        ("vit_small_patch14_reg4_dinov2", {}, (42, 70)),
        ("vit_small_patch14_dinov2", {}, (98, 56)),
        ("vit_small_patch16_224", {"class_token": False, "global_pool": "avg"}, (16, 48)),
        ("deit3_small_patch16_224", {}, (48, 32)),
    ],
)
def test_timm_as_published(
    tmp_path: Path, name: str, arguments: dict[str, Any], image_size: tuple[int, int] | None
) -> None:
    """Full widths, few blocks; heads are those of the name. A checkpoint of 64 or 56 pixels."""
    need_timm()
    import timm

    shape = {"img_size": 56 if "dinov2" in name else 64, "depth": 2, "num_classes": 7} | arguments
    model = timm.create_model(name, pretrained=False, dynamic_img_size=True, **shape)
    randomize(model, std=0.03)
    write_timm(model, name, tmp_path / "src", shape)
    compare(model, tmp_path / "src", tmp_path, image_size)


@pytest.mark.parametrize("patch_size", [3, 6, 8])
def test_other_patches(tmp_path: Path, patch_size: int) -> None:
    """A kernel brought to another size is timm's."""
    need_timm()
    import timm
    from timm.layers import resample_patch_embed

    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 1, "num_heads": 4,
             "num_classes": 7}  # fmt: skip
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **shape)
    randomize(model)
    write_timm(model, "vit_tiny_patch16_224", tmp_path / "src", shape)
    side = 4 * patch_size
    report = convert(tmp_path / "src", tmp_path / "dst", patch_size=patch_size, image_size=side)
    assert not any("positions are resized" in note for note in report.notes)
    found = values(read(tmp_path / "dst").tensors["stem.weight"])
    kernel = resample_patch_embed(model.patch_embed.proj.weight.detach(), [patch_size, patch_size])
    torch.testing.assert_close(found, kernel.flatten(1), rtol=1e-4, atol=1e-4)
