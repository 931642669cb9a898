"""An answer of a classifier in words."""

from __future__ import annotations

from pyruntime.engine.classification import Classification, Label

_UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def name(label: Label) -> str:
    """Of a class."""
    return f"class {label.index}" if label.name is None else label.name


def macs(executed: int, dense: int) -> str:
    """Both in the unit of the dense ones."""
    scale, unit = next(((s, u) for s, u in _UNITS if dense >= s), (1.0, ""))
    return f"{executed / scale:.3g} of {dense / scale:.3g} {unit}MACs"


def caption(result: Classification) -> str:
    """One short line: class, tokens, compute."""
    return (
        f"{name(result.top[0])} {result.probability:.1%} · {result.tokens} of "
        f"{result.tokens_dense} tokens · {result.compute:.1%} of the MACs"
    )


def line(path: str, result: Classification) -> str:
    """What an image shows and what it took; the other classes below."""
    seen = f"level {result.level} of {result.exits}, " if result.exits else ""
    if result.stops is not None:
        seen += f"{result.tokens} of {result.tokens_dense} tokens, "
    lines = [
        f"{path}: {name(result.top[0])} {result.probability:.1%}, "
        f"{seen}{macs(result.macs, result.macs_dense)} ({result.compute:.1%}), "
        f"{result.run_seconds * 1e3:.1f} ms"
    ]
    lines += [f"  {label.probability:6.1%}  {name(label)}" for label in result.top[1:]]
    return "\n".join(lines)
