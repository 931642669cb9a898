"""runtime.json: the one file that says what a model folder holds."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyruntime.errors import FormatError
from pyruntime.format.spec import (
    FAMILIES,
    DecoderSpec,
    GateSpec,
    ModelSpec,
    TensorSpec,
    VisionSpec,
    family_of,
    from_dict,
    to_dict,
)

FILE_NAME = "runtime.json"
VERSION = 1
_KEYS = ("format", "version", "family", "architecture", "gates", "calibration", "provenance",
         "tensors", "shards")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shard:
    """One weights file: its SHA-256 in hex and its size."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """runtime.json in memory. `placement` maps a tensor name to (shard file, TensorSpec)."""

    spec: ModelSpec
    gates: GateSpec | None
    calibration: dict[str, Any] | None
    provenance: dict[str, Any]
    placement: dict[str, tuple[str, TensorSpec]]
    shards: dict[str, Shard]


def read_manifest(folder: Path) -> Manifest:
    """Parse `folder`/runtime.json.

    Raises:
        FormatError: not a model folder, an unknown version, or the list of what is malformed.
    """
    path = folder / FILE_NAME
    data = _read_json(path)
    if data.get("format") != "pyruntime":
        raise FormatError(f"{path}: format is {data.get('format')!r}, expected 'pyruntime'")
    if data.get("version") != VERSION:
        raise FormatError(
            f"{path}: format version {data.get('version')!r} is not known; "
            f"this runtime reads version {VERSION}"
        )
    problems = [f"{path}: unknown key {key!r}" for key in sorted(data.keys() - set(_KEYS))]
    problems += [f"{path}: missing key {key!r}" for key in _KEYS if key not in data]
    if not problems and data["family"] not in FAMILIES:
        known = " or ".join(map(repr, FAMILIES))
        problems.append(f"{path}: family {data['family']!r} is not known, expected {known}")
    if problems:
        raise FormatError("\n".join(problems))
    spec: ModelSpec = from_dict(
        FAMILIES[data["family"]], data["architecture"], f"{path}: architecture"
    )
    gates = data["gates"] and from_dict(GateSpec, data["gates"], f"{path}: gates")
    calibration = data["calibration"]
    if calibration is not None:
        problems += [f"{path}: {text}" for text in calibration_problems(calibration, spec, gates)]
    if not isinstance(data["provenance"], dict):
        problems.append(f"{path}: provenance must be an object")
    shards = _read_shards(data["shards"], path, problems)
    placement = _read_placement(data["tensors"], shards, path, problems)
    if problems:
        raise FormatError("\n".join(problems))
    return Manifest(spec, gates, calibration, data["provenance"], placement, shards)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace `folder`/runtime.json atomically: a reader sees the old file or the new one."""
    data = {
        "format": "pyruntime",
        "version": VERSION,
        "family": family_of(manifest.spec),
        "architecture": to_dict(manifest.spec),
        "gates": manifest.gates and to_dict(manifest.gates),
        "calibration": manifest.calibration,
        "provenance": manifest.provenance,
        "tensors": {
            name: {"shard": shard, "layout": tensor.layout, "shape": list(tensor.shape),
                   "dtype": tensor.dtype}
            for name, (shard, tensor) in manifest.placement.items()
        },
        "shards": {
            name: {"sha256": shard.sha256, "bytes": shard.bytes}
            for name, shard in manifest.shards.items()
        },
    }  # fmt: skip
    write_json(folder / FILE_NAME, data)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write `data` beside `path`, flush it to the disk, then rename it into place."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes private files; a model is meant to be shared
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries: a rename survives a power cut only after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def calibration_problems(data: object, spec: ModelSpec, gates: GateSpec | None) -> list[str]:
    """What is wrong with a calibration record of this model; empty when it can be used."""
    kind: str
    counted, least = "tokens", 0.0
    if isinstance(spec, VisionSpec):
        kind, shape, counted = "exits", [len(spec.exits)], "samples"
        if spec.scales is not None:  # what decides about patches, then the exits
            kind, shape = "scales", [1 + len(spec.exits)]
        elif not spec.exits:
            return ["calibration: the model has no exits and one scale"]
    elif not isinstance(spec, DecoderSpec):
        return ["calibration: an encoder has none"]
    elif gates is not None:
        kind, shape = gates.kind, [spec.num_layers, 2]
    elif spec.experts is not None:
        kind, shape = "experts", [len(spec.experts.layers)]
        least = 1 / spec.experts.experts_per_token
    else:
        return ["calibration: the model has no gates and no experts"]
    if not isinstance(data, dict):
        return [f"calibration: expected an object, is {type(data).__name__}"]
    needed = ("kind", "budgets", "thresholds", "kept", counted, "data_sha256", "default_budget")
    missing = [f"calibration: missing key {key!r}" for key in needed if key not in data]
    if missing:
        return missing
    problems = []
    if data["kind"] != kind:
        problems.append(f"calibration: kind is {data['kind']!r}, expected {kind!r}")
    budgets, thresholds, kept = data["budgets"], data["thresholds"], data["kept"]
    if not (_numbers(budgets) and budgets and all(0 <= b <= 1 for b in budgets)):
        return [*problems, f"calibration: budgets must be numbers in [0, 1], are {budgets!r}"]
    if any(b <= a for a, b in zip(budgets[1:], budgets, strict=False)):
        problems.append(f"calibration: budgets must descend, are {budgets}")
    if kind == "experts" and not math.isclose(budgets[-1], least):
        problems.append(
            f"calibration: the last budget must be {least:g}, one expert, is {budgets[-1]}"
        )
    default = data["default_budget"]
    if kind in ("exits", "scales"):
        least = budgets[-1]
        # Without a budget the checkpoint's own rule holds.
        default = 1.0 if default is None else default
    if not (_numbers([default]) and least <= default <= 1):
        problems.append(f"calibration: default_budget must be in [{least:g}, 1], is {default!r}")
    if not (isinstance(kept, list) and len(kept) == len(budgets)):
        problems.append(f"calibration: kept must hold one entry per budget ({len(budgets)})")
    if not _is_grid(thresholds, [len(budgets), *shape]):
        problems.append(
            f"calibration: thresholds must be numbers or null of shape {[len(budgets), *shape]}"
        )
    return problems


