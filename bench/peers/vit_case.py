"""A dense vision backbone, the same for every engine: its folder, its torch module, its images.

Peers import it from their own environments; timm is needed for its models alone. A folder holds

    model.safetensors, config.json     a model of timm, as timm saves it
    ckpt_1.0_0.0.pth, preprocess.json  a T2T-ViT of examples/jei_dnn, in the container of JEI-DNN

Weights are random: nothing about such a model says anything about accuracy.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

CHECKPOINT = "ckpt_1.0_0.0.pth"
IMAGE_PX, CLASSES = 224, 1000
T2T: dict[str, dict[str, int]] = {
    "t2t_vit_7": {"width": 256, "depth": 7, "heads": 4, "mlp_ratio": 2},
    "t2t_vit_14": {"width": 384, "depth": 14, "heads": 6, "mlp_ratio": 3},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Of the largest logit; the differences between engines grow with the depth of a random network.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


def images(batch: int) -> Tensor:
    """Normalised images float32 [B, 3, 224, 224]; the same in every process."""
    random = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 3, IMAGE_PX, IMAGE_PX, generator=random)


def make(folder: Path, model: str) -> None:
    """Write the folder of a model of timm, or of T2T, with random weights."""
    torch.manual_seed(0)
    if model in T2T:
        module = t2t()
        config = module.Config(image_px=IMAGE_PX, classes=CLASSES, **T2T[model])
        folder.mkdir(parents=True)
        module.save(module.T2TViT(config), folder / CHECKPOINT, 0.0, 0, torch.float32)
        seen = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "crop_pct": 1.0}
        (folder / "preprocess.json").write_text(json.dumps(seen))
        return
    timm = _timm()
    timm.models.save_for_hf(timm.create_model(model), folder, safe_serialization=True)


def load(folder: Path) -> nn.Module:
    """The dense backbone of a folder as a torch module, float32: images to logits."""
    if (folder / CHECKPOINT).exists():
        net = torch.load(folder / CHECKPOINT, weights_only=True)["net"]
        module = t2t()
        _, _, width = net["module.cls_token"].shape
        (shape,) = (shape for shape in T2T.values() if shape["width"] == width)
        config = module.Config(image_px=IMAGE_PX, classes=CLASSES, **shape)
        return Dense(module.load(folder / CHECKPOINT, config)).eval()
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    model: nn.Module = _timm().create_model(config["architecture"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


class Dense(nn.Module):
    """A T2T-ViT without its exits. The stem stays float32, as ours does, whatever the blocks are.

    Its performer attention is of exponentials of squares: bfloat16 would lose them.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.stem = model.tokens_to_token
        self.first = nn.Parameter(model.cls_token + model.pos_embed[:, :1], requires_grad=False)
        self.places = nn.Parameter(model.pos_embed[:, 1:].clone(), requires_grad=False)
        self.blocks, self.norm, self.head = model.blocks, model.norm, model.head

    def forward(self, images: Tensor) -> Tensor:
        """Float32 [B, 3, side, side] -> [B, C]."""
        first = self.first.expand(len(images), -1, -1)
        x = torch.cat([first, self.stem(images) + self.places], dim=1)
        x = x.to(self.head.weight.dtype)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits

    def bfloat16(self) -> Dense:
        """See torch.nn.Module; all but the stem."""
        for part in (self.blocks, self.norm, self.head):
            part.bfloat16()
        return self


def t2t() -> ModuleType:
    """examples/jei_dnn/model.py, without our packages in the module path."""
    path = Path(__file__).resolve().parents[2] / "examples" / "jei_dnn" / "model.py"
    spec = importlib.util.spec_from_file_location("jei_dnn_model", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"cannot import {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _timm() -> Any:
    from torchvision_stub import install

    install()
    import timm

    return timm


if __name__ == "__main__":
    make(Path(sys.argv[1]), sys.argv[2])
