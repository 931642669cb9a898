"""Which implementation of the ops a device uses."""

from __future__ import annotations

import functools
import importlib
import logging
import os
from types import ModuleType

import torch

from pyruntime.errors import InvalidInput

_log = logging.getLogger("pyruntime")


@functools.cache
def _load(name: str) -> ModuleType:
    return importlib.import_module(f"pyruntime.ops.{name}")


@functools.cache
def _cpu_name() -> str:
    wanted = os.environ.get("PYRUNTIME_BACKEND", "native")
    if wanted not in ("native", "reference"):
        raise InvalidInput(f"PYRUNTIME_BACKEND must be native or reference, got {wanted!r}")
    if wanted == "native":
        try:
            _load("native").isa()  # a PYRUNTIME_CPU_ISA that cannot be honoured is refused here
        except ImportError as error:
            _log.warning("native CPU ops are not built, using the slow torch ones: %s", error)
            return "reference"
    return wanted


def backend(device: torch.device | str, name: str | None = None) -> ModuleType:
    """The module that implements the ops for ``device``: native, reference or cuda.

    Args:
        device: where the tensors live.
        name: forces one of them (tests compare them); None chooses. PYRUNTIME_BACKEND=reference
            chooses the torch implementation on the CPU.

    Raises:
        InvalidInput: no ops exist for the device.
    """
    kind = torch.device(device).type
    if name is not None:
        return _load(name)
    if kind == "cpu":
        return _load(_cpu_name())
    if kind == "cuda":
        return _load("cuda")
    raise InvalidInput(f"no ops for device {kind!r}: expected cpu or cuda")
