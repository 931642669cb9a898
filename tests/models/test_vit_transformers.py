"""Converted ViT, DeiT and DINOv2 folders against transformers, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pyruntime
from pyruntime.format.load import read
from pyruntime.format.spec import VisionSpec
from pyruntime.models.vit import VisionTransformer
from tests.checkpoints import write_json
from tests.parity import need_transformers

need_transformers()

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL: dict[str, Any] = {
    "hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 2, "image_size": 64,
    "patch_size": 16, "num_labels": 10,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViT", {"intermediate_size": 1536}),
    "vit, tiny, oblong": ("ViT", {"hidden_size": 192, "num_attention_heads": 3,
                                  "intermediate_size": 768, "image_size": [48, 80]}),
    "vit, base, no query bias": ("ViT", {"hidden_size": 768, "num_attention_heads": 12,
                                         "intermediate_size": 3072, "qkv_bias": False}),
    "deit": ("DeiT", {"intermediate_size": 1536}),
    "deit, distilled": ("DeiT", {"intermediate_size": 1536}),
    "dinov2": ("Dinov2", {"patch_size": 14, "image_size": 70}),
    "dinov2, registers": ("Dinov2WithRegisters", {"patch_size": 14, "image_size": 70,
                                                  "num_register_tokens": 4}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    import transformers

    kind, changes = CASES[name]
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **changes})
    suffix = "WithTeacher" if "distilled" in name else ""
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForImageClassification{suffix}")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.3
            parameter.normal_(std=0.5 if "token" in key or "position" in key else 1.5 * scale)
            if "norm" in key and key.endswith("weight"):
                parameter.add_(1)
    model.save_pretrained(tmp_path / "hf")
    size = config.image_size if isinstance(config.image_size, list) else [config.image_size] * 2
    write_json(
        tmp_path / "hf" / "preprocessor_config.json",
        {"do_resize": True, "do_rescale": True, "do_normalize": True, "image_mean": [0.5] * 3,
         "image_std": [0.5] * 3, "resample": 3, "size": {"height": size[0], "width": size[1]}},
    )  # fmt: skip
    pyruntime.convert(tmp_path / "hf", tmp_path / "model", dtype="float32")
    container = read(tmp_path / "model")
    assert isinstance(container.spec, VisionSpec)
    images = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(images).logits
    assert float(expected.std()) > 0.3
    found = VisionTransformer(container.spec, container.tensors).forward(images)
    assert float((found - expected).abs().max()) <= 1e-4
