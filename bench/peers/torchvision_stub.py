"""A stand-in for torchvision: timm imports it, but nothing that runs a backbone uses it.

torchvision is built against one exact torch, and there may be none for the torch that is measured.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Names(type):
    """A class whose every attribute exists, for enumerations that are looked up at import."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Names(name, (), {})


class _Stub(ModuleType):
    """A module whose every name is an empty class of its own."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Names(name, (), {})
        setattr(self, name, made)
        return made


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        mine = name.split(".")[0] == "torchvision"
        return ModuleSpec(name, self, is_package=True) if mine else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def install() -> None:
    """Before timm is imported. Where torchvision is installed, nothing happens."""
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(_Finder())
