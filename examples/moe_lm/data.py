"""The corpus and tokenizer code of the neighbouring example, loaded by path.

By path and under another name, because both folders have a `model.py` and a `train.py`: putting
`gateskip_lm` on the import path would let one shadow the other.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
CHECKPOINT = HERE / "checkpoint"


def _load_data() -> ModuleType:
    path = HERE.parent / "gateskip_lm" / "data.py"
    spec = importlib.util.spec_from_file_location("gateskip_lm_data", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_data = _load_data()


def load_corpus(folder: Path = CHECKPOINT) -> tuple[list[Tensor], list[Tensor]]:
    """(training documents, held-out documents): one [tokens] id tensor per file."""
    train, held_out = _data.load_corpus(folder)
    return train, held_out


def sample_batch(
    stream: Tensor, tokens: int, length: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random windows: inputs and next-token targets, both [tokens // length, length]."""
    ids, targets = _data.sample_batch(stream, tokens, length, generator)
    return ids, targets
