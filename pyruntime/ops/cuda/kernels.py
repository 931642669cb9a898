"""The CUDA kernels of one device: found or compiled, loaded through CuPy, launched by ``_cuda``.

The only module that imports cupy. Device code is data: the package carries, next to each other in
``pyruntime/_kernels``, the sources (``gather.cu`` …) and, where nvcc was present at build time, fat
binaries of them. A source without one is compiled by NVRTC at first use and kept in
``$XDG_CACHE_HOME/pyruntime/kernels``.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import struct
import tempfile
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch

from pyruntime.errors import Unavailable

log = logging.getLogger(__name__)

FOLDER: Final = Path(__file__).resolve().parents[2] / "_kernels"
HEADERS: Final = ("common.cuh", "ptx.cuh", "topk.cuh")
# The options of both compilers. NVRTC is called directly and not through RawModule(code=...), which
# appends -ftz=true: flushed denormals would change the order of scores and the bits of a sum.
OPTIONS: Final = ("-std=c++17",)
STATIC_SHARED_LIMIT: Final = 48 << 10  # more dynamic shared memory than this is asked for by name

_PLAN_OUT = "PPPPPi4x"
_THRESHOLD = "PPi4x"
_LABELS = "Pi4x"
_TOPK = "PPPiiiiffii"
_EXIT = "13P6f6i"
# kernel -> (source, C layout of its parameters as `struct` writes it)
KERNELS: Final = MappingProxyType(
    {
        **{f"gather_{size}": ("gather", "PPPPqi") for size in (16, 8, 4, 2, 1)},
        **{f"compact_{size}": ("compact", "PPPq") for size in (16, 8, 4, 2, 1)},
        **{
            f"combine_{dtype}_v{width}": ("combine", "PPPPPqii")
            for dtype in ("bf16", "f32")
            for width in (8, 1)
        },
        **{
            f"segment_matmul_{form}": ("segment_matmul", "PPPPPPiiiiiiff")
            for form in ("small_16", "small_32", "tile_64", "tile_128", "simt_f32", "simt_bf16")
        },
        "plan_threshold_small": ("plan", _THRESHOLD + _PLAN_OUT + "i"),
        "plan_threshold_count": ("plan", _THRESHOLD + "Pi"),
        "plan_threshold_scatter": ("plan", _THRESHOLD + _PLAN_OUT + "Pi"),
        "plan_labels_small": ("plan", _LABELS + _PLAN_OUT + "i"),
        "plan_labels_count": ("plan", _LABELS + "Pi"),
        "plan_labels_scatter": ("plan", _LABELS + _PLAN_OUT + "Pi"),
        "plan_scan": ("plan", "PPii"),
        **{f"plan_exit_{form}": ("exit", _EXIT) for form in ("rows", "head", "gate")},
        **{
            f"attention_varlen_{form}": ("attention_varlen", "7P3q4if4x")
            for form in (
                *(f"mma_{columns}" for columns in (32, 64, 96, 128)),
                *(f"plain_{dtype}_{columns}" for dtype in ("f32", "bf16") for columns in (64, 128)),
            )
        },
        **{
            f"{op}_{dtype}_v{width}": (source, layout)
            for op, source, layout in (
                ("layer_norm", "norm", "5Pqiiif"),
                ("gather_patches", "embed_patches", "5P4i"),
                ("embed_rows", "embed_patches", "7Pq3i4x"),
            )
            for dtype in ("bf16", "f32")
            for width in (8, 1)
        },
        **{f"plan_topk_choose_{items}": ("plan", _TOPK + "PP") for items in (2, 8, 32)},
        **{f"plan_topk_small_{items}": ("plan", _TOPK + "PP" + _PLAN_OUT) for items in (2, 8)},
    }
)


class DeviceKernels:
    """Every kernel on one device, loaded at first launch."""

    def __init__(self, device: int, folder: Path = FOLDER, library: str = "libcuda.so.1") -> None:
        """Open the driver of ``device`` (CUDA ordinal); kernels come from ``folder``.

        Raises:
            Unavailable: the binding or the driver is missing.
        """
        try:
            from pyruntime import _cuda
        except ImportError as error:
            raise Unavailable(f"cuda: pyruntime was built without _cuda: {error}") from None
        try:
            self._driver = _cuda.Driver(library)
        except RuntimeError as error:
            raise Unavailable(str(error)) from None
        self._device = device
        self._folder = folder
        self._modules: dict[str, Any] = {}
        self._functions: dict[str, tuple[int, struct.Struct]] = {}

    def launch(
        self,
        name: str,
        grid: tuple[int, int],
        block: tuple[int, int],
        *args: float,
        shared: int = 0,
    ) -> None:
        """Enqueue kernel ``name`` on torch's current stream of this device.

        Args:
            name: a key of `KERNELS`.
            grid: blocks in x and y, none zero.
            block: threads in x and y.
            args: the kernel's parameters, fields of structs one after the other.
            shared: bytes of dynamic shared memory; for one kernel always the same above 48 KB.

        Raises:
            RuntimeError: the driver refused; names the kernel and the reason.
        """
        function, layout = self._functions.get(name) or self._load(name, shared)
        self._driver.launch(
            name,
            function,
            *grid,
            *block,
            shared,
            self._device,
            _current_stream(self._device),
            layout.pack(*args),
        )

    def _load(self, name: str, shared: int) -> tuple[int, struct.Struct]:
        source, layout = KERNELS[name]
        cupy = _cupy()
        with cupy.cuda.Device(self._device):
            module = self._modules.get(source)
            if module is None:
                module = cupy.RawModule(path=str(self._binary(source)))
                self._modules[source] = module
            kernel = module.get_function(name)
            if shared > STATIC_SHARED_LIMIT:
                kernel.max_dynamic_shared_size_bytes = shared
            self._functions[name] = (int(kernel.kernel.ptr), struct.Struct(layout))
        return self._functions[name]

    def _binary(self, source: str) -> Path:
        """The file the driver can load: the shipped fat binary, or the cached result of NVRTC."""
        shipped = self._folder / f"{source}.fatbin"
        if shipped.is_file():
            log.info("cuda: %s from %s", source, shipped)
            return shipped
        major, minor = torch.cuda.get_device_capability(self._device)
        binary = compile_cached(self._folder, source, f"sm_{major}{minor}")
        log.info("cuda: %s compiled by NVRTC, cached as %s", source, binary)
        return binary


@functools.cache
def kernels_of(device: int) -> DeviceKernels:
    """The kernels of CUDA device ``device``; raises Unavailable where they cannot run."""
    return DeviceKernels(device)


def compile_source(folder: Path, source: str, arch: str) -> tuple[bytes, str]:
    """Compile ``folder/source.cu`` by NVRTC for ``arch`` (``sm_90``); needs no GPU and no driver.

    Returns:
        The cubin and the PTX.

    Raises:
        Unavailable: the source or CuPy is missing, or the compiler refused (its log is included).
    """
    nvrtc = _nvrtc()
    headers = [_read(folder / name).encode() for name in HEADERS]  # CuPy wants bytes here
    names = [name.encode() for name in HEADERS]
    text = _read(folder / f"{source}.cu")
    program = nvrtc.createProgram(text, f"{source}.cu", headers, names)
    try:
        nvrtc.compileProgram(program, [f"-arch={arch}", *OPTIONS])
        return nvrtc.getCUBIN(program), nvrtc.getPTX(program)
    except nvrtc.NVRTCError as error:
        problem = nvrtc.getProgramLog(program)
        raise Unavailable(
            f"cuda: NVRTC cannot compile {source}.cu for {arch}: {problem}"
        ) from error
    finally:
        nvrtc.destroyProgram(program)


def compile_cached(folder: Path, source: str, arch: str) -> Path:
    """`compile_source` into the user's cache; returns the path of the cubin."""
    nvrtc = _nvrtc()
    key = hashlib.sha256(repr((arch, OPTIONS, nvrtc.getVersion())).encode())
    for name in (f"{source}.cu", *HEADERS):
        key.update(_read(folder / name).encode())
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = base / "pyruntime" / "kernels" / f"{source}-{arch}-{key.hexdigest()[:24]}.cubin"
    if not target.is_file():
        cubin, _ = compile_source(folder, source, arch)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed: another process never sees half a file.
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
            file.write(cubin)
        os.replace(file.name, target)
    return target


def _read(path: Path) -> str:
    if not path.is_file():
        raise Unavailable(f"cuda: kernel source {path} is missing; reinstall pyruntime")
    return path.read_text(encoding="utf-8")


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise Unavailable(
            f"cuda: the kernels are loaded by CuPy: pip install 'cupy-cuda13x[ctk]' ({error})"
        ) from None
    return cupy


def _nvrtc() -> Any:
    _cupy()
    from cupy.cuda import nvrtc

    try:
        nvrtc.getVersion()
    except RuntimeError as error:  # cuda.pathfinder found no library
        raise Unavailable(
            f"cuda: CuPy finds no NVRTC: pip install nvidia-cuda-nvrtc ({error})"
        ) from None
    return nvrtc


def _current_stream(device: int) -> int:
    # What torch.compile's generated code calls; current_stream() builds a Python object each time.
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    if raw is None:
        return int(torch.cuda.current_stream(device).cuda_stream)
    return int(raw(device))
