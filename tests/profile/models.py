"""Small random models in the runtime format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyruntime.format.convert import convert
from tests.checkpoints import write_gateskip_pt, write_hf_folder
from tests.moe_checkpoints import write_moe_folder


def gated(folder: Path, gate_type: str = "scalar", **options: Any) -> Path:
    """A model with spread random gates; `options` go to their writer, `shape` to the base's."""
    write_hf_folder(folder / "hf", **options.pop("shape", {}))
    options = {"bias": 0.0, "std": 0.3} | options
    write_gateskip_pt(folder / "gated.pt", folder / "hf", gate_type, **options)
    convert(folder / "gated.pt", folder / "model")
    return folder / "model"


def ungated(folder: Path, **shape: Any) -> Path:
    """A plain model."""
    write_hf_folder(folder / "hf", **shape)
    convert(folder / "hf", folder / "model")
    return folder / "model"


def mixtral(folder: Path, **shape: Any) -> Path:
    """A model with five experts in each of two layers, two of them per token."""
    write_moe_folder(folder / "hf", "mixtral", **shape)
    convert(folder / "hf", folder / "model")
    return folder / "model"
