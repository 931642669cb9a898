"""Compute policies as they are typed."""

from __future__ import annotations

from pyruntime.errors import InvalidInput
from pyruntime.gates.policy import SCALE_SOURCES, ExitPolicy, ExpertPolicy, ScalePolicy


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


def scales(text: str) -> ScalePolicy:
    """`all_fine`, `random:TOKENS:SEED`, a threshold, or fields such as `source=variance,tokens=60`;
    several thresholds are separated by `/`."""
    option = (
        f"--scales: expected one of {', '.join(SCALE_SOURCES)}, random:TOKENS:SEED, a number or "
        f"source=, threshold=, tokens=, seed= fields, got {text!r}"
    )
    if "=" not in text:
        if text and text[0].isalpha() and text not in ("nan", "inf"):
            return ScalePolicy.of(text)
        return ScalePolicy.of(_number(text, option))
    fields: dict[str, object] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        name = name.strip()
        if name == "source":
            fields[name] = value.strip()
        elif name == "threshold" and "/" in value:
            fields[name] = tuple(_number(one, option) for one in value.split("/"))
        else:
            fields[name] = _number(value, option)
    return ScalePolicy.of(fields)


def sweep(text: str) -> tuple[str, list[float]]:
    """Axis and values of `budget=1.0,0.9`, `experts=2,1`, `exit=0.5,0.9`, `tokens=31,46` and the
    like."""
    axis, _, values = text.partition("=")
    option = (
        "--sweep: expected budget=, experts=, gap=, mass=, exit=, tau=, level=, scales= or tokens= "
        f"and numbers, got {text!r}"
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
