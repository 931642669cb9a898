"""What `import pyruntime` brings into a process: torch, nothing else, and one OpenMP runtime."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pyruntime

# Refuses every package but torch: torch and what torch needs are there before it is installed.
ALONE = """
import sys
from importlib.abc import MetaPathFinder

import torch

class OnlyTorch(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        if root not in sys.stdlib_module_names | {"pyruntime", "torch", "torchgen"}:
            raise ModuleNotFoundError(f"blocked: {name}", name=name)

for name in {"numpy", "jinja2", "tqdm", "safetensors", "tokenizers"} & sys.modules.keys():
    del sys.modules[name]
sys.meta_path.insert(0, OnlyTorch())
"""
MAPPED = """
print(*sorted({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line
               or "libomp" in line or "libiomp" in line}), sep="\\n")
"""
NATIVE_CALL = """
import torch
from pyruntime.ops import Weight, native
x = torch.randn(256, 256)
native.segment_matmul(x @ x, Weight.pack(x))
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def extension(name: str) -> Path:
    found = list(Path(pyruntime.__file__).parent.glob(f"{name}.*.so"))
    if not found:
        pytest.skip(f"pyruntime.{name} is not built")
    return found[0]


def test_torch_is_enough() -> None:
    run(ALONE + "import pyruntime; pyruntime.Plan; pyruntime.ComputePolicy")


@pytest.mark.parametrize("package", ["plan", "ops", "gates", "layers", "models"])
def test_torch_is_enough_to_build_models(package: str) -> None:
    """Of the layers below the engine every module loads, but for the one that is CuPy's."""
    root = Path(pyruntime.__file__).parent
    files = sorted((root / package).rglob("*.py")) or [root / f"{package}.py"]
    modules = [".".join(file.relative_to(root.parent).with_suffix("").parts) for file in files]
    code = "import importlib\n" + "\n".join(
        f"importlib.import_module({module.removesuffix('.__init__')!r})" for module in modules
    )
    run(ALONE + code)


def test_nothing_is_loaded_before_it_is_used() -> None:
    code = "import sys, pyruntime; print([m for m in sys.modules if m.startswith('pyruntime.')])"
    assert run(code).strip() == "[]"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc/self/maps here")
@pytest.mark.parametrize("first", ["torch", "pyruntime", "pyruntime.ops.native"])
def test_one_openmp_pool(first: str) -> None:
    """torch's copy, whatever is imported first: two pools would spin against each other."""
    extension("_cpu")
    mapped = run(f"import {first}\n{NATIVE_CALL}{MAPPED}").split()
    where = run("import torch; print(torch.__path__[0])").strip()
    assert len(mapped) == 1, mapped
    assert mapped[0].startswith(where)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc/self/maps here")
def test_one_openmp_pool_even_around_the_front_door() -> None:
    """The bare extension before torch: then torch joins the copy that is there."""
    extension("_cpu")
    mapped = run(f"import pyruntime._cpu\n{NATIVE_CALL}{MAPPED}").split()
    assert len(mapped) == 1, mapped


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is missing")
@pytest.mark.parametrize("name", ["_cpu", "_cuda"])
def test_extensions_record_no_path_and_no_framework(name: str) -> None:
    command = ["readelf", "-d", str(extension(name))]
    dynamic = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    needed = [line for line in dynamic.splitlines() if "NEEDED" in line]
    assert not [line for line in needed if "torch" in line or "c10" in line or "cuda" in line]
