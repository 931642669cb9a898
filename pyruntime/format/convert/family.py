"""What a model family tells the converter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from pyruntime.format.convert.checkpoint import Checkpoint
from pyruntime.format.convert.config import Config
from pyruntime.format.spec import ModelSpec

# Our module -> the modules whose rows it holds, one after the other; {i} is the layer, and where
# {e} appears, the list is repeated for every expert.
Modules = Mapping[str, tuple[str, ...]]


def as_stored(weights: Checkpoint) -> Checkpoint:
    """The view of families whose tensors can be used as they lie in the files."""
    return weights


@dataclass(frozen=True, slots=True)
class Reading:
    """A config.json, understood.

    `view` adds the tensors that `modules` names but no file has; `copies` maps a tensor that may be
    there to the one it must equal.
    """

    spec: ModelSpec
    modules: Modules
    view: Callable[[Checkpoint], Checkpoint] = as_stored
    notes: tuple[str, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)


class Family(Protocol):
    """A module of this package, one for each family."""

    ARCHITECTURE: str

    def read(self, config: Config) -> Reading:
        """config.json -> Reading."""
