"""Thresholds of early exits for a grid of budgets, from one pass over labelled images."""

from __future__ import annotations

from pyruntime.engine.vision import VisionRuntime
from pyruntime.errors import InvalidInput
from pyruntime.gates.policy import ComputePolicy
from pyruntime.profile.calibrate import Calibrated, cheapest_within
from pyruntime.profile.exit_answers import collect
from pyruntime.profile.exit_thresholds import begin, entries, entry
from pyruntime.profile.image_data import ImageSet
from pyruntime.profile.measure import Progress, Ticker

MIN_IMAGES = 16


def calibrate_exits(
    runtime: VisionRuntime,
    data: ImageSet,
    *,
    default_budget: float | None = None,
    max_drop: float | None = None,
    batch: int = 8,
    progress: Progress | None = None,
) -> Calibrated:
    """A record of thresholds over falling budgets; see `exit_thresholds`.

    A budget is what its thresholds cost on these images: the mean share of the multiply-accumulates
    of the model without exits, heads and gates counted. Budget 1.0 is that no image leaves; its
    thresholds are those at which leaving begins, and its `kept` is what that costs. Nothing is
    written.

    Args:
        default_budget: of requests that name none; without it the checkpoint's own rule holds.
        max_drop: instead, the default is the cheapest budget whose accuracy on the images is at
            most this much (a share, 0.01 is one point) below that of budget 1.0.

    Raises:
        InvalidInput: a model without exits, too few images, an image that cannot be used, a default
            below the smallest budget, or both ways to choose one.
    """
    if not runtime.spec.exits:
        raise InvalidInput("this model has no exits: there is nothing to calibrate")
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
    answers = collect(runtime, data, batch, Ticker(len(data.deal(batch)), progress))
    never = entry(answers, begin(answers))
    found = [never, *entries(answers)]
    budgets = [1.0, *(line.cost for line in found[1:])]
    if default_budget is not None and default_budget < budgets[-1]:
        raise InvalidInput(
            f"default budget {default_budget}: the smallest of this model is {budgets[-1]:g}"
        )
    if max_drop is not None:
        default_budget = cheapest_within(max_drop, budgets, found)
    record = {
        "kind": "exits",
        "budgets": budgets,
        "thresholds": [[None if t != t else t for t in line.thresholds.tolist()] for line in found],
        "kept": [line.cost for line in found],
        "samples": len(data),
        "data_sha256": data.sha256,
        "default_budget": default_budget,
    }
    return Calibrated(record, found)
