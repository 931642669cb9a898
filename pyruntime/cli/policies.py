"""Compute policies as they are typed."""

from __future__ import annotations

from pyruntime.errors import InvalidInput
from pyruntime.gates.policy import ExpertPolicy


def experts(text: str) -> ExpertPolicy:
    """`2`, or limits such as `mass=0.8` or `slots=2,gap=0.3`."""
    option = f"--experts: expected a number or slots=, gap=, mass= limits, got {text!r}"
    if "=" not in text:
        return ExpertPolicy.of(_number(text, option))
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        limits[name.strip()] = _number(value, option)
    return ExpertPolicy.of(limits)


def sweep(text: str) -> tuple[str, list[float]]:
    """Axis and values of `budget=1.0,0.9`, `experts=2,1`, `gap=0.1,0.3` or `mass=0.9,0.8`."""
    axis, _, values = text.partition("=")
    option = f"--sweep: expected budget=, experts=, gap= or mass= and numbers, got {text!r}"
    return axis, [_number(value, option) for value in values.split(",")]


def _number(text: str, option: str) -> float:
    """An int where it is written as one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise InvalidInput(option)
