"""Converted folders against the libraries that made them: the same logits.

The model is computed here from the folder's tensors in a few lines, so that what is compared is the
reading of a checkpoint, not the runtime's layers.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyruntime.format.convert import convert
from pyruntime.format.load import read
from pyruntime.format.spec import VisionSpec
from tests.format.vision_values import values
from tests.parity import need_transformers
from tests.vision_checkpoints import PREPROCESS

need_transformers()
transformers = pytest.importorskip("transformers")
SMALL: dict[str, Any] = {
    "hidden_size": 40, "num_hidden_layers": 3, "num_attention_heads": 5, "intermediate_size": 52,
    "image_size": 12, "patch_size": 4, "num_labels": 7, "layer_norm_eps": 1e-5,
}  # fmt: skip


def logits(folder: Path, images: Tensor) -> Tensor:
    """Logits float32 [B, C] of the final head."""
    container = read(folder)
    spec = container.spec
    assert isinstance(spec, VisionSpec)
    t = {name: values(tensor).float() for name, tensor in container.tensors.items()}
    n, d = len(images), spec.hidden_size

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, t[f"{name}.weight"], t.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        weight = t[f"{name}.weight"]
        return F.layer_norm(x, (len(weight),), weight, t[f"{name}.bias"], spec.norm_eps)

    x = linear(F.unfold(images, spec.patch_size, stride=spec.patch_size).mT, "stem")
    x = x + t["positions"]
    if spec.prefix_tokens:
        x = torch.cat([t["prefix"].expand(n, -1, -1), x], 1)
    if spec.pre_norm:
        x = norm(x, "pre_norm")
    for i in range(spec.num_layers):
        attn, mlp = f"layers.{i}.attn", f"layers.{i}.mlp"
        q, k, v = (
            part.unflatten(-1, (spec.num_heads, -1)).transpose(1, 2)
            for part in linear(norm(x, f"{attn}.norm"), f"{attn}.qkv").split(d, -1)
        )
        if spec.qk_norm:
            q, k = norm(q, f"{attn}.q_norm"), norm(k, f"{attn}.k_norm")
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(y, f"{attn}.o")
        x = x + linear(F.gelu(linear(norm(x, f"{mlp}.norm"), f"{mlp}.up")), f"{mlp}.down")
    patches = slice(spec.prefix_tokens, None)
    if spec.norm_after_pool:
        return linear(norm(x[:, patches].mean(1), "norm"), "head")
    x = norm(x, "norm")
    if spec.pool == "mean":
        return linear(x[:, patches].mean(1), "head")
    if spec.pool == "class_mean":
        return linear(torch.cat([x[:, 0], x[:, patches].mean(1)], -1), "head")
    if spec.pool == "distilled":
        return (linear(x[:, 0], "head") + linear(x[:, 1], "head_dist")) / 2
    return linear(x[:, 0], "head")


def randomize(model: torch.nn.Module) -> None:
    """Numbers everywhere: fresh models have zeros and ones where mistakes would hide."""
    random = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=random) * 0.2
        parameter.data = noise + parameter.data.round().clamp(0, 1)
    model.eval()


def compare(model: torch.nn.Module, folder: Path, tmp_path: Path) -> VisionSpec:
    convert(folder, tmp_path / "dst")
    spec = read(tmp_path / "dst").spec
    assert isinstance(spec, VisionSpec)
    images = torch.randn(2, 3, *spec.image_size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = model(images)
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
def test_transformers(tmp_path: Path, config: str, model: str) -> None:
    shape = dict(SMALL)
    if config.startswith("Dino"):
        del shape["intermediate_size"]
    made = getattr(transformers, model)(getattr(transformers, config)(**shape))
    randomize(made)
    made.save_pretrained(tmp_path / "src")
    settings = {"image_mean": PREPROCESS["mean"], "image_std": PREPROCESS["std"], "resample": 3,
                "size": {"height": 12, "width": 12}}  # fmt: skip
    (tmp_path / "src/preprocessor_config.json").write_text(json.dumps(settings))
    spec = compare(made, tmp_path / "src", tmp_path)
    assert spec.norm_eps == 1e-5 and not spec.labels


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
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
def test_timm(tmp_path: Path, name: str, arguments: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    timm = pytest.importorskip("timm", exc_type=ImportError)  # or torchvision, which it needs
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 4,
             "num_classes": 7} | arguments  # fmt: skip
    model = timm.create_model(name, pretrained=False, **shape)
    randomize(model)
    folder = tmp_path / "src"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    size = shape["img_size"]
    sides = list(size) if isinstance(size, tuple) else [size, size]
    pool = {"global_pool": model.global_pool}
    described = {**PREPROCESS, "input_size": [3, *sides]}
    (folder / "config.json").write_text(json.dumps({
        "architecture": name, "num_classes": 7, **pool, "model_args": shape | pool,
        "pretrained_cfg": described,
    }))  # fmt: skip
    compare(model, folder, tmp_path)
