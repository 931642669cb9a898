"""What can be said about the CUDA part without a GPU.

It compiles both ways for both architectures, no kernel spills, every kernel that Python launches
exists with the parameters that Python packs, and the launcher hands the driver what it was given.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pyruntime.errors import Unavailable
from pyruntime.ops.cuda import kernels
from pyruntime.ops.cuda.kernels import KERNELS, DeviceKernels, compile_cached, compile_source

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
NAMES = sorted({source for source, _ in KERNELS.values()})
NVCC = shutil.which("nvcc")

with_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")


def nvrtc_problem() -> str:
    try:
        kernels._nvrtc()
    except Unavailable as error:
        return str(error)
    return ""


with_nvrtc = pytest.mark.skipif(bool(nvrtc_problem()), reason=nvrtc_problem() or "available")
with_binding = pytest.mark.skipif(
    importlib.util.find_spec("pyruntime._cuda") is None, reason="pyruntime._cuda is not built"
)


def kernels_in(source: str) -> set[str]:
    return {name for name, (where, _) in KERNELS.items() if where == source}


def test_every_source_is_known() -> None:
    assert NAMES == sorted(path.stem for path in SOURCES.glob("*.cu"))


def no_spill(log: str, compiled: int) -> None:
    """What ptxas says of so many kernels."""
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", log)
    assert len(frames) == compiled, log
    assert {tuple(map(int, frame)) for frame in frames} == {(0, 0, 0)}, log


@with_nvcc
@pytest.mark.parametrize("source", NAMES)
def test_nvcc(source: str, tmp_path: Path) -> None:
    """The command of the build: one fat binary; every entry on both architectures, no spill."""
    targets = ["80,code=sm_80", "90a,code=sm_90a", "80,code=compute_80"]
    command = [str(NVCC), "-fatbin", *kernels.OPTIONS, "-Xptxas", "-v"]
    for target in targets:
        command += ["-gencode", f"arch=compute_{target}"]
    output = tmp_path / f"{source}.fatbin"
    command += [str(SOURCES / f"{source}.cu"), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert output.stat().st_size > 0
    for arch in ("sm_80", "sm_90a"):
        entries = set(re.findall(rf"Compiling entry function '(\w+)' for '{arch}'", done.stderr))
        assert entries == kernels_in(source)
    no_spill(done.stderr, 2 * len(kernels_in(source)))
    assert "warning" not in done.stderr


@with_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", NAMES)
def test_nvrtc(source: str, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a machine without a toolkit: no spill, and the parameters that Python packs."""
    nvrtc, logs = kernels._nvrtc(), []
    destroy = nvrtc.destroyProgram

    def read_log(program: int) -> None:
        logs.append(nvrtc.getProgramLog(program))
        destroy(program)

    monkeypatch.setattr(nvrtc, "destroyProgram", read_log)
    monkeypatch.setattr(kernels, "OPTIONS", (*kernels.OPTIONS, "--ptxas-options=-v"))
    cubin, ptx = compile_source(SOURCES, source, arch)
    assert cubin[:4] == b"\x7fELF"
    no_spill(logs[0], len(kernels_in(source)))
    text = ptx.decode() if isinstance(ptx, bytes) else ptx
    entries = dict(re.findall(r"\.entry (\w+)\((.*?)\)", text, flags=re.DOTALL))
    assert set(entries) == kernels_in(source)
    for name, parameters in entries.items():
        assert parameter_bytes(parameters) == struct.calcsize(KERNELS[name][1]), name


def parameter_bytes(parameters: str) -> int:
    """End of the last parameter of a PTX entry, each aligned to its own size or `.align`."""
    end = 0
    for line in parameters.split(",\n"):
        array = re.search(r"\.align (\d+) \.b8 \w+\[(\d+)\]", line)
        plain = re.search(r"\.[usbf](\d+)", line)
        if array:
            align, size = int(array[1]), int(array[2])
        elif plain:
            align = size = int(plain[1]) // 8
        else:
            raise AssertionError(f"unknown parameter {line!r}")
        end = -(-end // align) * align + size
    return end


@with_nvrtc
def test_nvrtc_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = compile_cached(SOURCES, "gather", "sm_80")
    assert first.is_relative_to(tmp_path) and first.read_bytes()[:4] == b"\x7fELF"
    stamp = first.stat().st_mtime_ns
    assert compile_cached(SOURCES, "gather", "sm_80") == first
    assert first.stat().st_mtime_ns == stamp
    assert compile_cached(SOURCES, "gather", "sm_90") != first


@with_nvrtc
def test_a_compiler_error_is_reported(tmp_path: Path) -> None:
    for header in kernels.HEADERS:
        (tmp_path / header).write_text("")
    (tmp_path / "gather.cu").write_text("nonsense;")
    with pytest.raises(Unavailable, match=r"(?s)cannot compile gather.cu for sm_90: .*nonsense"):
        compile_source(tmp_path, "gather", "sm_90")


@with_nvrtc
def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"common.cuh is missing"):
        compile_source(tmp_path, "gather", "sm_90")


