"""Thresholds of early exits and mixed scales for a grid of budgets, from labelled images."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from pyruntime.engine.scale_rules import calibrated_rule
from pyruntime.engine.vision import VisionRuntime
from pyruntime.errors import InvalidInput
from pyruntime.format.spec.scales import ScaleSpec
from pyruntime.gates.exit import NEVER
from pyruntime.gates.policy import ComputePolicy
from pyruntime.profile.calibrate import Calibrated, cheapest_within
from pyruntime.profile.exit_thresholds import Entry, begin, entries, entry
from pyruntime.profile.image_data import ImageSet
from pyruntime.profile.measure import Progress, Ticker
from pyruntime.profile.scale_thresholds import SHARES, scale_thresholds
from pyruntime.profile.vision_answers import Answers, collect

MIN_IMAGES = 16


def calibrate_vision(
    runtime: VisionRuntime,
    data: ImageSet,
    *,
    default_budget: float | None = None,
    max_drop: float | None = None,
    batch: int = 8,
    progress: Progress | None = None,
) -> Calibrated:
    """A record of thresholds over falling budgets; see `exit_thresholds` and `scale_thresholds`.

    A budget is what its thresholds cost on these images: the mean share of the multiply-accumulates
    of the model without exits and with fine patches alone, heads and gates counted. Budget 1.0 is
    that all is fine and no image leaves, and its `kept` is what that costs. Of a model with mixed
    scales those budgets are stored that no cheaper one is as accurate as; without scales budget 1.0
    has the thresholds at which leaving begins. Nothing is written.

    Args:
        default_budget: of requests that name none; without it the checkpoint's own rule holds.
        max_drop: instead, the default is the cheapest budget whose accuracy on the images is at
            most this much (a share, 0.01 is one point) below that of budget 1.0.

    Raises:
        InvalidInput: a model without exits and mixed scales, too few images, an image that cannot
            be used, a default below the smallest budget, or both ways to choose one.
    """
    scales = runtime.spec.scales
    if not runtime.spec.exits and scales is None:
        raise InvalidInput(
            "this model has no exits and no mixed scales: there is nothing to calibrate"
        )
    if default_budget is not None and max_drop is not None:
        raise InvalidInput("give either a default budget or a maximal drop, not both")
    if max_drop is not None and not max_drop >= 0:
        raise InvalidInput(f"the maximal drop must be 0 or more, got {max_drop}")
    ComputePolicy(budget=default_budget)
    if batch < 1:
        raise InvalidInput(f"the batch must be at least 1 image, got {batch}")
    if len(data) < MIN_IMAGES:
        raise InvalidInput(
            f"calibration needs at least {MIN_IMAGES} images, the data has {len(data)}"
        )
    if scales is None:
        found = _of_exits(runtime, data, batch, progress)
    else:
        found = _of_scales(runtime, scales, data, batch, progress)
    budgets = [1.0, *(line.cost for line in found[1:])]
    if default_budget is not None and default_budget < budgets[-1]:
        raise InvalidInput(
            f"default budget {default_budget}: the smallest of this model is {budgets[-1]:g}"
        )
    if max_drop is not None:
        default_budget = cheapest_within(max_drop, budgets, found)
    record = {
        "kind": "exits" if scales is None else "scales",
        "budgets": budgets,
        "thresholds": [line.row for line in found],
        "kept": [line.cost for line in found],
        "samples": len(data),
        "data_sha256": data.sha256,
        "default_budget": default_budget,
    }
    return Calibrated(record, found)


@dataclass(frozen=True, slots=True)
class Line:
    """One budget: what it costs and yields, and the thresholds as they are stored."""

    cost: float
    accuracy: float
    row: list[float | None]


def _of_exits(
    runtime: VisionRuntime, data: ImageSet, batch: int, progress: Progress | None
) -> list[Line]:
    (answers,) = collect(runtime, data, batch, Ticker(len(data.deal(batch)), progress))
    return [_line(found) for found in (entry(answers, begin(answers)), *entries(answers))]


def _of_scales(
    runtime: VisionRuntime,
    scales: ScaleSpec,
    data: ImageSet,
    batch: int,
    progress: Progress | None,
) -> list[Line]:
    parts = len(data.deal(batch))
    tick = Ticker(parts * (len(SHARES) + 3), progress)
    thresholds = [math.inf, *scale_thresholds(runtime, scales, data, batch, tick)]
    rules = [calibrated_rule(scales, threshold) for threshold in thresholds]
    answers = collect(runtime, data, batch, tick, rules)
    whole = _line(_stay(answers[0]), math.inf)
    some = [
        _line(found, threshold)
        for one, threshold in zip(answers, thresholds, strict=True)
        for found in (_stay(one), *(entries(one) if runtime.spec.exits else ()))
    ]
    return [whole, *front(line for line in some if line.cost < 1)]


def front(lines: Iterable[Line]) -> list[Line]:
    """Those that no cheaper one is as accurate as, of falling cost."""
    found: list[Line] = []
    for line in sorted(lines, key=lambda line: (line.cost, -line.accuracy)):
        if not found or line.accuracy > found[-1].accuracy:
            found.append(line)
    return found[::-1]


def _stay(answers: Answers) -> Entry:
    """No image leaves early."""
    return entry(answers, torch.full((len(answers.strict),), NEVER))


def _line(found: Entry, *scale: float) -> Line:
    row = [*scale, *found.thresholds.tolist()]
    return Line(found.cost, found.accuracy, [v if math.isfinite(v) else None for v in row])
