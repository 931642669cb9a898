"""The answer to one image: classes, where it left the network, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pyruntime.gates.policy import ComputePolicy


@dataclass(frozen=True, slots=True)
class Label:
    """One class.

    Attributes:
        index: of the logit.
        name: as the checkpoint calls it, None where it names none.
        probability: softmax over all classes.
    """

    index: int
    name: str | None
    probability: float


@dataclass(frozen=True, slots=True, eq=False)
class Classification:
    """Result of one image.

    Attributes:
        top: the likeliest classes, the best first; of equal ones the lower index.
        logits: float32 [C].
        level: the exit it left at, counted from 0; `exits` for the final head.
        exits: how many exits the model has.
        macs: multiply-accumulates up to where it left.
        macs_dense: those of the model without exits.
        policy: what was asked for.
        queue_seconds: from submission to the start of its first batch.
        run_seconds: from there to the answer, waiting between stages included.
    """

    top: tuple[Label, ...]
    logits: Tensor
    level: int
    exits: int
    macs: int
    macs_dense: int
    policy: ComputePolicy
    queue_seconds: float
    run_seconds: float

    @property
    def label(self) -> int:
        """Index of the likeliest class."""
        return self.top[0].index

    @property
    def name(self) -> str | None:
        """Name of the likeliest class."""
        return self.top[0].name

    @property
    def probability(self) -> float:
        """Of the likeliest class."""
        return self.top[0].probability

    @property
    def compute(self) -> float:
        """Executed over dense multiply-accumulates; above 1 where heads cost more than save."""
        return self.macs / self.macs_dense


def best_labels(logits: Tensor, names: Sequence[str], most: int) -> list[tuple[Label, ...]]:
    """The likeliest classes of every row of logits [n, C]; at most `most`, and at least one."""
    ranked = logits.softmax(1).sort(dim=1, descending=True, stable=True)
    values, indices = ranked.values[:, :most].tolist(), ranked.indices[:, :most].tolist()
    return [
        tuple(
            Label(index, names[index] if names else None, value)
            for index, value in zip(row, probabilities, strict=True)
        )
        for row, probabilities in zip(indices, values, strict=True)
    ]
