"""A trained msvit-1 container whose gate keeps everything fine against timm, which reads it too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pyruntime
from tests.timm_peer import need_timm

need_timm()

pytestmark = pytest.mark.usefixtures("one_thread")
DATA = Path(__file__).resolve().parents[1] / "data"


def test_all_fine_is_timm(tmp_path: Path) -> None:
    from timm.models.vision_transformer import VisionTransformer

    weights = load_file(DATA / "msvit_digits_r4.safetensors")
    backbone = {k: v for k, v in weights.items() if not k.startswith("msvit.")}
    peer = VisionTransformer(
        img_size=64, patch_size=4, embed_dim=96, depth=4, num_heads=3, num_classes=10
    ).eval()
    peer.load_state_dict(backbone, strict=True)
    vectors = load_file(DATA / "vectors.safetensors")
    images = (vectors["images_u8_nhwc"].permute(0, 3, 1, 2) / 127.5 - 1).contiguous()
    with torch.no_grad():
        wanted = peer(images)
    pyruntime.convert(DATA / "msvit_digits_r4.safetensors", tmp_path / "model")
    runtime = pyruntime.load_vision(tmp_path / "model")
    found = runtime.forward(images, pyruntime.ComputePolicy(scales="all_fine")).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
