"""Runs the CUDA ops on CPU tensors: real Python, real kernel sources, emulated device."""

from __future__ import annotations

import ctypes
import re
import struct
import subprocess
from pathlib import Path

import pytest

from pyruntime.ops.cuda import check, embed, exit, matmul, move, norm, plan, varlen
from pyruntime.ops.cuda.kernels import KERNELS

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"


def build(folder: Path) -> ctypes.CDLL:
    """Compile every .cu as C++ against cuda_emulator.h into one library in ``folder``."""
    (folder / "ptx.cuh").write_text("")  # the emulator has its own
    for header in ("common.cuh", "topk.cuh"):
        (folder / header).write_text((SOURCES / header).read_text())
    lines = ['#include "cuda_emulator.h"']
    for source in sorted({source for source, _ in KERNELS.values()}):
        text = (SOURCES / f"{source}.cu").read_text()
        # Dynamic shared memory becomes static; 98,304 bytes is the most that is ever asked for.
        text = re.sub(r"extern __shared__ (.*)\[\];", r"static \1[98304];", text)
        (folder / f"{source}.cpp").write_text(text)
        lines.append(f'#include "{source}.cpp"')
    lines.append("static const int registered = [] {")
    for name in KERNELS:
        call = f"[](const char* args) {{ emu::unpack(&pyrt::{name}, args); }}"
        lines.append(f'  emu::kernels["{name}"] = {call};')
    lines.append("  return 0;\n}();")
    (folder / "all.cpp").write_text("\n".join(lines))
    library = folder / "emulated.so"
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-w", "-fPIC", "-shared"]
    include = [f"-I{folder}", f"-I{Path(__file__).parent}"]
    subprocess.run(["g++", *flags, *include, folder / "all.cpp", "-o", library], check=True)
    return ctypes.CDLL(str(library))


class EmulatedKernels:
    """Stands in for DeviceKernels; remembers what was launched."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.launched: list[str] = []

    def launch(
        self,
        name: str,
        grid: tuple[int, int],
        block: tuple[int, int],
        *args: float,
        shared: int = 0,
    ) -> None:
        packed = struct.pack(KERNELS[name][1], *args)
        self.launched.append(name)
        assert min(*grid, *block) > 0 and block[0] * block[1] <= 1024 and shared <= 98_304
        assert self._library.emulate(name.encode(), *grid, *block, packed) == 0, name


def install(monkeypatch: pytest.MonkeyPatch, kernels: EmulatedKernels) -> None:
    """Send every launch of the CUDA ops to ``kernels`` and accept CPU tensors."""
    for module in (embed, exit, matmul, move, norm, plan, varlen):
        monkeypatch.setattr(module, "kernels_of", lambda device: kernels)
    monkeypatch.setattr(check, "on_device", lambda tensor: True)
