"""Memory: conversion streams, loading maps."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from pyruntime.format.convert import convert
from pyruntime.format.load import read
from tests.checkpoints import write_hf_folder
from tests.moe_checkpoints import write_moe_folder

SHAPE: dict[str, Any] = {"vocab_size": 90_000, "hidden_size": 256, "num_layers": 1}
WEIGHTS = 2 * 90_000 * 256 * 4  # bytes: embedding and head, 184 MB together


def status(key: str) -> int:
    """A memory figure of this process in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


@pytest.mark.parametrize(("files", "limit"), [("safetensors", 48 << 20), ("bin", 128 << 20)])
def test_conversion_streams(tmp_path: Path, files: str, limit: int) -> None:
    write_hf_folder(tmp_path / "src", files=files, **SHAPE)
    convert(tmp_path / "src", tmp_path / "warm", dry_run=True)  # code and buffers of the first use
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status("VmRSS")
    convert(tmp_path / "src", tmp_path / "dst")
    assert status("VmHWM") - before < limit < WEIGHTS


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_in_one_tensor_stream(tmp_path: Path, family: str, quantize: Any) -> None:
    """Two tensors of 100 and 50 MB are read expert by expert, transposed ones too."""
    shape = {"experts": 48, "hidden_size": 512, "expert_size": 512, "num_layers": 1}
    write_moe_folder(tmp_path / "src", family, form="fused", std=0.01, **shape)
    convert(tmp_path / "src", tmp_path / "warm", dry_run=True)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    convert(tmp_path / "src", tmp_path / "dst", quantize=quantize)
    assert status("VmHWM") - before < 48 << 20


def test_loading_maps(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "src", **SHAPE)
    convert(tmp_path / "src", tmp_path / "dst")
    before = status("VmRSS")
    container = read(tmp_path / "dst", verify=False)
    assert container.tensors
    assert status("VmRSS") - before < WEIGHTS / 10


def test_a_file_system_without_direct_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hf_folder(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "direct")
    real = os.open

    def buffered_only(path: Any, flags: int, *mode: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *mode, **options)

    monkeypatch.setattr(os, "open", buffered_only)
    convert(tmp_path / "src", tmp_path / "buffered")
    name = "weights-00001.safetensors"
    assert (tmp_path / "direct" / name).read_bytes() == (tmp_path / "buffered" / name).read_bytes()
