"""Tests that compare with transformers call this first: CI has it, a developer may not."""

from __future__ import annotations

import importlib.util
import os

import pytest


def need_transformers() -> None:
    """Skip the calling module without transformers; with PYRUNTIME_REQUIRE_PARITY=1, fail."""
    if importlib.util.find_spec("transformers") is None:
        reason = "transformers is not installed: nothing to compare with (pip install transformers)"
        if os.environ.get("PYRUNTIME_REQUIRE_PARITY") == "1":
            raise ImportError(f"PYRUNTIME_REQUIRE_PARITY=1, but {reason}")
        pytest.skip(reason, allow_module_level=True)
