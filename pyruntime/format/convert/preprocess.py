"""preprocess.json: what a bare vision checkpoint does not say about itself."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyruntime.errors import ConversionError, FormatError
from pyruntime.format.spec import ExitSpec, Preprocess, from_dict
from pyruntime.format.spec.record import fits

FILE_NAME = "preprocess.json"
_NUMBERS = tuple[float, ...]
_KINDS: dict[str, Any] = {
    "image_size": tuple[int, ...], "mean": _NUMBERS, "std": _NUMBERS, "interpolation": str,
    "crop_pct": float, "squash": bool, "labels": tuple[str, ...], "num_heads": int,
    "num_classes": int, "norm_eps": float, "architecture": str, "exits": tuple[dict[str, Any], ...],
    "position_resize": str,
}  # fmt: skip
# What the metadata of an MSViT container says, where it says nothing.
MIXED: dict[str, Any] = {
    "patch": int, "ratio": int, "token_order": str, "coarse_embed": str, "coarse_pos": str,
    "gate_input": str, "gate_positive": str, "gate_threshold": float, "pool_weight": str,
    "act": str,
}  # fmt: skip
_NEEDED = ("mean", "std", "interpolation")
_RULES = {"interpolation": ("bilinear", "bicubic"), "position_resize": ("bicubic_aa", "bicubic")}


@dataclass(frozen=True, slots=True)
class Given:
    """What is known besides the tensors; None where it is not.

    Attributes:
        where: the file that says so.
        image_size: height, width.
        architecture: timm's name of the model.
        exits: those whose tensors bear our own names (exits.0.head.weight and so on).
        position_resize: how positions come to another image size.
        mixed: the keys of `MIXED` that are given.
    """

    where: Path
    preprocess: Preprocess
    image_size: tuple[int, int] | None = None
    labels: tuple[str, ...] = ()
    num_heads: int | None = None
    num_classes: int | None = None
    norm_eps: float | None = None
    architecture: str | None = None
    exits: tuple[ExitSpec, ...] = ()
    position_resize: str | None = None
    mixed: Mapping[str, Any] = field(default_factory=dict)


def read_sidecar(checkpoint: Path, file: Path | None) -> Given:
    """The JSON `file`, or by default the one beside `checkpoint`.

    Raises:
        ConversionError: there is none, or everything that is wrong with it.
    """
    path = file or checkpoint.with_name(FILE_NAME)
    if not path.is_file():
        needed = ", ".join(f'"{key}"' for key in _NEEDED)
        raise ConversionError(
            f"{path}: no such file; a checkpoint without a configuration needs a JSON with "
            f'{needed}, and, where they are not the usual ones, "image_size" [height, width], '
            '"crop_pct", "num_heads", "norm_eps", "labels"'
        )
    return given(read_json(path), path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConversionError: no such file, or no object in it.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise ConversionError(f"{path}: expected an object, is {type(data).__name__}")
    return data


def given(data: dict[str, Any], path: Path) -> Given:
    """The values of a preprocess.json.

    Raises:
        ConversionError: everything that is wrong with them, with `path` in front.
    """
    problems, kinds = [], _KINDS | MIXED
    for key in sorted(data.keys() - kinds.keys()):
        near = difflib.get_close_matches(key, kinds, 1)
        problems.append(f"unknown key {key!r}" + (f", nearest: {near[0]!r}" if near else ""))
    problems += [f"missing key {key!r}" for key in _NEEDED if key not in data]
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in kinds
    }
    problems += [
        f"{key} must be {getattr(kinds[key], '__name__', kinds[key])}, is {data[key]!r}"
        for key, value in values.items()
        if not fits(value, kinds[key])
    ]
    size = values.get("image_size")
    if not problems and size is not None and (len(size) != 2 or min(size) < 1):
        problems.append(f"image_size must be a height and a width, is {list(size)}")
    problems += [
        f"{key} {values[key]!r} is not implemented (must be {' or '.join(map(repr, known))})"
        for key, known in _RULES.items()
        if not problems and key in values and values[key] not in known
    ]
    if not problems:
        try:
            preprocess = Preprocess(
                values["mean"], values["std"], values["interpolation"],
                float(values.get("crop_pct", 1.0)), values.get("squash", False),
            )  # fmt: skip
        except FormatError as error:
            problems.append(str(error))
    if problems:
        raise ConversionError("\n".join(f"{path}: {text}" for text in problems))
    try:
        exits = tuple(
            from_dict(ExitSpec, one, f"{path}: exits[{number}]")
            for number, one in enumerate(values.get("exits", ()))
        )
    except FormatError as error:
        raise ConversionError(str(error)) from None
    rest = ("image_size", "labels", "num_heads", "num_classes", "norm_eps", "architecture",
            "position_resize")  # fmt: skip
    return Given(
        path, preprocess, exits=exits,
        mixed={key: values[key] for key in MIXED if key in values},
        **{key: values[key] for key in rest if key in values},
    )  # fmt: skip
