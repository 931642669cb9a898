"""The folder a conversion works in: beside the destination, resumable, renamed at the end."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pyruntime.errors import ConversionError
from pyruntime.format.load import sha256_file
from pyruntime.format.manifest import FILE_NAME, Shard, sync_folder, write_json


def check_destination(destination: Path, overwrite: bool) -> None:
    """Refuse a destination that holds something.

    Raises:
        ConversionError: it exists and is not an empty folder, nor a model we may overwrite.
    """
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    if not overwrite:
        raise ConversionError(f"{destination}: exists already; choose another, or overwrite it")
    # Overwriting deletes: never a folder that we did not make.
    if not (destination / FILE_NAME).is_file():
        raise ConversionError(f"{destination}: not a model folder, so it is not overwritten")


class Stage:
    """`folder` becomes the destination. `shards` are those an earlier run finished and verified."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "folder"
        self._home = home
        self._progress = home / "progress.json"
        self.folder.mkdir(exist_ok=True)
        self.shards = self._verified()

    def record(self, name: str, shard: Shard) -> None:
        """Remember a finished shard; after a kill it is not made again."""
        self.shards[name] = shard
        write_json(
            self._progress,
            {name: {"sha256": s.sha256, "bytes": s.bytes} for name, s in self.shards.items()},
        )

    def publish(self, destination: Path) -> None:
        """Make the folder the destination, in one rename."""
        sync_folder(self.folder)
        # An old model moves into our own folder first, and goes away with it.
        if destination.exists() and any(destination.iterdir()):
            os.rename(destination, self._home / "replaced")
        os.rename(self.folder, destination)
        sync_folder(destination.parent)
        self.discard()

    def discard(self) -> None:
        """Remove everything this run made."""
        shutil.rmtree(self._home)

    def _verified(self) -> dict[str, Shard]:
        try:
            recorded = json.loads(self._progress.read_text(encoding="utf-8"))
            shards = {name: Shard(e["sha256"], e["bytes"]) for name, e in recorded.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError):
            return {}  # a damaged record vouches for nothing: every shard is made again
        found = {}
        for name, shard in shards.items():
            path = self.folder / name
            whole = path.is_file() and path.stat().st_size == shard.bytes
            if whole and sha256_file(path) == shard.sha256:
                found[name] = shard
        return found


@contextlib.contextmanager
def open_stage(destination: Path, identity: Mapping[str, Any]) -> Iterator[Stage]:
    """The stage for converting what `identity` describes: the same identity finds the same stage.

    Raises:
        ConversionError: another process is converting the same source to this destination.
    """
    text = json.dumps(identity, sort_keys=True, default=str)
    key = hashlib.sha256(text.encode()).hexdigest()[:12]
    home = destination.with_name(f"{destination.name}.partial-{key}")
    home.mkdir(parents=True, exist_ok=True)
    with open(home / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConversionError(f"{home}: another conversion is running there") from None
        yield Stage(home)
