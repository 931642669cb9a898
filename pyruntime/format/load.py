"""Read a model folder: memory-mapped weights, every byte checked before any is used."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pyruntime.errors import FormatError
from pyruntime.format.manifest import (
    Manifest,
    calibration_problems,
    read_manifest,
    write_manifest,
)
from pyruntime.format.spec import STORED_DTYPES, GateSpec, ModelSpec, TensorSpec, model_tensors
from pyruntime.ops.weight import Weight


@dataclass(frozen=True, slots=True, eq=False)
class Container:
    """A model folder, opened. Matrices are `Weight`; norms, biases and lookups are tensors.

    Tensors are memory-mapped: they cost memory as they are touched, and must not be written to.
    """

    path: Path
    spec: ModelSpec
    gates: GateSpec | None
    calibration: dict[str, Any] | None
    tensors: dict[str, Tensor | Weight]
    manifest: Manifest


def read(path: str | os.PathLike[str], verify: bool = True) -> Container:
    """Open the model folder at `path`. `verify` also compares every shard with its SHA-256.

    Raises:
        FormatError: everything that is wrong with the folder, one line each.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    problems = _list_problems(folder, manifest)
    problems += _file_problems(folder, manifest, verify)
    if not problems:
        for shard in manifest.shards:
            problems += _header_problems(folder / shard, shard, manifest)
    if problems:
        raise FormatError("\n".join(problems))
    tensors = _map_tensors(folder, manifest)
    return Container(folder, manifest.spec, manifest.gates, manifest.calibration, tensors, manifest)


def write_calibration(path: str | os.PathLike[str], calibration: dict[str, Any] | None) -> None:
    """Store `calibration` in the folder's runtime.json (None removes it), atomically.

    Raises:
        FormatError: not a model folder, or the record does not fit this model.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if calibration is not None:
        problems = calibration_problems(calibration, manifest.spec, manifest.gates)
        if problems:
            raise FormatError("\n".join(problems))
    write_manifest(folder, dataclasses.replace(manifest, calibration=calibration))


def sha256_file(path: Path) -> str:
    """SHA-256 of a file in hex, streamed; the interpreter lock is free while it hashes."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def _list_problems(folder: Path, manifest: Manifest) -> list[str]:
    """The tensor list of runtime.json against the one the architecture demands."""
    expected = {tensor.name: tensor for tensor in model_tensors(manifest.spec, manifest.gates)}
    found = {name: tensor for name, (_, tensor) in manifest.placement.items()}
    problems = [f"{folder}: missing tensor {name}" for name in expected if name not in found]
    problems += [f"{folder}: unknown tensor {name}" for name in found if name not in expected]
    for name, tensor in found.items():
        wanted = expected.get(name, tensor)
        for field in ("shape", "dtype", "layout"):
            is_, must = getattr(tensor, field), getattr(wanted, field)
            if is_ != must:
                text = f"{_text(is_)}, expected {_text(must)}"
                problems.append(f"{folder}: tensor {name} has {field} {text}")
    return problems


def _file_problems(folder: Path, manifest: Manifest, verify: bool) -> list[str]:
    problems: list[str] = []
    whole: list[str] = []
    for name, shard in manifest.shards.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            problems.append(f"{folder / name}: {error.strerror}")
            continue
        if size != shard.bytes:
            problems.append(f"{folder / name}: has {size} bytes, expected {shard.bytes}")
        else:
            whole.append(name)
    if verify:
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            digests = list(pool.map(lambda name: sha256_file(folder / name), whole))
        for name, digest in zip(whole, digests, strict=True):
            expected = manifest.shards[name].sha256
            if digest != expected:
                problems.append(f"{folder / name}: sha256 is {digest}, expected {expected}")
    return problems


def _header_problems(path: Path, shard: str, manifest: Manifest) -> list[str]:
    """What a shard's own header says against runtime.json."""
    wanted = {name: tensor for name, (home, tensor) in manifest.placement.items() if home == shard}
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            held = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        return [f"{path}: not a safetensors file: {error}"]
    problems = [f"{path}: missing tensor {name}" for name in wanted if name not in held]
    problems += [f"{path}: unknown tensor {name}" for name in held if name not in wanted]
    for name, tensor in wanted.items():
        must = (tensor.stored_shape, STORED_DTYPES.get(tensor.dtype))
        if name in held and held[name] != must:
            is_text = f"{held[name][1]} {_text(held[name][0])}"
            problems.append(f"{path}: tensor {name} is stored as {is_text}, "
                            f"expected {must[1]} {_text(must[0])}")  # fmt: skip
    return problems


def _map_tensors(folder: Path, manifest: Manifest) -> dict[str, Tensor | Weight]:
    stored: dict[str, Tensor] = {}
    for shard in manifest.shards:
        with safe_open(folder / shard, framework="pt") as file:
            for name, (home, _) in manifest.placement.items():
                if home == shard:
                    stored[name] = file.get_tensor(name)
    return {
        name: _wrap(stored[name], tensor, stored.get(f"{name}_scale"))
        for name, (_, tensor) in manifest.placement.items()
    }


def _wrap(data: Tensor, tensor: TensorSpec, scale: Tensor | None) -> Tensor | Weight:
    if tensor.layout == "plain":
        return data
    rows, columns = tensor.shape[-2:]
    pair = tensor.layout == "gate_up"
    if scale is None:
        return Weight(data, rows, columns, "panel", pair)
    return Weight(data, rows, columns, "panel", pair, scale.view(tensor.segments, rows))


def _text(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a format dtype name."""
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
