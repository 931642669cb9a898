"""An inference runtime for networks that decide, per token, how much of themselves to run.

`import pyruntime` needs torch alone; everything else is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pyruntime.engine.classification import Classification as Classification
    from pyruntime.engine.classifier import Classifier as Classifier
    from pyruntime.engine.encoder import load_encoder as load_encoder
    from pyruntime.engine.llm import LLM as LLM
    from pyruntime.engine.request import SamplingParams as SamplingParams
    from pyruntime.engine.runtime import Output as Output
    from pyruntime.engine.runtime import Runtime as Runtime
    from pyruntime.engine.runtime import load as load
    from pyruntime.engine.vision import VisionOutput as VisionOutput
    from pyruntime.engine.vision import VisionRuntime as VisionRuntime
    from pyruntime.engine.vision import load_vision as load_vision
    from pyruntime.format.convert import convert as convert
    from pyruntime.gates.policy import ComputePolicy as ComputePolicy
    from pyruntime.gates.policy import ExitPolicy as ExitPolicy
    from pyruntime.gates.policy import ExpertPolicy as ExpertPolicy
    from pyruntime.gates.policy import ScalePolicy as ScalePolicy
    from pyruntime.plan import Plan as Plan

_HOMES = {
    "Classification": "pyruntime.engine.classification",
    "Classifier": "pyruntime.engine.classifier",
    "ComputePolicy": "pyruntime.gates.policy",
    "ExitPolicy": "pyruntime.gates.policy",
    "ExpertPolicy": "pyruntime.gates.policy",
    "LLM": "pyruntime.engine.llm",
    "Output": "pyruntime.engine.runtime",
    "Plan": "pyruntime.plan",
    "Runtime": "pyruntime.engine.runtime",
    "SamplingParams": "pyruntime.engine.request",
    "ScalePolicy": "pyruntime.gates.policy",
    "VisionOutput": "pyruntime.engine.vision",
    "VisionRuntime": "pyruntime.engine.vision",
    "convert": "pyruntime.format.convert",
    "load": "pyruntime.engine.runtime",
    "load_encoder": "pyruntime.engine.encoder",
    "load_vision": "pyruntime.engine.vision",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pyruntime' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
