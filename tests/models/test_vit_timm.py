"""Converted timm models against timm itself, with random weights of real shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pyruntime
from pyruntime.format.load import read
from pyruntime.format.spec import VisionSpec
from pyruntime.models.vit import VisionTransformer
from tests.checkpoints import write_json, write_weights
from tests.timm_peer import need_timm

need_timm()

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {"embed_dim": 192, "num_heads": 3, "depth": 12}
SMALL = {"embed_dim": 384, "num_heads": 6, "depth": 2}
BASE = {"embed_dim": 768, "num_heads": 12, "depth": 2}
CASES: dict[str, dict[str, Any]] = {
    "tiny": TINY,
    "tiny, oblong": {**TINY, "depth": 2, "img_size": (64, 96)},
    "small": SMALL,
    "small, 32": {**SMALL, "patch_size": 32},
    "base": BASE,
    "deit3": {**SMALL, "init_values": 1e-5, "no_embed_class": True},
    "registers": {**SMALL, "reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5,
                  "patch_size": 14, "img_size": 112},
    "query and key norms": {**SMALL, "qk_norm": True},
    "no query bias": {**SMALL, "qkv_bias": False},
    "mean": {**SMALL, "global_pool": "avg", "class_token": False},
    "mean beside a class token": {**SMALL, "global_pool": "avg"},
    "norm before the mean": {**SMALL, "global_pool": "avg", "fc_norm": False},
    "narrow MLP": {**SMALL, "mlp_ratio": 2.5},
}  # fmt: skip


def randomize(model: torch.nn.Module) -> None:
    """Weights large enough for a wrong bias, norm or scale to show."""
    random = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            values = torch.randn(parameter.shape, generator=random)
            if parameter.dim() > 1 and "token" not in name and "pos_embed" not in name:
                values *= 1.5 * parameter[0].numel() ** -0.5
            elif "norm" in name and name.endswith("weight"):
                values = 1 + 0.3 * values
            else:
                values *= 0.3
            parameter.copy_(values)


def converted(tmp_path: Path, model: Any, architecture: str) -> VisionTransformer:
    """Saved as timm's hub has it, and opened."""
    pool = {"token": "token", "avg": "avg"}[model.global_pool]
    height, width = model.patch_embed.img_size
    folder = tmp_path / "timm"
    folder.mkdir()
    config = {
        "architecture": architecture, "num_classes": 10, "global_pool": pool,
        "model_args": {"num_heads": model.blocks[0].attn.num_heads},
        "pretrained_cfg": {
            "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 0.9,
            "input_size": [3, height, width],
        },
    }  # fmt: skip
    write_json(folder / "config.json", config)
    write_weights(folder, dict(model.state_dict()), "safetensors", 1)
    pyruntime.convert(folder, tmp_path / "model", dtype="float32")
    container = read(tmp_path / "model")
    assert isinstance(container.spec, VisionSpec)
    return VisionTransformer(container.spec, container.tensors)


def compare(tmp_path: Path, model: Any, architecture: str = "vit_small_patch16_224") -> None:
    randomize(model)
    model.eval()
    ours = converted(tmp_path, model, architecture)
    size = ours.spec.image_size
    images = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(images)
    assert float(expected.std()) > 0.3
    assert float((ours.forward(images) - expected).abs().max()) <= 1e-4


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_timm(tmp_path: Path, name: str) -> None:
    from timm.models.vision_transformer import VisionTransformer as Timm

    values = {"img_size": 64, "patch_size": 16, "num_classes": 10, **CASES[name]}
    compare(tmp_path, Timm(**values))


def test_before_the_first_block_a_norm(tmp_path: Path) -> None:
    from timm.models.vision_transformer import VisionTransformer as Timm

    values = {**SMALL, "img_size": 64, "patch_size": 16, "num_classes": 10}
    norm = torch.nn.LayerNorm  # CLIP's epsilon
    compare(tmp_path, Timm(**values, pre_norm=True, norm_layer=norm), "vit_small_patch16_clip_224")


def test_the_mean_of_two_heads(tmp_path: Path) -> None:
    from timm.models.deit import VisionTransformerDistilled

    model = VisionTransformerDistilled(**SMALL, img_size=64, patch_size=16, num_classes=10)
    compare(tmp_path, model, "deit_small_distilled_patch16_224")


def test_whole_images(tmp_path: Path) -> None:
    """224 pixels and all twelve layers of ViT-Ti."""
    from timm.models.vision_transformer import VisionTransformer as Timm

    compare(tmp_path, Timm(**TINY, num_classes=10), "vit_tiny_patch16_224")
