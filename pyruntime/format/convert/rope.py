"""Rotary positions in config.json: the many ways to write them, and the defaults left out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyruntime.format.spec import ROPE_SCALING_KEYS, rope_scaling_problems


@dataclass(frozen=True, slots=True)
class Rope:
    """`scaling` as `DecoderSpec.rope_scaling`; `max_positions` as far as it is right."""

    theta: float
    scaling: dict[str, Any] | None
    max_positions: int
    notes: tuple[str, ...] = ()


def read_rope(data: Mapping[str, Any], theta: float, limit: int, problems: list[str]) -> Rope:
    """Rope of a config.json; `theta` is the family's default, `limit` its maximum position.

    What is wrong is appended to `problems`.
    """
    given = rope_parameters(data)
    if given is None:
        problems.append("rope parameters that differ between layers are not implemented")
        return Rope(theta, None, limit)
    if given.get("partial_rotary_factor") not in (None, 1, 1.0):
        problems.append(
            f"partial_rotary_factor {given['partial_rotary_factor']!r} is not implemented "
            "(must be 1)"
        )
    theta = _number(given, "rope_theta", _number(data, "rope_theta", theta, problems), problems)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return Rope(theta, None, limit)
    notes: tuple[str, ...] = ()
    keys = ROPE_SCALING_KEYS.get(str(kind), frozenset())
    scaling = {key: given[key] for key in sorted(keys & given.keys()) if given[key] is not None}
    scaling["rope_type"] = kind
    if kind in ("yarn", "longrope"):
        # Models may keep the context they were trained with outside, and then that one counts.
        inner = _number(given, "original_max_position_embeddings", limit, problems)
        trained = _number(data, "original_max_position_embeddings", inner, problems)
        trained = int(trained) if trained >= 1 else 1
        factor = _number(given, "factor", limit / trained, problems)
        if kind == "yarn":
            scaling = _yarn_defaults(given, problems) | scaling
            scaling |= {"factor": factor, "original_max_position_embeddings": trained}
            scaling.setdefault("attention_factor", yarn_attention_factor(given, factor, problems))
        else:
            if given.get("short_factor") is not None:
                scaling["factors"] = given["short_factor"]
            mscale = _longrope_factor(factor, trained)
            scaling.setdefault("attention_factor", mscale)
            if "short_mscale" in given:  # Phi-3.5-MoE's own rule
                scaling["attention_factor"] = given["short_mscale"]
            if trained < limit:
                notes = (
                    f"{trained} positions, not {limit}: longer texts need longrope's other "
                    "factors for every token, those already cached too",
                )
            limit = min(limit, trained)
    problems += rope_scaling_problems(scaling)
    return Rope(theta, scaling, limit, notes)


def rope_parameters(data: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The object with the parameters, whatever its name; None when layers differ in it."""
    given = data.get("rope_parameters")
    if given is None:
        given = data.get("rope_scaling") or {}
    if not isinstance(given, dict) or any(isinstance(v, dict) for v in given.values()):
        return None
    return given


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's temperature, as a factor of cosine and sine."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def yarn_attention_factor(given: Mapping[str, Any], factor: float, problems: list[str]) -> float:
    """What transformers takes where config.json names no attention_factor."""
    one = _number(given, "mscale", 0.0, problems)
    other = _number(given, "mscale_all_dim", 0.0, problems)
    if one and other:
        return yarn_mscale(factor, one) / yarn_mscale(factor, other)
    return yarn_mscale(factor)


def _yarn_defaults(given: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    return {
        "beta_fast": _number(given, "beta_fast", 32.0, problems) or 32.0,
        "beta_slow": _number(given, "beta_slow", 1.0, problems) or 1.0,
        "truncate": True,
    }


def _longrope_factor(factor: float, trained: int) -> float:
    if factor <= 1 or trained <= 1:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(trained))


def _number(data: Mapping[str, Any], key: str, default: float, problems: list[str]) -> float:
    value = data.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        problems.append(f"{key} must be a number, is {value!r}")
        return default
    return float(value)
