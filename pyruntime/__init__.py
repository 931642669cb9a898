"""An inference runtime for networks that decide, per token, how much of themselves to run.

`import pyruntime` needs torch alone; everything else is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pyruntime.engine.encoder import load_encoder as load_encoder
    from pyruntime.engine.llm import LLM as LLM
    from pyruntime.engine.request import SamplingParams as SamplingParams
    from pyruntime.engine.runtime import Output as Output
    from pyruntime.engine.runtime import Runtime as Runtime
    from pyruntime.engine.runtime import load as load
    from pyruntime.format.convert import convert as convert
    from pyruntime.gates.policy import ComputePolicy as ComputePolicy
    from pyruntime.gates.policy import ExpertPolicy as ExpertPolicy
    from pyruntime.plan import Plan as Plan

_HOMES = {
    "ComputePolicy": "pyruntime.gates.policy",
    "ExpertPolicy": "pyruntime.gates.policy",
    "LLM": "pyruntime.engine.llm",
    "Output": "pyruntime.engine.runtime",
    "Plan": "pyruntime.plan",
    "Runtime": "pyruntime.engine.runtime",
    "SamplingParams": "pyruntime.engine.request",
    "convert": "pyruntime.format.convert",
    "load": "pyruntime.engine.runtime",
    "load_encoder": "pyruntime.engine.encoder",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pyruntime' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
