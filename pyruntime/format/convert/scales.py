"""What a caller says about mixed scales: `--scales ratio=2/4,source=entropy,thresholds=4/5.5`."""

from __future__ import annotations

import math
import typing
from typing import Any, Literal

from pyruntime.errors import ConversionError, FormatError
from pyruntime.format.spec import ScaleSpec

_WORDS = ("source", "positions", "embed", "resize", "pool_weight")
_KEYS = ("ratio", "thresholds", *_WORDS)


def parse_scales(text: str) -> dict[str, Any]:
    """The fields of ScaleSpec that `text` names; several numbers are joined by a slash.

    Raises:
        ConversionError: everything in it that makes no sense.
    """
    hints = typing.get_type_hints(ScaleSpec)
    values: dict[str, Any] = {}
    problems = []
    for part in text.split(","):
        key, equals, value = (word.strip() for word in part.partition("="))
        if key not in _KEYS or not equals:
            problems.append(f"{part!r} is not one of {', '.join(f'{key}=' for key in _KEYS)}")
        elif key in values or (key == "ratio" and "ratios" in values):
            problems.append(f"{key} is given twice")
        elif key in _WORDS:
            known = typing.get_args(hints[key])
            if value not in known:
                problems.append(f"{key} {value!r} is not known (known: {', '.join(known)})")
            values[key] = value
        elif key == "ratio":
            values["ratios"] = _numbers(int, key, value, problems)
        else:
            values[key] = _numbers(float, key, value, problems)
    if "ratios" not in values and not problems:
        problems.append("ratio is missing")
    if problems:
        raise ConversionError(f"scales {text!r}: " + "; ".join(problems))
    return values


def scale_spec(
    given: dict[str, Any], embed: Literal["shared", "conv"], **usual: Any
) -> ScaleSpec:  # fmt: skip
    """The scales of a checkpoint whose coarser patches are embedded as `embed` says.

    `usual` are fields of ScaleSpec that `given` may replace.

    Raises:
        ConversionError: another embedding, or fields that do not fit each other.
    """
    if given.get("embed", embed) != embed:
        raise ConversionError(
            f"scales: embed {given['embed']!r}, but the tensors are those of {embed!r}"
        )
    try:
        return ScaleSpec(**{**usual, **given, "embed": embed})
    except FormatError as error:
        raise ConversionError(str(error)) from None


def _numbers(
    kind: type[int] | type[float], key: str, text: str, problems: list[str]
) -> tuple[Any, ...]:
    try:
        values = tuple(kind(word) for word in text.split("/"))
    except ValueError:
        values = (math.nan,)
    if not all(map(math.isfinite, values)):
        problems.append(f"{key} {text!r}: expected {kind.__name__} numbers joined by /")
    return values
