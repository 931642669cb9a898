"""Thresholds at which given shares of the images leave at each exit.

The scheme of MSDNet's budgeted batches (arXiv 1703.09844), as networkslab/dynn has it: exit k gets
a share proportional to p^k, the final head included; a small p sends images out early. Their grid
ends where half of the images still leave early; ours goes on, for small drops of accuracy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyruntime.gates.exit import NEVER
from pyruntime.profile.vision_answers import Answers, leaves

POWERS = (*(step / 20 for step in range(1, 40)), 2.5, 3.0, 4.0, 6.0, 10.0, 20.0, 50.0)


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One line of a calibration record.

    Attributes:
        cost: mean share of the dense multiply-accumulates.
        accuracy: share of right answers.
        thresholds: float32 [G]; NaN: never.
    """

    cost: float
    accuracy: float
    thresholds: Tensor


def entries(answers: Answers) -> list[Entry]:
    """The thresholds of all powers whose cost is below 1, of falling cost; each cost once."""
    best: dict[float, Entry] = {}
    for power in POWERS:
        found = entry(answers, budgeted(answers, power))
        known = best.get(found.cost)
        if found.cost < 1 and (known is None or known.accuracy < found.accuracy):
            best[found.cost] = found
    return [best[cost] for cost in sorted(best, reverse=True)]


def entry(answers: Answers, thresholds: Tensor) -> Entry:
    """What thresholds cost and yield on the images themselves."""
    levels = answers.levels(thresholds)
    return Entry(answers.cost(levels), answers.accuracy(levels), thresholds)


def budgeted(answers: Answers, power: float) -> Tensor:
    """Thresholds float32 [G] at which exit k releases its share of all images, the surest first."""
    total, exits = answers.confidence.shape
    weights = [power**exit_ for exit_ in range(exits + 1)]
    here = torch.ones(total, dtype=torch.bool)
    found = begin(answers)
    for exit_ in range(exits):
        count = math.floor(total * weights[exit_] / sum(weights))
        confidence, strict = answers.confidence[:, exit_], answers.strict[exit_]
        if not bool(confidence[here].isnan().all()):  # else nobody is there who could leave
            found[exit_] = cut(confidence[here], count, strict)
        here &= ~leaves(confidence, found[exit_], strict)
    return found


def begin(answers: Answers) -> Tensor:
    """Thresholds float32 [G] just beyond the surest image of each exit: where leaving begins."""
    pairs = zip(answers.confidence.T, answers.strict, strict=True)
    return torch.tensor([cut(confidence, 0, strict) for confidence, strict in pairs])


def cut(confidence: Tensor, count: int, strict: bool) -> float:
    """The threshold that releases `count` of these images, the surest first; NaN: none can leave.

    It lies in the middle between the last that leaves and the first that stays, so that rounding
    elsewhere moves nobody. Images of equal confidence leave together or stay together, whichever is
    nearer to `count`.

    Args:
        confidence: float32 [m]; NaN never leaves.
    """
    values, sizes = confidence[~confidence.isnan()].unique(return_counts=True)
    values, gone = values.flip(0), sizes.flip(0).cumsum(0)  # the surest first
    if not len(values):
        return NEVER
    # How many of the values leave: none, or those up to one of them.
    leaving = int((torch.cat([gone.new_zeros(1), gone]) - count).abs().argmin())
    if leaving == 0:
        surest = values[0]
        return float(surest if strict else surest.nextafter(torch.tensor(math.inf)))
    last = values[leaving - 1]
    if leaving == len(values):
        return float(last.nextafter(torch.tensor(-math.inf)) if strict else last)
    first = values[leaving]
    middle = first + (last - first) / 2
    if not first < middle < last:  # neighbours, or infinite
        middle = first if strict else last
    return float(middle)
