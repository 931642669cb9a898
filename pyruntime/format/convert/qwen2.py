"""Qwen2 and Qwen2.5: Llama with a bias on the query, key and value projections."""

from __future__ import annotations

from pyruntime.format.convert.config import Config
from pyruntime.format.convert.family import Reading
from pyruntime.format.convert.llama import MODULES

ARCHITECTURE = "Qwen2ForCausalLM"


def read(config: Config) -> Reading:
    """config.json -> Reading."""
    spec = config.decoder("qwen2", qkv_bias=True, o_bias=False)
    return Reading(spec, MODULES, notes=tuple(config.notes))
