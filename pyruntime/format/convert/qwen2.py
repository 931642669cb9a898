"""Qwen2 and Qwen2.5: Llama with a bias on the query, key and value projections."""

from __future__ import annotations

from pyruntime.format.convert.config import Config
from pyruntime.format.convert.llama import MODULES as MODULES
from pyruntime.format.spec import DecoderSpec

ARCHITECTURE = "Qwen2ForCausalLM"


def read(config: Config) -> DecoderSpec:
    """config.json -> DecoderSpec."""
    return config.decoder("qwen2", qkv_bias=True, o_bias=False)
