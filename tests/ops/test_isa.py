"""Every instruction set this processor has computes right; an unknown one is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyruntime.ops import native

COMPILED_PER_SET = (
    "test_move.py",
    "test_matmul.py",
    "test_quantize.py",
    "test_norm.py",
    "test_layer_norm.py",
    "test_patches.py",
    "test_embed_patches.py",
    "test_attention.py",
    "test_attention_varlen.py",
    "test_batch_invariance.py",
    "test_topk.py",
    "test_exit.py",
    "test_exit_rules.py",
)
FLAGS = {
    "portable": set(),
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_bf16": {"avx512f", "avx512_bf16", "avx512vbmi"},
}


def cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return set()
    return set(
        next((x for x in info.read_text().splitlines() if x.startswith("flags")), "").split()
    )


def run_python(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYRUNTIME_CPU_ISA": isa, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=root, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", FLAGS)
def test_instruction_set(name: str) -> None:
    """The tests of computation again, with the kernels built for another instruction set."""
    if not FLAGS[name] <= cpu_flags():
        pytest.skip(f"this processor has no {name}")
    if os.environ.get("PYRUNTIME_CPU_ISA") is None and native.isa() == name:
        pytest.skip(f"{name} is what the other files of this folder run on")
    used = run_python(name, "-c", "from pyruntime.ops import native; print(native.isa())")
    assert used.stdout.strip() == name, used.stderr
    # Gather and compact are not compiled per set.
    select = "not gather and not compact and not 3t"
    files = [str(Path(__file__).with_name(file)) for file in COMPILED_PER_SET]
    done = run_python(name, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", select,
                      *files)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_an_unknown_instruction_set_is_refused() -> None:
    code = (
        "from pyruntime.errors import InvalidInput; from pyruntime.ops import backend, native\n"
        "for call in (native.isa, lambda: backend('cpu')):\n"
        "    try: call()\n"
        "    except InvalidInput as error: print(error)\n"
    )
    done = run_python("sse9", "-c", code)
    expected = "PYRUNTIME_CPU_ISA=sse9: unknown, expected one of "
    assert done.returncode == 0 and done.stdout.count(expected) == 2, done.stdout + done.stderr
    assert "avx2" in done.stdout or "portable" in done.stdout
