"""Frozen records to plain JSON and back, every problem named."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, Literal, TypeVar

from pyruntime.errors import FormatError

Record = TypeVar("Record")


def to_dict(record: Any) -> dict[str, Any]:
    """Plain JSON types, one key per field; nested records become objects."""
    return {field.name: _plain(getattr(record, field.name)) for field in dataclasses.fields(record)}


def from_dict(kind: type[Record], data: object, where: str) -> Record:
    """Inverse of `to_dict`. Unknown keys, missing keys and wrong types are one FormatError.

    A key may be absent where its field has a default: records grow without a new format version.
    """
    if not isinstance(data, dict):
        raise FormatError(f"{where}: expected an object, is {type(data).__name__}")
    hints = typing.get_type_hints(kind)
    optional = {
        field.name
        for field in dataclasses.fields(kind)  # type: ignore[arg-type]
        if field.default is not dataclasses.MISSING
    }
    problems = [f"unknown key {key!r}" for key in sorted(data.keys() - hints.keys())]
    problems += [f"missing key {key!r}" for key in hints if key not in data and key not in optional]
    values: dict[str, Any] = {}
    for key, hint in hints.items():
        if key not in data:
            continue
        value = data[key]
        nested = _record_in(hint)
        if nested is not None and isinstance(value, dict):
            values[key] = from_dict(nested, value, f"{where}: {key}")
            continue
        if isinstance(value, list):
            value = tuple(value)
            if nested is not None:
                value = tuple(
                    from_dict(nested, item, f"{where}: {key}[{number}]")
                    for number, item in enumerate(value)
                )
        values[key] = value
        if not fits(values[key], hint):
            problems.append(f"{key} must be {_words(hint)}, is {value!r}")
    if problems:
        raise FormatError(f"{where}: " + "; ".join(problems))
    try:
        return kind(**values)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None


def fits(value: object, hint: Any) -> bool:
    """Whether a value is of a type hint, strictly: a bool is no number, NaN is no float."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in args and not isinstance(value, bool)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, arg) for arg in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint is types.NoneType:
        return value is None
    if hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and math.isfinite(value)  # type: ignore[arg-type]
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _record_in(hint: Any) -> Any:
    """The record type of a hint `Record`, `Record | None` or `tuple[Record, ...]`, or None."""
    kinds = typing.get_args(hint) or (hint,)
    return next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)


def _words(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) else str(hint)
