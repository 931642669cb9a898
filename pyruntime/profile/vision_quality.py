"""How well a policy classifies, how sure it is of it, and what that took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyruntime.engine.vision import VisionOutput, VisionRuntime

BINS = 15  # of equal numbers of images, as in the code of JEI-DNN


@dataclass(frozen=True, slots=True)
class VisionQuality:
    """Of one policy on all images.

    Attributes:
        images: how many.
        accuracy: share of right answers.
        calibration_error: expected difference between the probability of the answers and the share
            of right ones; see `calibration_error`.
        mean_level: where images left, counted from 0; the number of exits is the final head.
        histogram: share of the images that left at each exit, then at the final head.
        mean_tokens: rows that an image began with: prefix rows and patches of any scale.
        macs_executed, macs_dense: multiply-accumulates up to where each image left, and of the
            model without exits, all patches fine.
        repo_metric: what JEI-DNN's code reports ("Mul-Adds", relative to its final head); None for
            other criteria, and with mixed scales.
    """

    images: int
    accuracy: float
    calibration_error: float
    mean_level: float
    histogram: Sequence[float]
    mean_tokens: float
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
        works: of every batch, what its images are worth; see `StageTimes.work`.
    """

    def __init__(self, runtime: VisionRuntime) -> None:
        self.levels: list[Tensor] = []
        self.works: list[list[float]] = []
        self._runtime = runtime
        self._macs: list[Tensor] = []
        self._tokens: list[Tensor] = []
        self._correct: list[Tensor] = []
        self._sure: list[Tensor] = []

    def add(self, output: VisionOutput, labels: Tensor) -> None:
        """A batch that ran under a policy."""
        trace = output.trace
        self._add(output.logits, labels, output.levels.long(), trace.macs_per_image, trace.tokens)

    def add_dense(self, logits: Tensor, labels: Tensor) -> None:
        """A batch that ran without exits and coarser patches: logits float32 [B, C]."""
        spec = self._runtime.spec
        levels = torch.full((len(labels),), self._runtime.exits)
        macs = torch.full_like(levels, self._runtime.macs_dense)
        tokens = torch.full_like(levels, spec.tokens)
        self._add(logits, labels, levels, macs, tokens)

    def quality(self) -> VisionQuality:
        """Of all batches so far, at least one."""
        levels, correct = torch.cat(self.levels), torch.cat(self._correct)
        exits, images = self._runtime.exits, len(levels)
        shares = levels.bincount(minlength=exits + 1).double() / images
        return VisionQuality(
            images=images,
            accuracy=float(correct.double().mean()),
            calibration_error=calibration_error(torch.cat(self._sure), correct),
            mean_level=float(levels.double().mean()),
            histogram=tuple(shares.tolist()),
            mean_tokens=float(torch.cat(self._tokens).double().mean()),
            macs_executed=int(torch.cat(self._macs).sum()),
            macs_dense=images * self._runtime.macs_dense,
            repo_metric=self._repo_metric(shares),
        )

    def macs_of_first(self, images: int) -> int:
        """Multiply-accumulates of so many images that came first."""
        return int(torch.cat(self._macs)[:images].sum())

    def _add(
        self, logits: Tensor, labels: Tensor, levels: Tensor, macs: Tensor, tokens: Tensor
    ) -> None:
        sure, answers = logits.softmax(1).max(1)
        times = self._runtime.times
        self.works.append([times.work([length]) for length in tokens.tolist()])
        self._tokens.append(tokens)
        self.levels.append(levels)
        self._macs.append(macs)
        self._correct.append(answers == labels)
        self._sure.append(sure)

    def _repo_metric(self, shares: Tensor) -> float | None:
        spec = self._runtime.spec
        if spec.scales is not None or any(exit_.criterion != "jei_dnn" for exit_ in spec.exits):
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
