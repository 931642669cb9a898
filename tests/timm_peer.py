"""timm for tests that compare with it: skipped where it is missing, imported without transforms.

timm imports torchvision, which is built against one exact torch, and PIL for what no backbone runs.
While timm is imported a stand-in takes the place of those that are missing, and nothing of it stays
behind.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest


class _Names(type):
    """A class whose every attribute is another one."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Names(name, (), {})


class _Stub(ModuleType):
    __version__ = "0.0"

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Names(name, (), {})


class _Finder(MetaPathFinder, Loader):
    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        mine = name.partition(".")[0] in self._names
        return ModuleSpec(name, self, is_package=True) if mine else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def need_timm() -> None:
    """Skip the calling module without timm; with PYRUNTIME_REQUIRE_PARITY=1, fail."""
    if importlib.util.find_spec("timm") is None:
        reason = "timm is not installed: nothing to compare with (pip install --no-deps timm)"
        if os.environ.get("PYRUNTIME_REQUIRE_PARITY") == "1":
            raise ImportError(f"PYRUNTIME_REQUIRE_PARITY=1, but {reason}")
        pytest.skip(reason, allow_module_level=True)
    missing = [name for name in ("torchvision", "PIL") if importlib.util.find_spec(name) is None]
    finder = _Finder(missing)
    sys.meta_path.append(finder)
    try:
        importlib.import_module("timm.models")
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] in missing]:
            del sys.modules[name]
