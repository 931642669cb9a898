"""One lazy view over every weight file we read: names, shapes, dtypes, and rows on request.

Files are read in pieces and nothing is kept, so that converting a model never needs the memory
to hold one. A memory map would count every page it touched against us.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pyruntime.errors import ConversionError

FLOATS = ("float32", "float16", "bfloat16")
_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8,
}  # fmt: skip
_ZIP_MAGIC = b"PK\x03\x04"  # torch.save writes a zip archive since 1.6
_MAX_DEPTH = 8
# Pages of a mapped .pt file are given back by mapping it anew after this many bytes.
_REMAP_BYTES = 64 << 20


class _File(Protocol):
    def rows(self, key: str, start: int, stop: int) -> Tensor: ...


class Need(NamedTuple):
    """What a tensor must look like; `dtypes` are the accepted names."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = FLOATS


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor that lies in a file, or is computed from others when it is read.

    Attributes:
        dtype: its name in messages, such as "bfloat16"; of what is computed, the dtype it deserves.
        needs: the tensors it is computed from.
        derived: it lies in no file.
    """

    shape: tuple[int, ...]
    dtype: str
    file: _File
    key: str
    needs: Mapping[str, Need] = field(default_factory=dict)
    derived: bool = False


class Checkpoint:
    """Tensors by name, from one file or many; `problems` are what a reading of them found wrong."""

    def __init__(
        self, entries: Mapping[str, Entry], paths: Iterable[Path], problems: Iterable[str] = ()
    ) -> None:
        self.entries = dict(entries)
        self.paths = tuple(paths)
        self.problems = tuple(problems)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, [stop - start, columns]; read only.

        All axes but the last are one: a tensor [S, R, C] has S * R rows.
        """
        entry = self.entries[name]
        return entry.file.rows(entry.key, start, stop)

    def renamed(self, rename: Callable[[str], str]) -> Checkpoint:
        """The same tensors under new names.

        Raises:
            ConversionError: two tensors would get one name.
        """
        names: dict[str, str] = {}
        for old in self.entries:
            new = rename(old)
            if new in names:
                raise ConversionError(f"{names[new]} and {old} are both called {new}")
            names[new] = old
        return Checkpoint({new: self.entries[old] for new, old in names.items()}, self.paths)

    def joined(self, other: Checkpoint) -> Checkpoint:
        """The tensors of both; names must not meet.

        Raises:
            ConversionError: a name is in both.
        """
        twice = sorted(self.entries.keys() & other.entries.keys())
        if twice:
            raise ConversionError("\n".join(f"{name} is in two files" for name in twice))
        return Checkpoint({**self.entries, **other.entries}, self.paths + other.paths)


