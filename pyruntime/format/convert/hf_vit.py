"""ViT, DeiT and DINOv2 folders of transformers, under the names of version 5 and the older ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pyruntime.errors import ConversionError, UnsupportedModel
from pyruntime.format.convert import preprocess
from pyruntime.format.convert.checkpoint import Checkpoint
from pyruntime.format.convert.config import Config
from pyruntime.format.convert.preprocess import Given
from pyruntime.format.convert.vision import Found, Names, read_backbone

PROCESSOR = "preprocessor_config.json"
_CLASSES = {"vit": "ViT", "deit": "DeiT", "dinov2": "Dinov2",
            "dinov2_with_registers": "Dinov2WithRegisters"}  # fmt: skip
# PIL's numbers, which is how processors name them.
_RESAMPLE = {2: "bilinear", 3: "bicubic"}
_SETTINGS = {"do_resize": True, "do_rescale": True}


def read_config(folder: Path, given: Given | None) -> tuple[Config, Given]:
    """config.json and preprocessor_config.json; `given` replaces the latter.

    Raises:
        UnsupportedModel: everything that is not implemented.
        ConversionError: no processor, or values that make no sense.
    """
    config = Config(folder)
    model = str(config.data.get("model_type"))
    known = [f"{_CLASSES[model]}ForImageClassification"]
    if model == "deit":
        known.append(f"{known[0]}WithTeacher")
    names = config.data.get("architectures") or known[:1]
    if len(names) != 1 or names[0] not in known:
        config.problems.append(
            f"architectures {names} is not supported (supported for {model}: {', '.join(known)})"
        )
    config.require("hidden_act", "gelu")
    config.require("use_swiglu_ffn", False)
    config.require("quantization_config")
    size = config.data.get("image_size", 224)
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        config.problems.append(f"image_size must be a side, or a height and a width, is {size!r}")
    heads = config.integer("num_attention_heads", 12)
    eps = config.number("layer_norm_eps", 1e-6 if model.startswith("dinov2") else 1e-12)
    if config.problems:
        raise UnsupportedModel("\n".join(f"{config.path}: {text}" for text in config.problems))
    values: dict[str, Any] = {"image_size": sides, "num_heads": heads, "norm_eps": eps}
    labels = _labels(config)
    if labels:
        values["labels"] = labels
    path = folder / PROCESSOR
    if given is None:
        values |= _processor(path, sides, config.notes)
    else:
        path = given.where
        values |= {
            "mean": list(given.preprocess.mean), "std": list(given.preprocess.std),
            "interpolation": given.preprocess.interpolation, "crop_pct": given.preprocess.crop,
            "squash": given.preprocess.squash,
        }  # fmt: skip
        values |= {"labels": list(given.labels)} if given.labels else {}
        values |= {"position_resize": given.position_resize} if given.position_resize else {}
    return config, preprocess.given(values, path)


def read(weights: Checkpoint, config: Config, given: Given) -> Found:
    """The model of a folder.

    Raises:
        ConversionError: see `read_backbone`.
    """
    model = str(config.data["model_type"])
    teacher = str((config.data.get("architectures") or [""])[0]).endswith("WithTeacher")
    pool = {"deit": "distilled" if teacher else "class", "vit": "class"}.get(model, "class_mean")
    found = read_backbone(
        weights, _names(weights, model, teacher), given, model,
        norm_eps=given.norm_eps or 1e-12, pool=pool,
        # The only class of transformers that resizes its positions with antialias.
        position_resize="bicubic_aa" if model == "dinov2_with_registers" else "bicubic",
    )  # fmt: skip
    found.notes[:] = config.notes
    return found


def _names(weights: Checkpoint, model: str, teacher: bool) -> Names:
    entries = weights.entries
    dino = model.startswith("dinov2")
    plain = any(name.startswith(f"{model}.layers.") for name in entries)
    layer = f"{model}.layers.{{i}}" if plain else f"{model}.encoder.layer.{{i}}"
    inside = f"{layer}.attention"
    modern = f"{inside}.q_proj.weight".replace("{i}", "0") in entries
    before, after = ("norm1", "norm2") if dino else ("layernorm_before", "layernorm_after")
    stem = f"{model}.embeddings"
    return Names(
        tokens=(f"{stem}.cls_token", f"{stem}.distillation_token", f"{stem}.register_tokens"),
        positions=f"{stem}.position_embeddings",
        patch=f"{stem}.patch_embeddings.projection",
        attn_norm=f"{layer}.{before}",
        qkv=tuple(f"{inside}.{part[0]}_proj" if modern else f"{inside}.attention.{part}"
                  for part in ("query", "key", "value")),
        o=f"{inside}.o_proj" if modern else f"{inside}.output.dense",
        mlp_norm=f"{layer}.{after}",
        up=f"{layer}.mlp.fc1" if dino or plain else f"{layer}.intermediate.dense",
        down=f"{layer}.mlp.fc2" if dino or plain else f"{layer}.output.dense",
        scales=(f"{layer}.layer_scale1.lambda1", f"{layer}.layer_scale2.lambda1"),
        norm=f"{model}.layernorm",
        head="cls_classifier" if teacher else "classifier",
        head_dist="distillation_classifier",
        drop=(f"{stem}.mask_token", f"{model}.pooler."),
    )  # fmt: skip


def _labels(config: Config) -> list[str]:
    """Names of the classes; none where they are what transformers makes up."""
    table = config.data.get("id2label")
    if not isinstance(table, dict) or not table:
        return []
    names = [table.get(str(number)) for number in range(len(table))]
    made_up = [f"LABEL_{number}" for number in range(len(table))]
    return [] if None in names or names == made_up else [str(name) for name in names]


def _processor(path: Path, sides: list[int], notes: list[str]) -> dict[str, Any]:
    """The keys of preprocess.json that a preprocessor_config.json decides."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(
            f"{path}: cannot be read: {error}; a preprocess.json can be given instead"
        ) from None
    if not isinstance(data, dict):
        raise ConversionError(f"{path}: expected an object, is {type(data).__name__}")
    problems = [f"{key} {data[key]!r} is not implemented (must be {must})"
                for key, must in _SETTINGS.items() if data.get(key, must) is not must]  # fmt: skip
    factor = data.get("rescale_factor", 1 / 255)
    if not (isinstance(factor, float) and abs(factor * 255 - 1) < 1e-6):
        problems.append(f"rescale_factor {factor!r} is not implemented (must be 1/255)")
    resample = data.get("resample", 2)
    if resample not in _RESAMPLE:
        problems.append(f"resample {resample!r} is not implemented (2 bilinear, 3 bicubic)")
    normalize = data.get("do_normalize", True)
    if normalize and not ("image_mean" in data and "image_std" in data):
        problems.append("image_mean and image_std are needed")
    resized, squash = _resized(data.get("size"))
    crop = data.get("crop_size") if data.get("do_center_crop") else resized
    cropped, _ = _resized(crop)
    if resized is None or cropped is None:
        problems.append(f"size {data.get('size')!r} and crop_size {data.get('crop_size')!r} "
                        "do not say what is resized and cropped")  # fmt: skip
    if problems:
        raise UnsupportedModel("\n".join(f"{path}: {text}" for text in problems))
    if cropped != min(sides):
        notes.append(
            f"{path.name} takes images of {cropped} pixels; without an image size they are taken "
            f"at the model's own {sides[0]} x {sides[1]}"
        )
    return {
        "mean": data["image_mean"] if normalize else [0.0] * 3,
        "std": data["image_std"] if normalize else [1.0] * 3,
        "interpolation": _RESAMPLE[resample],
        "crop_pct": min(1.0, cropped / resized),  # type: ignore[operator]  # None is a problem
        "squash": squash,
    }


def _resized(size: Any) -> tuple[int | None, bool]:
    """The shorter side of a `size`, and whether it ignores the aspect ratio."""
    if type(size) is int and size > 0:  # how processors before transformers 4.25 say a square
        return size, True
    if isinstance(size, dict):
        if type(size.get("shortest_edge")) is int:
            return max(1, size["shortest_edge"]), False
        sides = (size.get("height"), size.get("width"))
        whole = [side for side in sides if type(side) is int and side > 0]
        if len(whole) == 2:
            return min(whole), True
    return None, False