def _is_grid(value: object, shape: list[int]) -> bool:
    """Whether nested lists of numbers or null have a shape."""
    if not shape:
        return value is None or _numbers([value])
    return (
        isinstance(value, list)
        and len(value) == shape[0]
        and all(_is_grid(entry, shape[1:]) for entry in value)
    )


def _numbers(values: object) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        for value in values
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FormatError(f"{path.parent}: not a runtime model folder, it has no {path.name}") \
            from None  # fmt: skip
    except (ValueError, OSError) as error:
        raise FormatError(f"{path}: cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise FormatError(f"{path}: expected an object, is {type(data).__name__}")
    return data


def _read_shards(data: object, path: Path, problems: list[str]) -> dict[str, Shard]:
    shards: dict[str, Shard] = {}
    for name, entry in data.items() if isinstance(data, dict) else ():
        # A file name only: a manifest must not reach outside its folder.
        plain = Path(name).name == name and name not in (".", "..")
        try:
            shard = Shard(entry["sha256"], entry["bytes"])
        except (TypeError, KeyError):
            shard = None
        whole = shard and isinstance(shard.sha256, str) and type(shard.bytes) is int
        if not (plain and whole and shard and len(entry) == 2):
            problems.append(f"{path}: shard {name!r} must be a file name with sha256 and bytes")
        else:
            shards[name] = shard
    if not isinstance(data, dict):
        problems.append(f"{path}: shards must be an object")
    return shards


def _read_placement(
    data: object, shards: dict[str, Shard], path: Path, problems: list[str]
) -> dict[str, tuple[str, TensorSpec]]:
    placement: dict[str, tuple[str, TensorSpec]] = {}
    for name, entry in data.items() if isinstance(data, dict) else ():
        keys = {"shard", "layout", "shape", "dtype"}
        if not isinstance(entry, dict) or entry.keys() != keys:
            problems.append(f"{path}: tensor {name} must have exactly {', '.join(sorted(keys))}")
            continue
        shape = entry["shape"]
        if not (isinstance(shape, list) and all(type(n) is int for n in shape)):
            problems.append(f"{path}: tensor {name} shape must be integers, is {shape!r}")
            continue
        if entry["shard"] not in shards:
            problems.append(f"{path}: tensor {name} names an unknown shard {entry['shard']!r}")
        tensor = TensorSpec(name, tuple(shape), entry["layout"], entry["dtype"])
        placement[name] = (entry["shard"], tensor)
    if not isinstance(data, dict):
        problems.append(f"{path}: tensors must be an object")
    return placement
