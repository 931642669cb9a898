"""`pyruntime doctor`: what this machine has, what it lacks, and the command that gets it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path
from types import ModuleType

import torch

import pyruntime
from pyruntime.errors import PyRuntimeError
from pyruntime.profile.timing import processor

_OPENMP = ("libgomp", "libomp", "libiomp")
_OPTIONAL = (
    ("tokenizers", "text prompts", "pip install tokenizers"),
    ("jinja2", "chat templates", "pip install jinja2"),
    ("uvicorn", "the server", "pip install 'pyruntime[serve]'"),
    ("starlette", "the server", "pip install 'pyruntime[serve]'"),
    ("pydantic", "the server", "pip install 'pyruntime[serve]'"),
    ("orjson", "the server", "pip install 'pyruntime[serve]'"),
)


def report() -> str:
    """One line per finding."""
    native = _native()
    rows = [
        ("pyruntime", f"{pyruntime.__version__} in {Path(pyruntime.__file__).parent}"),
        ("python", f"{platform.python_version()}, {platform.platform()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("processor", f"{processor()}, {os.cpu_count()} logical cores"),
        ("CPU ops", native if isinstance(native, str) else _isa(native)),
        ("OpenMP", openmp(_maps())),
        *_cuda(),
    ]
    for name, purpose, command in _OPTIONAL:
        missing = f"missing, needed for {purpose}: {command}"
        found = importlib.util.find_spec(name) is not None
        rows.append((name, importlib.metadata.version(name) if found else missing))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {found}" for name, found in rows)


def openmp(maps: str) -> str:
    """What the memory map of a process says about its OpenMP runtimes.

    Two copies are two pools of threads that spin against each other.
    """
    paths = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/" in line}
    found = sorted(p for p in paths if Path(p).name.startswith(_OPENMP))
    if len(found) > 1:
        return f"{len(found)} runtimes, which slow each other down: {', '.join(found)}"
    return f"one runtime, shared with torch: {found[0]}" if found else "no runtime found"


def _maps() -> str:
    path = Path("/proc/self/maps")
    return path.read_text() if path.exists() else ""


def _native() -> ModuleType | str:
    try:
        return importlib.import_module("pyruntime.ops.native")
    except ImportError as error:
        return (
            f"not built, using the slow torch ones ({error}); pip install . "
            "with a C++20 compiler builds them"
        )


def _isa(native: ModuleType) -> str:
    try:
        return f"native, {native.isa()} (PYRUNTIME_CPU_ISA overrides)"
    except PyRuntimeError as error:
        return str(error)


def _cuda() -> list[tuple[str, str]]:
    if torch.cuda.is_available():
        gpu = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    elif shutil.which("nvidia-smi"):
        gpu = f"a driver is here, but torch {torch.__version__} cannot use it"
    else:
        gpu = "none found; everything works without one"
    nvcc = shutil.which("nvcc")
    cupy = importlib.util.find_spec("cupy") is not None
    return [
        ("GPU", gpu),
        ("nvcc", nvcc or "not on PATH; needed only to build kernels ahead of their first use"),
        ("cupy", "found" if cupy else "missing, needed for CUDA ops: pip install cupy-cuda13x"),
    ]
