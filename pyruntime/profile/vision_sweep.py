"""Policies of exits and scales against the dense model: accuracy, exact work, measured time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from pyruntime.engine.images import Preprocessor
from pyruntime.engine.vision import VisionRuntime
from pyruntime.errors import InvalidInput
from pyruntime.format.spec import VisionSpec
from pyruntime.gates.policy import ComputePolicy, ExitPolicy, ScalePolicy
from pyruntime.profile import vision_page
from pyruntime.profile.image_data import ImageSet
from pyruntime.profile.measure import Progress, Ticker
from pyruntime.profile.page import Page
from pyruntime.profile.timing import LEAST_SAVED, Timed, alternate, machine
from pyruntime.profile.vision_quality import Tally, VisionQuality

# What can be swept beside the budget: thresholds and other fields of a policy.
EXIT_AXES = ("exit", "tau", "level")
SCALE_AXES = ("scales", "tokens")
_TIMED_IMAGES = 32  # at least, where there are that many: a single batch is no fair sample


@dataclass(frozen=True, slots=True)
class VisionRow:
    """One policy.

    Attributes:
        rule: "dense" (no exits, all patches fine), "own" (the checkpoint's rule), "coarse" (all
            patches coarse), or the axis.
        value: on the axis, or None.
        timed: of the timed images, whose work is counted up to where they left.
        ideal_share: time that their batches would take over that of the dense model if every
            part took its measured time for the images still there and nothing else cost any, an
            image of fewer patches in proportion to its work; see `StageTimes.ideal`.
    """

    rule: str
    value: float | None
    quality: VisionQuality
    timed: Timed
    ideal_share: float

    @property
    def realised(self) -> float | None:
        """Time saved over what could be saved at best, by measured times; None where that is
        next to nothing. `Timed.realised` is the same by multiply-accumulates."""
        best = 1.0 - self.ideal_share
        return self.timed.time_saved / best if best >= LEAST_SAVED else None


@dataclass(frozen=True, slots=True)
class VisionReport:
    """A sweep.

    Attributes:
        axis: what was varied: "budget", one of EXIT_AXES or one of SCALE_AXES.
        rows: the dense model, the checkpoint's own rule, all coarse where there are scales, then
            every value.
        setting: what was measured on what, plain JSON values.
        noise: see `Clock.noise`.
    """

    axis: str
    rows: Sequence[VisionRow]
    setting: dict[str, str | int | float]
    noise: float

    def page(self) -> Page:
        """See `Reported`."""
        return vision_page.page(self)

    def plain(self) -> dict[str, Any]:
        """See `Reported`."""
        return vision_page.plain(self)


def sweep_vision(
    runtime: VisionRuntime,
    data: ImageSet,
    values: Sequence[float],
    *,
    axis: str = "budget",
    batch: int = 8,
    repeats: int = 7,
    progress: Progress | None = None,
) -> VisionReport:
    """The checkpoint's own rule and every value, against the backbone alone.

    Accuracy and work are of all images, counted up to where each left. Time is of some batches of
    `batch` images, run by the same code in turn with the backbone (A B A B …); there the images
    that have left may be carried on, where moving the others would have taken longer.

    Args:
        values: budgets, thresholds, taus, levels or numbers of tokens, as `axis` says; see
            `ExitPolicy` and `ScalePolicy`. What the axis does not touch is the checkpoint's own.

    Raises:
        InvalidInput: a policy the model cannot honour, before anything runs; an image that cannot
            be used.
    """
    spec = runtime.spec
    if not spec.exits and spec.scales is None:
        raise InvalidInput("this model has no exits and no mixed scales: there is nothing to sweep")
    if not values:
        raise InvalidInput(f"a sweep needs at least one {axis}")
    for name, number in (("repeats", repeats), ("batch", batch)):
        if number < 1:
            raise InvalidInput(f"{name} must be at least 1, got {number}")
    # Without the calibration's default budget.
    own = VisionRuntime(replace(runtime.container, calibration=None))
    own.times = runtime.times
    names: list[tuple[str, float | None]] = [("own", None)]
    arms = [(own, ComputePolicy())]
    if spec.scales is not None:
        names.append(("coarse", None))
        arms.append((own, ComputePolicy(scales="all_coarse")))
    names += [(axis, value) for value in values]
    arms += [(runtime if axis == "budget" else own, _policy(spec, axis, v)) for v in values]
    for model, policy in arms:
        model.resolve(policy)
        model.rules.check(model.rule(policy), *spec.image_size)

    preprocess = Preprocessor(spec.preprocess, spec.image_size)
    parts = data.deal(batch)
    tick = Ticker(len(parts) + repeats * len(arms), progress)
    dense, tallies = Tally(runtime), [Tally(runtime) for _ in arms]
    clocked: list[Tensor] = []
    for numbers in parts:
        images, labels = data.batch(preprocess, numbers)
        dense.add_dense(runtime.model.forward(images), labels)
        for (model, policy), tally in zip(arms, tallies, strict=True):
            tally.add(model.forward(images, policy, compaction="always"), labels)
        if sum(map(len, clocked)) < _TIMED_IMAGES:
            clocked.append(images)
        tick()

    # Measures how long the parts take, so that no timed run has to.
    full = sum(runtime.times.dense(len(images)) for images in clocked)
    for model, policy in arms:
        _seconds(model, clocked, policy)
    clock = alternate(
        partial(_seconds_dense, runtime, clocked),
        [partial(_seconds, model, clocked, policy) for model, policy in arms],
        repeats,
        tick,
    )
    count = sum(map(len, clocked))
    whole = runtime.macs_dense * count
    usual = Timed(clock.usual, clock.usual, whole, whole)
    rows = [VisionRow("dense", None, dense.quality(), usual, 1.0)]
    for i, ((rule, value), tally) in enumerate(zip(names, tallies, strict=True)):
        timed = clock.timed(i, tally.macs_of_first(count), whole)
        batches = list(zip(tally.levels, tally.works, strict=True))[: len(clocked)]
        ideal = sum(runtime.times.ideal(levels, works) for levels, works in batches)
        rows.append(VisionRow(rule, value, tally.quality(), timed, ideal / full))
    setting: dict[str, str | int | float] = {
        "model": str(runtime.container.path),
        "dtype": spec.dtype,
        "criterion": ", ".join(sorted({exit_.criterion for exit_ in spec.exits})),
        "exits": len(spec.exits),
        "tokens": spec.tokens,
        "scales": "" if spec.scales is None else spec.scales.source,
        "images": len(data),
        "data_sha256": data.sha256,
        "timed_images": count,
        "batch": batch,
        "repeats": repeats,
        **machine(runtime.model.ops),
    }
    return VisionReport(axis, rows, setting, clock.noise)


def _policy(spec: VisionSpec, axis: str, value: float) -> ComputePolicy:
    known = ["budget"]
    known += EXIT_AXES if spec.exits else ()
    known += SCALE_AXES if spec.scales is not None else ()
    if axis not in known:
        raise InvalidInput(f"a sweep of this model varies one of {', '.join(known)}, not {axis!r}")
    if axis == "budget":
        return ComputePolicy(budget=value)
    if axis in SCALE_AXES:
        field = "threshold" if axis == "scales" else axis
        return ComputePolicy(scales=ScalePolicy.of({field: value}))
    field = "threshold" if axis == "exit" else axis
    return ComputePolicy(exit=ExitPolicy.of({field: value}))


def _seconds_dense(runtime: VisionRuntime, batches: Sequence[Tensor]) -> float:
    start = time.perf_counter()
    for images in batches:
        runtime.model.forward(images)
    return time.perf_counter() - start


def _seconds(runtime: VisionRuntime, batches: Sequence[Tensor], policy: ComputePolicy) -> float:
    start = time.perf_counter()
    for images in batches:
        runtime.forward(images, policy)
    return time.perf_counter() - start
