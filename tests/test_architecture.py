"""The rules of the house that no single file shows: who may import whom, and how much."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pyruntime"
CSRC = ROOT / "csrc"
MAX_LINES = 420

# Layer -> the layers it may import, itself aside. An import under TYPE_CHECKING counts: a type that
# a lower layer must know is a dependency too.
BASE = {"errors", "plan"}
ALLOWED = {
    "errors": set[str](),
    "plan": {"errors"},
    "ops": BASE,
    "gates": BASE | {"ops", "format.spec"},
    "layers": BASE | {"ops", "gates", "format.spec"},
    "models": BASE | {"ops", "gates", "layers", "format.spec"},
    "format.spec": {"errors"},
    "format": {"errors", "ops", "format.spec"},
    "engine": BASE | {"ops", "gates", "layers", "models", "format", "format.spec"},
    "serve": {"errors", "gates", "engine"},
    "profile": BASE | {"gates", "layers", "engine", "format", "format.spec"},
    "cli": BASE | {"gates", "layers", "format", "format.spec", "engine", "profile", "serve"},
}
# Modules that may be named by one module only: what they offer is unchecked addresses.
BINDINGS = {"_cpu": "ops/native/binding.py", "_cuda": "ops/cuda/kernels.py"}
# What every module may import; any other package belongs to one module, and to the metadata.
COMMON = {"torch", "safetensors", "pyruntime"}
# The distribution of a package, where it is not the name that is imported.
DISTRIBUTION = {"cupy": "cupy-cuda13x", "PIL": "pillow"}

# csrc/<part> -> what its quoted includes may start with, in CMake's include directory csrc.
INCLUDES = {
    "core": ("core/",),
    "ops.h": ("core/",),
    "cpu": ("ops.h", "core/", "cpu/"),
    "cuda": ("core/", "cuda/", "common.cuh", "ptx.cuh", "topk.cuh"),
    "bind": ("ops.h", "core/", "cuda/driver.h"),
}
# Written so that this file does not match itself.
FORBIDDEN = {
    "a path of one machine": r"(?<![\w.])/(?:home|root|work|Users|tmp/\w)/",
    "a folder outside the repository": r"(?<![\w/])share[d]/",
    "the number of an issue": r"(?i)\bissue #?\d|(?<![\w&\"'])(?<!color: )#\d{1,5}\b",
}
TEXT = {".py", ".pyi", ".cc", ".h", ".cu", ".cuh", ".c", ".md", ".toml", ".txt", ".yaml", ".in", ""}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def sources() -> list[Path]:
    return sorted(path for path in CSRC.rglob("*") if path.is_file())


def layer(dotted: str) -> str:
    """ "pyruntime.format.load" -> "format"; the package itself is ""."""
    parts = dotted.split(".")[1:]
    return "format.spec" if parts[:2] == ["format", "spec"] else parts[0] if parts else ""


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every absolute dotted name that a file imports, wherever it does, with its line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            base = node.module or ""
            for alias in node.names:
                inside = ROOT.joinpath(*base.split("."), alias.name)
                is_module = inside.is_dir() or inside.with_suffix(".py").is_file()
                yield f"{base}.{alias.name}" if is_module else base, node.lineno


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def tracked() -> list[Path]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files are the project's")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def test_imports_run_one_way() -> None:
    wrong = []
    for path in modules():
        here = layer(dotted(path))
        if here in ("", "__main__"):  # the lazy front door, and `python -m pyruntime`
            continue
        for name, line in imports(path):
            there = layer(name)
            if name.startswith("pyruntime.") and there not in ALLOWED[here] | {here}:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {here} may not import {name}")
    assert not wrong, "\n".join(wrong)


def test_every_layer_is_known() -> None:
    assert {layer(dotted(path)) for path in modules()} - {"", "__main__"} <= ALLOWED.keys()


def test_bindings_have_one_caller_that_has_torch() -> None:
    """torch comes first, so that its OpenMP runtime is the one of the process."""
    for binding, home in BINDINGS.items():
        wanted = re.compile(rf"^[ ]*(from pyruntime import|import pyruntime\.) ?{binding}\b", re.M)
        found = {path for path in modules() if wanted.search(path.read_text(encoding="utf-8"))}
        assert found == {PACKAGE / home}, binding
        text = (PACKAGE / home).read_text(encoding="utf-8")
        assert text.index("\nimport torch") < wanted.search(text).start()  # type: ignore[union-attr]


def test_optional_packages_have_one_home_and_are_declared() -> None:
    homes = defaultdict(set)
    for path in modules():
        for name, _ in imports(path):
            root = name.partition(".")[0]
            if root not in sys.stdlib_module_names | COMMON:
                homes[root].add(str(path.relative_to(ROOT)))
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    listed = [*project["dependencies"], *(requirement for extra in extras for requirement in extra)]
    declared = {re.match(r"[\w.-]+", requirement)[0] for requirement in listed}  # type: ignore[index]
    assert {DISTRIBUTION.get(name, name) for name in homes} <= declared


def test_includes_run_one_way() -> None:
    wrong = []
    for path in sources():
        part = path.relative_to(CSRC).parts[0]
        text = path.read_text(encoding="utf-8")
        for quoted in re.findall(r'^\s*#\s*include\s*"(.+?)"', text, re.M):
            if not quoted.startswith(INCLUDES[part]):
                wrong.append(f"{path.relative_to(ROOT)}: {part} may not include {quoted}")
        for header in re.findall(r"^\s*#\s*include\s*<(.+?)>", text, re.M):
            framework = re.match(r"(torch|ATen|c10|Python\.h|cuda|nv|cu[A-Z_])", header)
            if framework or ("pybind11" in header and part != "bind"):
                wrong.append(f"{path.relative_to(ROOT)}: may not include <{header}>")
    assert not wrong, "\n".join(wrong)


def test_files_are_short() -> None:
    suffixes = {".py", ".cc", ".h", ".cu", ".cuh"}
    lengths = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n")
        for path in tracked()
        if path.suffix in suffixes
    }
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_nothing_of_the_workplace_is_mentioned() -> None:
    wrong = []
    for path in tracked():
        if path.suffix not in TEXT:
            continue
        text = path.read_text(encoding="utf-8")
        for what, pattern in FORBIDDEN.items():
            for match in re.finditer(pattern, text):
                line = text.count("\n", 0, match.start()) + 1
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {what}: {match[0]!r}")
    assert not wrong, "\n".join(wrong)