def open_folder(folder: Path) -> Checkpoint:
    """The weights of a Hugging Face folder: safetensors or pytorch_model, whole or in shards.

    Raises:
        ConversionError: no weights, files missing or damaged, an index that is wrong.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            return _open_index(index)
        if (folder / f"{stem}.{suffix}").is_file():
            return open_file(folder / f"{stem}.{suffix}")
    raise ConversionError(
        f"{folder}: no weights: looked for model.safetensors and pytorch_model.bin, "
        "alone or with .index.json"
    )


def open_file(path: Path) -> Checkpoint:
    """The tensors of one .safetensors, .bin, .pt or .pth file.

    Raises:
        ConversionError: the file is missing, damaged, or not data alone.
    """
    if not path.is_file():
        raise ConversionError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return Checkpoint(_SafetensorsFile(path).entries(), [path])
    return open_torch(path, _tensors_only)


def metadata(path: Path) -> dict[str, str]:
    """What a .safetensors file says about itself; nothing, of other files.

    Raises:
        ConversionError: the file is missing or damaged.
    """
    return _SafetensorsFile(path).metadata if path.suffix == ".safetensors" else {}


def open_torch(path: Path, read: Callable[[Path], dict[str, Tensor]]) -> Checkpoint:
    """The tensors that `read` finds in a torch.save archive.

    `read` maps them from the file, and is called again whenever the pages it used are given back.
    """
    return Checkpoint(_TorchFile(path, read).entries(), [path])


def _open_index(index: Path) -> Checkpoint:
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(where.values()))
        outside = [name for name in files if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{index}: not a weight index: {error!r}") from None
    problems = [f"{index}: file {name!r} is not in this folder" for name in outside]
    checkpoint = Checkpoint({}, [])
    held: dict[str, set[str]] = {}
    for name in files:
        if name in outside:
            continue
        try:
            part = open_file(index.parent / name)
            checkpoint = checkpoint.joined(part)
            held[name] = set(part.entries)
        except ConversionError as error:
            problems.append(str(error))
    problems += [
        f"{index.parent / name}: lacks {tensor}, which the index places there"
        for tensor, name in where.items()
        if name in held and tensor not in held[name]
    ]
    if problems:
        raise ConversionError("\n".join(problems))
    return checkpoint


class _SafetensorsFile:
    """Byte ranges from the header, numbers by plain reads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            # The library checks the header and the file's length; it just hides the offsets.
            with safe_open(path, framework="pt"):
                pass
            with open(path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header: dict[str, Any] = json.loads(file.read(size))
        except (SafetensorError, OSError, ValueError) as error:
            raise ConversionError(f"{path}: not a whole safetensors file: {error}") from None
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self._data = 8 + size
        self._header = header
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def entries(self) -> dict[str, Entry]:
        """Every tensor of the file."""
        return {
            name: Entry(tuple(info["shape"]), _dtype_name(_DTYPES.get(info["dtype"])) or
                        info["dtype"], self, name)
            for name, info in self._header.items()
        }  # fmt: skip

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop), freshly read."""
        info = self._header[key]
        begin, end = info["data_offsets"]
        shape = info["shape"]
        row = (end - begin) // math.prod(shape[:-1] or shape)
        buffer = bytearray((stop - start) * row)
        view = memoryview(buffer)
        position = self._data + begin + start * row
        while len(view):
            count = os.preadv(self._descriptor, [view], position)
            if not count:
                raise ConversionError(f"{self._path}: ended while reading {key}")
            view, position = view[count:], position + count
        flat = torch.frombuffer(buffer, dtype=_DTYPES[info["dtype"]])
        return flat.view(stop - start, *shape[1:][-1:])


class _TorchFile:
    """A torch.save archive, mapped."""

    def __init__(self, path: Path, read: Callable[[Path], dict[str, Tensor]]) -> None:
        self._path = path
        self._read = read
        self._tensors = read(path)
        self._budget = _REMAP_BYTES

    def entries(self) -> dict[str, Entry]:
        """Every tensor of the file."""
        return {
            name: Entry(tuple(tensor.shape), _dtype_name(tensor.dtype) or "?", self, name)
            for name, tensor in self._tensors.items()
        }

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop), contiguous."""
        if self._budget < 0:
            # Drop the old map before making the new one; callers hold no views by now.
            self._tensors = {}
            self._tensors = self._read(self._path)
            self._budget = _REMAP_BYTES
        # A copy, because a view would keep the old map alive.
        tensor = self._tensors[key]
        rows = tensor.flatten(0, -2) if tensor.dim() > 2 else tensor
        piece = rows[start:stop].clone(memory_format=torch.contiguous_format)
        self._budget -= piece.nbytes
        return piece


def _tensors_only(path: Path) -> dict[str, Tensor]:
    """Unpickled with nothing but tensors and containers allowed."""
    require_archive(path)
    try:
        data = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        # torch explains at length how to switch the protection off: say only what it found.
        found = re.search(r"GLOBAL (\S+) (?:was|whose)", str(error))
        what = f" ({found[1]})" if found else ""
        raise ConversionError(
            f"{path}: holds code or objects{what} besides tensors; only tensors are read"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, TypeError, KeyError, IndexError,
            AttributeError) as error:  # fmt: skip
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ConversionError(f"{path}: damaged torch file: {first}") from None
    if not isinstance(data, dict):
        raise ConversionError(f"{path}: expected a dictionary, is {type(data).__name__}")
    inner = data.get("state_dict", data)  # Lightning keeps the training state around it
    return dense(path, dict(flatten(path, inner if isinstance(inner, dict) else data)))


def require_archive(path: Path) -> None:
    """Refuse what is not a zip archive.

    Raises:
        ConversionError: another kind of file.
    """
    with open(path, "rb") as file:
        if file.read(4) != _ZIP_MAGIC:
            raise ConversionError(
                f"{path}: not a torch.save archive (torch 1.6 or later); "
                "bare pickles are not read, because they can run code"
            )


def dense(path: Path, flat: dict[str, Any]) -> dict[str, Tensor]:
    """`flat` again.

    Raises:
        ConversionError: what is in it besides tensors whose numbers lie one by one.
    """
    strange = [f"{path}: {name} is a {type(value).__name__}, not a dense tensor"
               for name, value in flat.items()
               if not isinstance(value, Tensor) or value.layout != torch.strided]  # fmt: skip
    if strange:
        raise ConversionError("\n".join(strange))
    return flat


def flatten(
    path: Path, data: Mapping[Any, Any], prefix: str = "", depth: int = 0
) -> Iterator[tuple[str, Any]]:
    """Every value that is no dictionary, under its keys joined by dots.

    Raises:
        ConversionError: dictionaries in dictionaries without end, as a pickle may hold them.
    """
    if depth > _MAX_DEPTH:
        raise ConversionError(f"{path}: more than {_MAX_DEPTH} dictionaries in each other")
    for key, value in data.items():
        if isinstance(value, dict):
            yield from flatten(path, value, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", value


def _dtype_name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def fingerprint(paths: Iterable[Path]) -> list[list[str | int]]:
    """What tells that files did not change: name, size and modification time of each."""
    stats = [(path, os.stat(path)) for path in paths]
    return [[str(path.resolve()), info.st_size, info.st_mtime_ns] for path, info in stats]
