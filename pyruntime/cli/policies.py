"""Compute policies as they are typed."""

from __future__ import annotations

from pyruntime.errors import InvalidInput
from pyruntime.gates.policy import ExitPolicy, ExpertPolicy


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


def exits(text: str) -> ExitPolicy:
    """`never`, a threshold, or fields such as `level=2` or `tau=0.7,level=4`."""
    option = f"--exit: expected never, a number or threshold=, tau=, level= fields, got {text!r}"
    if text == "never":
        return ExitPolicy(never=True)
    if "=" not in text:
        return ExitPolicy.of(_number(text, option))
    fields: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        fields[name.strip()] = _number(value, option)
    return ExitPolicy.of(fields)


def sweep(text: str) -> tuple[str, list[float]]:
    """Axis and values of `budget=1.0,0.9`, `experts=2,1`, `exit=0.5,0.9` and the like."""
    axis, _, values = text.partition("=")
    option = (
        "--sweep: expected budget=, experts=, gap=, mass=, exit=, tau= or level= and numbers, got "
        f"{text!r}"
    )
    return axis, [_number(value, option) for value in values.split(",")]


def _number(text: str, option: str) -> float:
    """An int where it is written as one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise InvalidInput(option)
