"""The answer to one image: classes, how fine and how deep it was looked at, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pyruntime.gates.policy import ComputePolicy
from pyruntime.gates.scale_layout import ScaleGrid
from pyruntime.gates.vision_trace import ratio_map


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
        tokens: rows that it began with: prefix rows and patches of any scale.
        tokens_dense: those of the image all fine.
        grid: where its patches of all scales could lie.
        stops: bool [C], which coarser patches were not divided, see `VisionTrace.stops`; None in a
            model of one scale.
        macs: multiply-accumulates up to where it left.
        macs_dense: those of the model without exits, all patches fine.
        policy: what was asked for.
        queue_seconds: from submission to the start of its first batch.
        run_seconds: from there to the answer, waiting between stages included.
    """

    top: tuple[Label, ...]
    logits: Tensor
    level: int
    exits: int
    tokens: int
    tokens_dense: int
    grid: ScaleGrid
    stops: Tensor | None
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
    def ratios(self) -> Tensor | None:
        """int32 [rows, columns], for every finest patch the side, in finest patches, of the patch
        that stands for it; None in a model of one scale."""
        return None if self.stops is None else ratio_map(self.grid, self.stops)

    @property
    def regions(self) -> Tensor | None:
        """bool [rows, columns] of the coarsest patches, True where finer ones stand for it; None in
        a model of one scale."""
        ratios = self.ratios
        if ratios is None:
            return None
        step = self.grid.ratios[-1]
        return ratios[::step, ::step] < step

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
