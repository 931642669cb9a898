"""How long the parts of a model take for n images, measured on the loaded model when first asked.

Timing noise can never change a result: what is decided with these numbers is only whether images
that have left are moved out of the way, and whether others wait for company. Images of fewer rows
than the model's own count as less than one: by the share of its multiply-accumulates; see `work`.
"""

from __future__ import annotations

import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyruntime.gates.exit import NEVER, ExitState
from pyruntime.layers.packed import Packed
from pyruntime.models.vision_cost import block_macs
from pyruntime.models.vit import VisionTransformer

_COUNTS = (1, 2, 4, 8, 16)
_REPEATS = 3
_PART_SECONDS = 0.2  # a part is measured for more images until this much time is spent on it
_WORTH = 0.1  # waiting for company must save this share of the time of going on alone

Prepare = Callable[[int], Callable[[], object]]


class StageTimes:
    """Seconds of each part of a model, interpolated between the measured numbers of images.

    Beyond the largest measured number the last slope goes on. All blocks but the last one are
    taken to be alike.
    """

    def __init__(
        self,
        model: VisionTransformer,
        counts: Sequence[int] = _COUNTS,
        part_seconds: float = _PART_SECONDS,
    ) -> None:
        self.model = model
        self._last = len(model.stages) - 1
        self._shortest = min(range(max(self._last, 1)), key=lambda s: len(model.stages[s]))
        self._counts = tuple(counts)
        self._part_seconds = part_seconds
        self._curves: dict[str, list[tuple[int, float]]] = {}
        self._targets: dict[tuple[int, int], int] = {}
        self._works: dict[int, float] = {}
        self._one: Packed | None = None

    def measure(self) -> None:
        """Measure every part now, so that no request has to wait for it."""
        for part in self._parts():
            self._at(part, 1)

    def work(self, lengths: Sequence[int]) -> float:
        """How many images of the model's own size have as many multiply-accumulates in a block as
        images of so many rows."""
        for length in set(lengths).difference(self._works):
            macs = block_macs(self.model.spec, length, length)
            self._works[length] = macs / self.model.cost.block
        return sum(self._works[length] for length in lengths)

    def stage(self, stage: int, count: float) -> float:
        """The blocks of one stage for `count` images."""
        if stage == self._last:
            return self._at("last", count)
        blocks = len(self.model.stages[stage]) / len(self.model.stages[self._shortest])
        return blocks * self._at("shortest", count)

    def rest(self, stage: int, count: float) -> float:
        """All stages from `stage` on."""
        return sum(self.stage(s, count) for s in range(stage, self._last + 1))

    def exit(self, count: float) -> float:
        """Head, gate and plan of an exit."""
        return self._at("exit", count)

    def move(self, count: float) -> float:
        """Moving the rows of `count` images together, out of twice as many."""
        return self._at("move", count)

    def compaction_pays(self, stage: int, before: float, after: float) -> bool:
        """Whether the stages from `stage` on gain more from less work than moving it takes."""
        if not 0 < after < before:
            return False
        return self.rest(stage, before) - self.rest(stage, after) > self.move(after)

    def target(self, stage: int, most: int) -> int:
        """The fewest images in front of a stage that need not wait for company; at most `most`.

        What waits runs in a full wave later, at a full wave's time per image, and is moved once
        more; see `rebatching_threshold`.
        """
        key = (stage, most)
        if key not in self._targets:
            deep = self.stage(stage, most)

            def alone(count: int) -> float:
                return self.stage(stage, count) * (1 - _WORTH) - self.move(count)

            goes_on = (n for n in range(1, most)
                       if most - n <= rebatching_threshold(0.0, deep, alone(n), most))  # fmt: skip
            self._targets[key] = next(goes_on, most)
        return self._targets[key]

    def dense(self, count: float) -> float:
        """The model without exits."""
        if count == 0:
            return 0.0
        return self._at("stem", count) + self.rest(0, count) + self._at("head", count)

    def ideal(self, levels: Sequence[int] | Tensor, works: Sequence[float] | None = None) -> float:
        """One batch whose images leave at `levels`, compacted at every exit where some do.

        Every part takes its measured time, for the images that are still there.

        Args:
            works: of each image; see `work`. None: all are of full length.
        """
        reached = torch.as_tensor(levels)
        if works is None:
            each = torch.ones(len(reached), dtype=torch.float64)
        else:
            each = torch.tensor(works, dtype=torch.float64)
        alive = [float(each[reached >= level].sum()) for level in range(self._last + 1)]
        if not alive[0]:
            return 0.0
        total = self._at("stem", alive[0]) + self._at("head", alive[-1])
        for stage, count in enumerate(alive):
            total += self.stage(stage, count)
            if stage < self._last and count:
                total += self.exit(count)
                after = alive[stage + 1]
                total += self.move(after) if after < count else 0.0
        return total

    def _at(self, part: str, count: float) -> float:
        if count <= 0:
            return 0.0
        if part not in self._curves:
            self._curves[part] = self._measure(self._parts()[part])
        curve = self._curves[part]
        right = min(max(bisect_left(curve, (count, 0.0)), 1), len(curve) - 1)
        if count < curve[0][0]:
            return curve[0][1] * count / curve[0][0]
        if len(curve) == 1:
            return curve[0][1]
        (n0, t0), (n1, t1) = curve[right - 1], curve[right]
        return t0 + (count - n0) * (t1 - t0) / (n1 - n0)

    def _measure(self, prepare: Prepare) -> list[tuple[int, float]]:
        curve: list[tuple[int, float]] = []
        started = time.perf_counter()
        for count in self._counts:
            _seconds(prepare(count))
            found = statistics.median(_seconds(prepare(count)) for _ in range(_REPEATS))
            curve.append((count, found))
            if len(curve) > 1 and time.perf_counter() - started > self._part_seconds:
                break
        # Fewer images never take longer: what says so was disturbed.
        for i in range(len(curve) - 2, -1, -1):
            curve[i] = (curve[i][0], min(curve[i][1], curve[i + 1][1]))
        return curve

    def _parts(self) -> dict[str, Prepare]:
        model, spec = self.model, self.model.spec
        generator = torch.Generator().manual_seed(0)  # the caller's seed is not ours to advance
        shape = (1, len(spec.preprocess.mean), *spec.image_size)
        picture = torch.randn(shape, generator=generator)
        if self._one is None:
            self._one = model.embed(picture)
        one = self._one

        def rows(count: int) -> Packed:
            whole = Packed.join([one] * count)
            return replace(one, x=one.x.clone()) if count == 1 else whole

        def stem(count: int) -> Callable[[], object]:
            pictures = picture.repeat(count, 1, 1, 1)
            return lambda: model.embed(pictures)

        def run(stage: int) -> Prepare:
            def prepare(count: int) -> Callable[[], object]:
                packed = rows(count)
                return lambda: model.run_stage(packed, stage)

            return prepare

        def exit_(count: int) -> Callable[[], object]:
            packed = rows(count)
            state = ExitState.start(count, spec.num_classes, spec.exits)
            limits = torch.full((count, 2), NEVER)
            return lambda: model.exit(0, packed, state, limits)

        def move(count: int) -> Callable[[], object]:
            packed = rows(2 * count)
            every_second = torch.tensor([-1, 0] * count, dtype=torch.int32)
            return lambda: packed.select(model.ops, model.ops.plan_partition(every_second, 1))

        def head(count: int) -> Callable[[], object]:
            packed = rows(count)
            return lambda: model.classify(packed)

        return {
            "stem": stem,
            "shortest": run(self._shortest),
            "last": run(self._last),
            "exit": exit_,
            "move": move,
            "head": head,
        }


def rebatching_threshold(shallow: float, deep: float, full: float, batch: int) -> float:
    """How many rows of a batch must leave before the others should wait to be batched anew.

    The adaptive re-batching threshold of DREX: with b' of b rows leaving, splitting takes
    ``shallow + (1 - b' / b) * deep`` per batch, since those that stay share a later full batch of
    the deep part; going on takes `full`. Splitting wins iff b' exceeds the result.
    """
    return batch * (shallow + deep - full) / deep


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
