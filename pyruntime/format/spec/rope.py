"""Rotary position scaling: which rules exist, and what each needs.

Key names are Hugging Face's. `attention_factor` multiplies sine and cosine (yarn, longrope), always
written out; `factors` are longrope's divisors of every frequency (the short ones: see the Phi-MoE
converter); `truncate` rounds yarn's ramp to whole frequencies.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

from pyruntime.format.spec.record import fits

ROPE_SCALING_KEYS: Mapping[str, frozenset[str]] = types.MappingProxyType({
    "linear": frozenset({"rope_type", "factor"}),
    "llama3": frozenset({
        "rope_type", "factor", "low_freq_factor", "high_freq_factor",
        "original_max_position_embeddings",
    }),
    "yarn": frozenset({
        "rope_type", "factor", "beta_fast", "beta_slow", "original_max_position_embeddings",
        "attention_factor", "truncate",
    }),
    "longrope": frozenset({"rope_type", "factors", "attention_factor"}),
})  # fmt: skip
# Keys that are not one positive number.
_KINDS: Mapping[str, Any] = types.MappingProxyType({"truncate": bool, "factors": tuple[float, ...]})


def rope_scaling_problems(scaling: Mapping[str, Any]) -> list[str]:
    """Why the runtime cannot apply this scaling; empty when it can."""
    kind = scaling.get("rope_type")
    if not isinstance(kind, str) or kind not in ROPE_SCALING_KEYS:
        known = ", ".join(sorted(ROPE_SCALING_KEYS))
        return [f"rope scaling type {kind!r} is not implemented (implemented: default, {known})"]
    problems = [f"rope scaling {kind} lacks {key}"
                for key in sorted(ROPE_SCALING_KEYS[kind] - scaling.keys())]  # fmt: skip
    for key, value in scaling.items():
        if key == "rope_type":
            continue
        if key in _KINDS:
            if not fits(tuple(value) if isinstance(value, list) else value, _KINDS[key]):
                problems.append(f"rope scaling {key} must be {_KINDS[key]}, is {value!r}")
            continue
        if not (fits(value, float) and value > 0):
            problems.append(f"rope scaling {key} must be a positive number, is {value!r}")
    return problems