# ---- the launcher ----


class Record(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_uint64),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_uint64),
        ("context", ctypes.c_uint64),
        ("args", ctypes.c_ubyte * 256),
        ("args_size", ctypes.c_ulong),
        ("pushed", ctypes.c_int),
        ("popped", ctypes.c_int),
        ("retained", ctypes.c_int),
    )


@pytest.fixture
def fake(tmp_path: Path) -> tuple[Path, Record, Any]:
    """Path of a fake libcuda, its record and its status variable; a fresh copy for every test."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the fake driver")
    path = tmp_path / "libcuda.so"
    source = Path(__file__).with_name("fake_driver.c")
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", path], check=True)
    library = ctypes.CDLL(str(path))
    status = ctypes.c_int.in_dll(library, "fake_status")
    return path, Record.in_dll(library, "fake_record"), status


def device_kernels(path: Path, monkeypatch: pytest.MonkeyPatch, device: int = 0) -> DeviceKernels:
    """Kernels whose functions need no CuPy: the handle is the same for all."""

    def load(self: DeviceKernels, name: str, shared: int) -> tuple[int, struct.Struct]:
        return 0xF00, struct.Struct(KERNELS[name][1])

    monkeypatch.setattr(DeviceKernels, "_load", load)
    monkeypatch.setattr(kernels, "_current_stream", lambda device: 0xABC0 + device)
    return DeviceKernels(device, library=str(path))


@with_binding
def test_launch_reaches_the_driver(
    fake: tuple[Path, Record, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, record, _ = fake
    launcher = device_kernels(path, monkeypatch, device=2)
    launcher.launch("gather_16", (7, 1), (64, 4), 1 << 40, 2, 3, 4, 1 << 33, -5)
    assert (record.function, record.stream, record.shared) == (0xF00, 0xABC2, 0)
    assert list(record.grid) == [7, 1, 1] and list(record.block) == [64, 4, 1]
    packed = bytes(record.args[: record.args_size])
    assert struct.unpack("<QQQQqi", packed) == (1 << 40, 2, 3, 4, 1 << 33, -5)
    assert (record.context, record.pushed, record.popped, record.retained) == (0x1002, 1, 1, 1)
    # A struct, then another, then a scalar: padding is where C puts it.
    launcher.launch(
        "plan_threshold_small", (1, 1), (32, 1), 1, 2, 0, 11, 12, 0, 14, 0, 1, 99, shared=128
    )
    packed = bytes(record.args[: record.args_size])
    assert struct.unpack("<QQi4xQQQQQi4xi", packed) == (1, 2, 0, 11, 12, 0, 14, 0, 1, 99)
    assert (record.shared, record.retained, record.popped) == (128, 1, 2)


@with_binding
def test_a_refused_launch_names_kernel_and_reason(
    fake: tuple[Path, Record, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, record, status = fake
    launcher = device_kernels(path, monkeypatch)
    status.value = 701
    with pytest.raises(RuntimeError, match=r"compact_4: cuLaunchKernel failed: too many .*\(701\)"):
        launcher.launch("compact_4", (1, 1), (1, 1), 0, 0, 0, 0)
    assert record.pushed == record.popped == 1
    status.value = 9
    with pytest.raises(RuntimeError, match=r"compact_4: .*unknown error \(9\)"):
        launcher.launch("compact_4", (1, 1), (1, 1), 0, 0, 0, 0)
    with pytest.raises(RuntimeError, match="cuDeviceGet failed"):
        device_kernels(path, monkeypatch, 4).launch("compact_4", (1, 1), (1, 1), 0, 0, 0, 0)


@with_binding
def test_an_empty_grid_never_reaches_the_driver(
    fake: tuple[Path, Record, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, record, _ = fake
    with pytest.raises(ValueError, match=r"compact_4: grid \[0, 1\]"):
        device_kernels(path, monkeypatch).launch("compact_4", (0, 1), (1, 1), 0, 0, 0, 0)
    assert record.function is None or record.function == 0


@with_binding
def test_no_driver_is_reported(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no driver on this machine"):
        DeviceKernels(0, library=str(tmp_path / "libcuda.so.1"))
    with pytest.raises(Unavailable, match="has no cuInit"):
        DeviceKernels(0, library="libc.so.6")
