"""Streaming safetensors writer: the header first, then the tensors piece by piece.

The library's own writer wants all tensors of a file in memory; this one holds a few pieces.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from pyruntime.format.manifest import Shard
from pyruntime.format.spec import STORED_DTYPES, TensorSpec

_ALIGN = 64  # bytes: what the kernels' loads want, and a cache line
_BLOCK_BYTES = 4 << 20
_PENDING = 8  # pieces between packing and the disk


def plan_shards(tensors: list[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    """Tensors by shard, each at most `limit` bytes unless one tensor alone is larger.

    Panels come first in each shard: they are multiples of a cache line, so all of them start on
    one, whatever odd sizes the plain tensors have.
    """
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return [sorted(shard, key=_alignment_class) for shard in shards]


def write_shard(
    path: Path,
    tensors: list[TensorSpec],
    pieces: Iterable[Tensor],
    progress: Callable[[int], None],
) -> Shard:
    """Write `tensors`, whose bytes are `pieces` one after the other, and flush them to the disk.

    Packing (the caller's generator), hashing and writing run side by side; `progress` is told the
    size of each piece.
    """
    digest = hashlib.sha256()
    header = _header(tensors)
    digest.update(header)
    pending: deque[tuple[Tensor, Future[None], Future[None]]] = deque()
    size = len(header)
    with _Output(path) as file, ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as disk:
        file.write(memoryview(header))
        for piece in pieces:
            while len(pending) >= _PENDING:
                _finish(pending.popleft())
            view = _bytes_of(piece)
            # The queue holds the tensor, because the view alone does not keep it alive.
            pending.append(
                (piece, hasher.submit(digest.update, view), disk.submit(file.write, view))
            )
            size += len(view)
            progress(len(view))
        while pending:
            _finish(pending.popleft())
    expected = len(header) + sum(tensor.nbytes for tensor in tensors)
    if size != expected:
        raise RuntimeError(f"{path}: wrote {size} bytes, planned {expected}")
    return Shard(digest.hexdigest(), size)


def _alignment_class(tensor: TensorSpec) -> int:
    if tensor.layout != "plain":
        return 0  # int8 panels too are whole cache lines
    return 1 if tensor.dtype == "float32" else 2


def _header(tensors: list[TensorSpec]) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": "pyruntime"}}
    offset = 0
    for tensor in tensors:
        table[tensor.name] = {
            "dtype": STORED_DTYPES[tensor.dtype],
            "shape": list(tensor.stored_shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> memoryview:
    # Not tensor.numpy(): numpy is not a dependency and knows no bfloat16.
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


class _Output:
    """A file written in large aligned blocks, past the page cache, and flushed when it closes.

    The cache would cost a second copy and a fresh page for every 4 KB (up to half of the whole
    conversion on a virtual machine), and push out what other programs keep there.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self._descriptor = os.open(path, flags | os.O_DIRECT, 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._descriptor = os.open(path, flags, 0o644)  # a file system without direct writes
        self._block = memoryview(mmap.mmap(-1, _BLOCK_BYTES))  # mapped memory is page-aligned
        self._used = 0
        self._size = 0

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                # Whole pages only: write the last one padded, then cut the file to its length.
                self._flush(-(-self._used // mmap.PAGESIZE) * mmap.PAGESIZE)
                os.ftruncate(self._descriptor, self._size)
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def write(self, view: memoryview) -> None:
        """Append `view`; it may be reused afterwards."""
        self._size += len(view)
        while len(view):
            count = min(len(view), _BLOCK_BYTES - self._used)
            self._block[self._used : self._used + count] = view[:count]
            self._used += count
            view = view[count:]
            if self._used == _BLOCK_BYTES:
                self._flush(_BLOCK_BYTES)

    def _flush(self, size: int) -> None:
        rest = self._block[:size]
        while len(rest):
            rest = rest[os.write(self._descriptor, rest) :]
        self._used = 0


def _finish(item: tuple[Tensor, Future[None], Future[None]]) -> None:
    item[1].result()
    item[2].result()
