"""Mixture-of-experts gates: router logits to Plans whose segments are experts."""

from __future__ import annotations

from pyruntime.gates.experts.capacity import Capacity, CappedGate
from pyruntime.gates.experts.gate import Gate
from pyruntime.gates.experts.identity import split_identity
from pyruntime.gates.experts.logits import Cosine, Linear, fold_temperature
from pyruntime.gates.experts.registry import constructor_of, gate_of

__all__ = [
    "Capacity",
    "CappedGate",
    "Cosine",
    "Gate",
    "Linear",
    "constructor_of",
    "fold_temperature",
    "gate_of",
    "split_identity",
]
