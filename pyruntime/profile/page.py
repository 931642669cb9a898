"""A sweep as people read it: title, table, plot and notes, whatever was swept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

_BUSY = 0.1  # relative interquartile range of the times of one and the same computation


@dataclass(frozen=True, slots=True)
class Point:
    """One policy in the plot: accuracy over the shares of dense work and of dense time."""

    label: str
    accuracy: float
    work: float
    time: float


@dataclass(frozen=True, slots=True)
class Histogram:
    """Where images left: for every named policy the share of each level."""

    levels: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float]]]


@dataclass(frozen=True, slots=True)
class Page:
    """What is shown of a sweep.

    Attributes:
        table: headers, then the cells of every row.
        accuracy: what the plot's points are accurate in.
        labels: what the points are labelled with.
    """

    title: str
    table: Sequence[Sequence[str]]
    notes: Sequence[str]
    accuracy: str
    labels: str
    points: Sequence[Point]
    histogram: Histogram | None = None


class Reported(Protocol):
    """A finished sweep."""

    def page(self) -> Page:
        """For people."""
        ...

    def plain(self) -> dict[str, Any]:
        """Every number, unrounded: plain JSON values."""
        ...


def busy(noise: float) -> list[str]:
    """The note to add when the machine's times cannot be trusted."""
    if noise <= _BUSY:
        return []
    return [
        f"This machine was busy: the middle half of the dense runs spans {noise:.0%} of their "
        "median. Conclude nothing from these times; repeat on an idle machine."
    ]
