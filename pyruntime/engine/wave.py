"""Images that go through a model together, one stage after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from pyruntime.engine.patches import Patches
from pyruntime.gates.exit import ExitState
from pyruntime.layers.packed import Packed
from pyruntime.models.vit import VisionTransformer


@dataclass(frozen=True, slots=True, eq=False)
class Wave:
    """n images in front of the same stage.

    Attributes:
        stage: the one they are in front of.
        packed: their rows.
        state: what they carry from exit to exit.
        limits: float32 [n, G, 2], see `pyruntime.gates.exit.own_limits`.
        ids: int64 [n], who they are.
        macs: int64 [n], multiply-accumulates executed for each so far; `advance` mutates it.
        live: bool [n], False for those that have left and are carried on; None when all are live.
    """

    stage: int
    packed: Packed
    state: ExitState
    limits: Tensor
    ids: Tensor
    macs: Tensor
    live: Tensor | None = None

    @staticmethod
    @torch.inference_mode()
    def start(model: VisionTransformer, patches: Patches, limits: Tensor, ids: Tensor) -> Wave:
        """n images, at least 1, in front of the first stage."""
        spec = model.spec
        state = ExitState.start(len(ids), spec.num_classes, spec.exits)
        packed = model.embed(patches.images, patches.choice)
        return Wave(0, packed, state, limits, ids, patches.macs(model))

    @property
    def count(self) -> int:
        """n, with those that are carried on."""
        return self.packed.count

    @property
    def live_count(self) -> int:
        """Images that have not left."""
        return self.count if self.live is None else int(self.live.sum())

    @property
    def live_lengths(self) -> list[int]:
        """Rows of each of them."""
        if self.live is None:
            return self.packed.lengths
        pairs = zip(self.packed.lengths, self.live.tolist(), strict=True)
        return [length for length, live in pairs if live]

    @torch.inference_mode()
    def compacted(self, ops: ModuleType) -> Wave:
        """The live images alone, in order; their rows move to the front (`packed.x` is mutated)."""
        if self.live is None:
            return self
        plan = ops.plan_partition(torch.where(self.live, 0, -1).int(), 1)
        return Wave(
            self.stage,
            self.packed.select(ops, plan),
            self.state.select(plan),
            self.limits[self.live],
            self.ids[self.live],
            self.macs[self.live],
        )

    def trimmed(self, ops: ModuleType) -> Wave:
        """The same images in at most twice the memory they need: the wave may wait for long."""
        x = self.packed.x
        needed = sum(self.live_lengths) * x.shape[1] * x.element_size()
        if x.untyped_storage().nbytes() <= 2 * needed:
            return self
        wave = self.compacted(ops)
        return replace(wave, packed=replace(wave.packed, x=wave.packed.x.clone()))

    @staticmethod
    @torch.inference_mode()
    def join(ops: ModuleType, waves: Sequence[Wave]) -> Wave:
        """The images of waves in front of one stage, in order, without those that have left; a
        single wave is returned as it is."""
        if len(waves) == 1:
            return waves[0]
        waves = [wave.compacted(ops) for wave in waves]
        return Wave(
            waves[0].stage,
            Packed.join([wave.packed for wave in waves]),
            ExitState.join([wave.state for wave in waves]),
            torch.cat([wave.limits for wave in waves]),
            torch.cat([wave.ids for wave in waves]),
            torch.cat([wave.macs for wave in waves]),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Leavers:
    """Images that have left at one level.

    Attributes:
        level: the exit; the number of exits for the final head.
        ids: int64 [m].
        logits: float32 [m, C].
        macs: int64 [m], multiply-accumulates executed for each.
    """

    level: int
    ids: Tensor
    logits: Tensor
    macs: Tensor


@torch.inference_mode()
def advance(model: VisionTransformer, wave: Wave) -> tuple[Leavers | None, Wave | None]:
    """Run the stage that a wave is in front of, and the head behind it.

    The wave and its rows are used up. Whoever leaves stays in the matrix until `Wave.compacted`.

    Returns:
        who left, None when nobody did, and the wave in front of the next stage, None when nobody
        is left.
    """
    stage, live, cost = wave.stage, wave.live, model.cost
    packed, macs = model.run_stage(wave.packed, stage)
    wave = replace(wave, packed=packed)
    if stage == len(model.stages) - 1:
        wave.macs.add_(macs + cost.head)
        return _leavers(wave, stage, model.classify(packed), live), None
    wave.macs.add_(macs + cost.exits[stage])
    exit_ = model.exit(stage, packed, wave.state, wave.limits[:, stage].contiguous())
    if exit_.plan.is_all and live is None:
        return None, replace(wave, stage=stage + 1)
    stays = exit_.plan.inverse[:, 0] >= 0
    leaves = ~stays
    if live is not None:  # who left before is asked again, and not heard
        leaves &= live
        stays &= live
    left = _leavers(wave, stage, exit_.logits, leaves)
    if not bool(stays.any()):
        return left, None
    return left, replace(wave, stage=stage + 1, live=stays)


@torch.inference_mode()
def run_dense(model: VisionTransformer, patches: Patches) -> tuple[Tensor, Tensor]:
    """Logits float32 [n, C] without any exit, and what that took of each image, int64 [n]."""
    packed, spent = model.embed(patches.images, patches.choice), patches.macs(model)
    for stage in range(len(model.stages)):
        packed, macs = model.run_stage(packed, stage)
        spent = spent + macs
    return model.classify(packed), spent + model.cost.head


def _leavers(wave: Wave, level: int, logits: Tensor, leave: Tensor | None) -> Leavers:
    if leave is None:
        return Leavers(level, wave.ids, logits, wave.macs.clone())
    return Leavers(level, wave.ids[leave], logits[leave], wave.macs[leave])
