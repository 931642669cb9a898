"""The metadata of an MSViT container, and what a preprocess.json beside it adds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pyruntime.errors import ConversionError, UnsupportedModel
from pyruntime.format.convert.preprocess import MIXED

FORMAT = "msvit-1"
_FAMILY = "msvit"
_EMBEDDINGS = ("area_resize_shared", "bilinear_resize_shared", "separate")
# Keys whose values are words: all that are known.
_WORDS: Mapping[str, tuple[str, ...]] = {
    "coarse_embed": _EMBEDDINGS,
    "coarse_pos": ("area", "bilinear", "bicubic_aa"),
    "gate_input": ("normalized_rgb_coarse_patch_CHW",),
    "gate_positive": ("coarse",),
    "act": ("gelu", "gelu_erf"),
    "pool_weight": ("token", "area", "1", "r2"),
}
_RASTERS = {"coarse_raster", "fine_raster"}
_PREFIXES = ("cls", "dist", "reg")
_ORDER = "cls,coarse_raster,fine_raster"
# What no tensor tells, by the container's word for it.
_NEEDED = ("mean", "std", "num_heads", "ln_eps", "act", "token_order", "coarse_embed", "coarse_pos",
           "gate_input", "gate_positive", "gate_threshold")  # fmt: skip
# The container's word -> that of preprocess.json, where they differ.
_NAMES = {"img_size": "image_size", "ln_eps": "norm_eps"}


def says_format(metadata: Mapping[str, str]) -> bool:
    """Whether a file calls itself an MSViT container, of whatever version."""
    return metadata.get("format", "").lower().startswith(_FAMILY)


def read_metadata(
    path: Path, metadata: Mapping[str, str], sidecar: Mapping[str, Any], where: Path | None
) -> tuple[dict[str, Any], list[str]]:
    """What the metadata of `path` and the object of the preprocess.json `where` say, and notes.

    Keys are those of preprocess.json, and embed_dim, depth and mlp_ratio. Image sizes are the
    exception: the metadata's alone is returned, because the other one is what images are brought
    to.

    Raises:
        UnsupportedModel: another version.
        ConversionError: unknown values, contradictions, and what is missing, one line each.
    """
    version = metadata.get("format", FORMAT)
    if says_format(metadata) and version != FORMAT:
        raise UnsupportedModel(f"{path}: format {version!r} is not known (known: {FORMAT})")
    problems, notes = list[str](), list[str]()
    values = _parsed(metadata, problems, notes)
    for key, other in sidecar.items():
        if key == "image_size" and key in values:
            continue
        if key in values and not _same(values[key], other):
            problems.append(f"metadata {key} is {values[key]!r}, {where} says {other!r}")
        values.setdefault(key, other)
    for key, known in _WORDS.items():
        if key in values and values[key] not in known:
            problems.append(f"{key} {values[key]!r} is not known (known: {', '.join(known)})")
    if "token_order" in values:
        _check_order(values["token_order"], problems, notes)
    missing = [key for key in _NEEDED if _NAMES.get(key, key) not in values]
    if missing:
        named = [f"{key} ({_NAMES[key]})" if key in _NAMES else key for key in missing]
        problems.append(
            f"no metadata {', '.join(named)}: what a container does not say is needed in a "
            "preprocess.json"
        )
    if problems:
        raise ConversionError("\n".join(f"{path}: {text}" for text in problems))
    if "interpolation" not in values:
        notes.append("a container does not say how images are resized: bicubic, nothing cropped")
        values |= {"interpolation": "bicubic"}
    return values, notes


def mixed_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values` that are about mixed scales."""
    return {key: values[key] for key in MIXED if key in values}


def _parsed(
    metadata: Mapping[str, str], problems: list[str], notes: list[str]
) -> dict[str, Any]:  # fmt: skip
    values: dict[str, Any] = {}
    for key, text in metadata.items():
        if key in _NUMBERS:
            read, expected = _NUMBERS[key]
            try:
                values[_NAMES.get(key, key)] = read(text)
            except ValueError:
                problems.append(f"metadata {key} {text!r}: expected {expected}")
        elif key in _WORDS or key in ("token_order", "interpolation"):
            values[key] = text
        elif key != "format":
            notes.append(f"metadata {key} {text!r} is not known and was not read")
    return values


def _check_order(order: object, problems: list[str], notes: list[str]) -> None:
    """Attention ignores the order of rows, so that any is as good as ours."""
    words = str(order).split(",")
    if set(words) - {*_PREFIXES} != _RASTERS or len(set(words)) != len(words):
        problems.append(
            f"token_order {order!r} is not known (known: {_ORDER}, and other orders of these, of "
            f"{' and '.join(_PREFIXES[1:])})"
        )
    elif [word for word in words if word in _RASTERS] != sorted(_RASTERS) or words[0] in _RASTERS:
        notes.append(f"token_order {order}: rows are kept as {_ORDER}, which changes no answer")


def _same(one: object, other: object) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _numbers(text: str) -> list[float]:
    return [_number(word) for word in text.split(",")]


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _sides(text: str) -> list[int]:
    sides = [_count(word) for word in text.split(",")]
    if len(sides) > 2:
        raise ValueError(text)
    return sides * 2 if len(sides) == 1 else sides


_NUMBERS: Mapping[str, tuple[Callable[[str], Any], str]] = {
    "img_size": (_sides, "a side, or height,width"),
    **dict.fromkeys(("patch", "ratio", "embed_dim", "depth", "num_heads"),
                    (_count, "a positive whole number")),
    **dict.fromkeys(("ln_eps", "gate_threshold", "mlp_ratio", "crop_pct"), (_number, "a number")),
    **dict.fromkeys(("mean", "std"), (_numbers, "numbers joined by commas")),
}  # fmt: skip
