"""How well a policy classifies, how sure it is of it, and what that took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyruntime.engine.vision import VisionOutput, VisionRuntime

BINS = 15  # of equal numbers of images, as in the code of JEI-DNN


@dataclass(frozen=True, slots=True)
class ExitQuality:
    """Of one policy on all images.

    Attributes:
        images: how many.
        accuracy: share of right answers.
        calibration_error: expected difference between the probability of the answers and the share
            of right ones; see `calibration_error`.
        mean_level: where images left, counted from 0; the number of exits is the final head.
        histogram: share of the images that left at each exit, then at the final head.
        macs_executed, macs_dense: multiply-accumulates up to where each image left, and of the
            model without exits.
        repo_metric: what JEI-DNN's code reports ("Mul-Adds", relative to its final head); None for
            other criteria.
    """

    images: int
    accuracy: float
    calibration_error: float
    mean_level: float
    histogram: Sequence[float]
    macs_executed: int
    macs_dense: int
    repo_metric: float | None

    @property
    def macs_saved(self) -> float:
        """Share of the dense work that was not executed; negative when gates cost more."""
        return 1.0 - self.macs_executed / self.macs_dense


class Tally:
    """Adds up what a policy did, batch by batch.

    Attributes:
        levels: int64 [B] of every batch.
    """

    def __init__(self, runtime: VisionRuntime) -> None:
        self.levels: list[Tensor] = []
        self._runtime = runtime
        self._macs: list[Tensor] = []
        self._correct: list[Tensor] = []
        self._sure: list[Tensor] = []

    def add(self, output: VisionOutput, labels: Tensor) -> None:
        """A batch that ran with exits."""
        self._add(output.logits, labels, output.levels.long(), output.trace.macs_per_image)

    def add_dense(self, logits: Tensor, labels: Tensor) -> None:
        """A batch that ran without: logits float32 [B, C]."""
        levels = torch.full((len(labels),), self._runtime.exits)
        self._add(logits, labels, levels, torch.full_like(levels, self._runtime.macs_dense))

    def quality(self) -> ExitQuality:
        """Of all batches so far, at least one."""
        levels, correct = torch.cat(self.levels), torch.cat(self._correct)
        exits, images = self._runtime.exits, len(levels)
        shares = levels.bincount(minlength=exits + 1).double() / images
        return ExitQuality(
            images=images,
            accuracy=float(correct.double().mean()),
            calibration_error=calibration_error(torch.cat(self._sure), correct),
            mean_level=float(levels.double().mean()),
            histogram=tuple(shares.tolist()),
            macs_executed=int(torch.cat(self._macs).sum()),
            macs_dense=images * self._runtime.macs_dense,
            repo_metric=self._repo_metric(shares),
        )

    def macs_of_first(self, images: int) -> int:
        """Multiply-accumulates of so many images that came first."""
        return int(torch.cat(self._macs)[:images].sum())

    def _add(self, logits: Tensor, labels: Tensor, levels: Tensor, macs: Tensor) -> None:
        sure, answers = logits.softmax(1).max(1)
        self.levels.append(levels)
        self._macs.append(macs)
        self._correct.append(answers == labels)
        self._sure.append(sure)

    def _repo_metric(self, shares: Tensor) -> float | None:
        if any(exit_.criterion != "jei_dnn" for exit_ in self._runtime.spec.exits):
            return None
        cost = self._runtime.model.cost
        costs = torch.tensor([cost.repo_metric(level) for level in range(len(shares))])
        return float((shares * costs).sum() / costs[-1])


def calibration_error(sure: Tensor, correct: Tensor, bins: int = BINS) -> float:
    """Expected calibration error with bins of equal numbers of images.

    The mean over bins, weighted by their images, of the difference between the mean probability of
    the answers and the share of right ones.

    Args:
        sure: float32 [n], probability of each answer; those that are not finite count as 0.
        correct: bool [n].
    """
    order = sure.nan_to_num(0.0).argsort(stable=True)
    gaps = (sure.nan_to_num(0.0).double() - correct.double())[order]
    return float(sum(part.sum().abs() for part in gaps.tensor_split(bins))) / len(sure)
