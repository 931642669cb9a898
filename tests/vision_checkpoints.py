"""Random vision checkpoints in the formats that users bring, with tiny odd shapes.

Every `write_*` function writes one as its users would and returns its state dict, which the
`*_state` functions of vision_states make. `extra` adds or replaces tensors, `drop` removes some,
to make a checkpoint wrong.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.checkpoints import State, write_json, write_weights
from tests.vision_states import (
    hf_state,
    msvit_state,
    t2t_state,
    timm_state,
    torchvision_state,
)

PREPROCESS: dict[str, Any] = {
    "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "interpolation": "bilinear", "crop_pct": 0.9,
}  # fmt: skip


def write_timm_folder(
    path: str | Path,
    *,
    architecture: str = "vit_tiny_patch4_12",
    image: tuple[int, int] = (12, 8),
    heads: int = 5,
    files: str = "safetensors",
    dtype: torch.dtype = torch.float32,
    config_extra: dict[str, Any] | None = None,
    extra: State | None = None,
    drop: tuple[str, ...] = (),
    **shape: Any,
) -> State:
    """A folder as timm's hub has them. `shape` is that of `timm_state`.

    config.json says `num_heads` (not a key of timm's), because tiny widths tell nothing.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    state = _altered(timm_state(image=image, heads=heads, **shape), dtype, extra, drop)
    config = {
        "architecture": architecture, "num_classes": shape.get("classes", 7), "num_heads": heads,
        "pretrained_cfg": {
            **PREPROCESS, "input_size": [shape.get("channels", 3), *image], "crop_mode": "center",
            "classifier": "head", "first_conv": "patch_embed.proj",
        },
    }  # fmt: skip
    write_json(folder / "config.json", config | (config_extra or {}))
    write_weights(folder, state, files, 1)
    return state


def write_hf_vision_folder(
    path: str | Path,
    model: str,
    *,
    image: tuple[int, int] = (12, 8),
    heads: int = 5,
    processor: dict[str, Any] | None = None,
    config_extra: dict[str, Any] | None = None,
    extra: State | None = None,
    drop: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
    **shape: Any,
) -> State:
    """A transformers folder. `shape` is that of `hf_state`; `processor` replaces keys."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    state = _altered(hf_state(model, image=image, **shape), dtype, extra, drop)
    kinds = {"vit": "ViT", "deit": "DeiT", "dinov2": "Dinov2",
             "dinov2_with_registers": "Dinov2WithRegisters"}  # fmt: skip
    suffix = "WithTeacher" if model == "deit" and shape.get("teacher", True) else ""
    classes, hidden = shape.get("classes", 7), shape.get("hidden", 40)
    mlp = shape.get("mlp", 160)
    config: dict[str, Any] = {
        "architectures": [f"{kinds[model]}ForImageClassification{suffix}"], "model_type": model,
        "hidden_size": hidden, "num_hidden_layers": shape.get("layers", 3),
        "num_attention_heads": heads, "hidden_act": "gelu", "num_channels": 3,
        "image_size": list(image), "patch_size": shape.get("patch", 4),
        "qkv_bias": shape.get("qkv_bias", True), "layer_norm_eps": 1e-6,
        "id2label": {str(n): f"class {n}" for n in range(classes)},
    }  # fmt: skip
    if model.startswith("dinov2"):
        config |= {"mlp_ratio": mlp // hidden, "use_swiglu_ffn": False}
    else:
        config["intermediate_size"] = mlp
    if model == "dinov2_with_registers":
        config["num_register_tokens"] = shape.get("registers", 4)
    write_json(folder / "config.json", config | (config_extra or {}))
    settings: dict[str, Any] = {
        "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": PREPROCESS["mean"], "image_std": PREPROCESS["std"], "resample": 3,
        "size": {"height": image[0], "width": image[1]},
    }  # fmt: skip
    write_json(folder / "preprocessor_config.json", settings | (processor or {}))
    write_weights(folder, state, "safetensors", 1)
    return state


def write_pth(
    path: str | Path,
    state: State,
    *,
    image: tuple[int, int] | None = None,
    prefix: str = "",
    wrapper: str | None = None,
    beside: dict[str, Any] | None = None,
    preprocess: dict[str, Any] | None = None,
    sidecar: bool = True,
    dtype: torch.dtype = torch.float32,
    extra: State | None = None,
    drop: tuple[str, ...] = (),
) -> State:
    """A bare checkpoint with its preprocess.json beside it; returns the state without `prefix`.

    `wrapper` is the key that holds the state dict, `beside` what else is in the file, `preprocess`
    replaces keys of the JSON.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = _altered(state, dtype, extra, drop)
    saved: dict[str, Any] = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    torch.save({wrapper: saved, **(beside or {})} if wrapper else saved, path)
    if sidecar:
        size = {} if image is None else {"image_size": list(image)}
        write_json(path.parent / "preprocess.json", PREPROCESS | size | (preprocess or {}))
    return state


# The metadata of a container with the shapes of `msvit_state`.
METADATA: dict[str, str] = {
    "format": "msvit-1", "img_size": "16,8", "patch": "4", "ratio": "2", "embed_dim": "40",
    "depth": "3", "num_heads": "5", "mlp_ratio": "1.3", "ln_eps": "1e-6", "act": "gelu_erf",
    "mean": "0.5,0.4,0.3", "std": "0.2,0.25,0.3", "token_order": "cls,coarse_raster,fine_raster",
    "coarse_embed": "area_resize_shared", "coarse_pos": "area",
    "gate_input": "normalized_rgb_coarse_patch_CHW", "gate_threshold": "0.25",
    "gate_positive": "coarse", "pool_weight": "token",
}  # fmt: skip


def write_msvit(
    path: str | Path,
    *,
    metadata: dict[str, str | None] | None = None,
    extra: State | None = None,
    drop: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
    **shape: Any,
) -> State:
    """An MSViT container. `shape` is that of `msvit_state`; `metadata` replaces keys of METADATA,
    None removes them."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = _altered(msvit_state(**shape), dtype, extra, drop)
    says = {key: text for key, text in (METADATA | (metadata or {})).items() if text is not None}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, says)
    return state


def write_jei_dnn(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    preprocess: dict[str, Any] | None = None,
    sidecar: bool = True,
    extra: State | None = None,
    drop: tuple[str, ...] = (),
    **shape: Any,
) -> State:
    """A joint JEI-DNN checkpoint as its code saves it. `shape` is that of `t2t_state`."""
    return write_pth(
        path, t2t_state(**shape), prefix="module.", wrapper="net", beside={"acc": 91.5, "epoch": 3},
        dtype=dtype, preprocess=preprocess, sidecar=sidecar, extra=extra, drop=drop,
    )  # fmt: skip


def write_warmup_heads(folder: str | Path, state: State) -> None:
    """JEI-DNN's warm-up files, one for each intermediate head of `state`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    heads = {name.split(".")[1] for name in state if name.startswith("intermediate_heads.")}
    for number in sorted(heads):
        module = f"intermediate_heads.{number}"
        head = {kind: state[f"{module}.{kind}"] for kind in ("weight", "bias")}
        torch.save({"state": head, "acc": 50.0, "epoch": 1}, folder / f"{number}.pth")


class OmegaConf:
    """Stands for a class that the reader of a file does not have."""

    def __init__(self) -> None:
        self.content = {"runs_dir": Path("runs"), "lr": 0.1}


def write_acm(
    path: str | Path,
    *,
    mlp_bottleneck: int = 9,
    attention_bottleneck: int = 5,
    preprocess: dict[str, Any] | None = None,
    sidecar: bool = True,
    extra: State | None = None,
    drop: tuple[str, ...] = (),
    **shape: Any,
) -> State:
    """A final.pth of Adaptive Computation Modules. `shape` is that of `torchvision_state`.

    preprocess.json says `num_heads` 5.
    """
    state = torchvision_state(
        mlp_bottleneck=mlp_bottleneck, attention_bottleneck=attention_bottleneck, **shape
    )
    return write_pth(
        path, state, wrapper="model_state", preprocess={"num_heads": 5} | (preprocess or {}),
        beside={"args": OmegaConf(), "final_score": 0.8, "model_flops": {"head": 12}},
        sidecar=sidecar, extra=extra, drop=drop,
    )  # fmt: skip


def _altered(state: State, dtype: torch.dtype, extra: State | None, drop: tuple[str, ...]) -> State:
    kept: dict[str, Tensor] = {n: t.to(dtype) for n, t in state.items() if n not in drop}
    return kept | (extra or {})


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
