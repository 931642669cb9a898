"""A conversion killed at any moment leaves the destination alone and can be continued."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyruntime.errors import ConversionError
from pyruntime.format import convert as convert_module
from pyruntime.format.convert import convert
from pyruntime.format.convert.stage import open_stage
from pyruntime.format.load import read
from pyruntime.format.manifest import Shard
from tests.checkpoints import write_hf_folder

SHARD_BYTES = 30_000
# Slows every shard down, so that a kill can land between and inside them.
SCRIPT = f"""
import sys, time
from pyruntime.format.convert import convert
print("ready", flush=True)
convert(sys.argv[1], sys.argv[2], shard_bytes={SHARD_BYTES}, progress=lambda *_: time.sleep(0.01))
"""


def contents(folder: Path) -> dict[str, object]:
    """Every file of a model, with what tells one run from another taken out."""
    found: dict[str, object] = {}
    for path in folder.iterdir():
        found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest = json.loads((folder / "runtime.json").read_text())
    del manifest["provenance"]
    return {**found, "runtime.json": manifest}


def test_killed_anywhere_then_resumed_is_the_same(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "src", num_layers=6)
    convert(tmp_path / "src", tmp_path / "whole", shard_bytes=SHARD_BYTES)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    moments = random.Random(0)
    destination = tmp_path / "dst"
    killed = 0
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, tmp_path / "src", destination],
            stdout=subprocess.PIPE, env=environment,
        )  # fmt: skip
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(moments.uniform(0.05, 0.4))
        child.send_signal(signal.SIGKILL)
        killed += child.wait() == -signal.SIGKILL
        child.stdout.close()
        if destination.exists():
            break  # it won the race: whole, or not there at all
    assert killed
    if not destination.exists():
        convert(tmp_path / "src", destination, shard_bytes=SHARD_BYTES)
    assert contents(destination) == contents(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst", "src", "whole"]


def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int) -> Path:
    """Convert until `shards` shards are finished, then lose power. Returns the stage's folder."""
    real = convert_module.write_shard
    left = [shards]

    def failing(*arguments: object) -> Shard:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "write_shard", failing)
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "src", tmp_path / "dst", shard_bytes=SHARD_BYTES)
    assert not (tmp_path / "dst").exists()
    (home,) = tmp_path.glob("dst.partial-*")
    return home


def test_finished_shards_are_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf_folder(tmp_path / "src")
    interrupted(tmp_path, monkeypatch, 3)
    report = convert(tmp_path / "src", tmp_path / "dst", shard_bytes=SHARD_BYTES)
    assert report.resumed == 3
    read(tmp_path / "dst")


def test_damaged_shards_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf_folder(tmp_path / "src")
    home = interrupted(tmp_path, monkeypatch, 3)
    shard = home / "folder/weights-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert convert(tmp_path / "src", tmp_path / "dst", shard_bytes=SHARD_BYTES).resumed == 2
    read(tmp_path / "dst")


@pytest.mark.parametrize("progress", ["{", "[]", '{"weights-00001.safetensors": {}}'])
def test_damaged_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: str) -> None:
    write_hf_folder(tmp_path / "src")
    (interrupted(tmp_path, monkeypatch, 3) / "progress.json").write_text(progress)
    assert convert(tmp_path / "src", tmp_path / "dst", shard_bytes=SHARD_BYTES).resumed == 0
    read(tmp_path / "dst")


def test_another_source_starts_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf_folder(tmp_path / "src")
    home = interrupted(tmp_path, monkeypatch, 3)
    write_hf_folder(tmp_path / "src", seed=1)
    report = convert(tmp_path / "src", tmp_path / "dst", shard_bytes=SHARD_BYTES)
    assert report.resumed == 0
    assert any(str(home) in note for note in report.notes)


def test_two_conversions_at_once(tmp_path: Path) -> None:
    with (
        open_stage(tmp_path / "dst", {"a": 1}),
        pytest.raises(ConversionError, match="another conversion is running"),
        open_stage(tmp_path / "dst", {"a": 1}),
    ):
        pass


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf_folder(tmp_path / "src")

    def full(*_: object) -> Shard:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "write_shard", full)
        with pytest.raises(ConversionError, match=r"No space left on device; what is finished"):
            convert(tmp_path / "src", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
    convert(tmp_path / "src", tmp_path / "dst")
