"""A loaded vision transformer: logits of images, each as fine and as deep as it needs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyruntime.engine.arrays import Array, as_tensor
from pyruntime.engine.exit_limits import ExitLimits
from pyruntime.engine.patches import Patches
from pyruntime.engine.scale_rules import ScaleRules
from pyruntime.engine.stage_times import StageTimes
from pyruntime.engine.wave import Leavers, Wave, advance
from pyruntime.errors import FormatError, InvalidInput
from pyruntime.format.load import Container, read
from pyruntime.format.spec import VisionSpec
from pyruntime.gates.calibration import Calibration
from pyruntime.gates.policy import ComputePolicy
from pyruntime.gates.scale import ScaleRule
from pyruntime.gates.scale_layout import ScaleLayout
from pyruntime.gates.vision_trace import VisionTrace
from pyruntime.models.vit import VisionTransformer
from pyruntime.ops.pixels import Pixels

Compaction = Literal["measured", "always", "never"]
Policies = ComputePolicy | Sequence[ComputePolicy | None] | None


@dataclass(frozen=True, slots=True, eq=False)
class VisionOutput:
    """Result of `VisionRuntime.forward`.

    Attributes:
        logits: float32 [B, C], of the head each image left at.
        levels: int32 [B], that head: an exit, or their number for the final one.
        trace: what was executed.
    """

    logits: Tensor
    levels: Tensor
    trace: VisionTrace


class VisionRuntime:
    """A converted vision transformer, ready to run.

    Attributes:
        spec: what it is.
        model: the network.
        limits: what policies mean for its exits.
        rules: what policies mean for its patches.
        times: how long its parts take; measured at first need.
        macs_dense: multiply-accumulates of an image of the model's own size without exits, all
            patches fine, all learners running.
    """

    def __init__(self, container: Container, backend_name: str | None = None) -> None:
        spec, record = container.spec, container.calibration
        if not isinstance(spec, VisionSpec):
            raise FormatError(f"{container.path}: holds no vision transformer; open it with "
                              "pyruntime.load or pyruntime.load_encoder")  # fmt: skip
        kind = "exits" if spec.scales is None else "scales"
        if record is not None and record.get("kind") != kind:
            raise FormatError(
                f"{container.path}: calibration of kind {record.get('kind')!r}, expected {kind!r}"
            )
        calibration = None if record is None else Calibration(record)
        self.container = container
        self.spec = spec
        self.model = VisionTransformer(spec, container.tensors, backend_name)
        self.limits = ExitLimits(spec.exits, calibration, spec.scales is not None)
        self.rules = ScaleRules(spec, calibration)
        self.times = StageTimes(self.model)
        self.macs_dense = self.model.cost.dense()

    @property
    def calibration(self) -> Calibration | None:
        """Thresholds of the folder, or None."""
        return self.limits.calibration

    @cached_property
    def exits(self) -> int:
        """G, the number of early exits; the level of the final head."""
        return len(self.spec.exits)

    def resolve(self, policy: ComputePolicy | None) -> Tensor:
        """Limits of one image, float32 [G, 2], not to be written to; see `ExitLimits.resolve`."""
        return self.limits.resolve(policy)

    def rule(self, policy: ComputePolicy | None) -> ScaleRule | None:
        """Who decides about the patches of one image; see `ScaleRules.resolve`."""
        return self.rules.resolve(policy)

    def forward(
        self,
        images: Tensor | Array | Sequence[Tensor | Array],
        policy: Policies = None,
        *,
        stops: Tensor | Sequence[Tensor | Array] | None = None,
        replay: Tensor | VisionTrace | None = None,
        compaction: Compaction = "measured",
    ) -> VisionOutput:
        """Logits of B images, in one pass.

        What an image gets does not depend on the others, nor on `compaction`.

        Args:
            images: float32 [B, C, H, W] of the model's size, or a list of float32 [C, H, W] of any
                sizes, normalised; see `pyruntime.engine.images`. Any arrays with DLPack. Outside of
                an image, up to whole coarsest patches, is the mean colour.
            policy: one for all, or one per image.
            stops: instead of the policy's word about patches: for every image bool [C_i], which of
                its coarser patches are not divided; or all of them in one matrix [B, C]. See
                `VisionTrace.stops`.
            replay: an earlier trace: every image has the patches it had there, and leaves where it
                did; no gate of patches runs. Or its levels alone. An image whose logits are not
                finite runs to the end.
            compaction: when the images that stay at an exit are moved together: where it was
                measured to pay, always, or never, which computes every stage for all images until
                the last one has left (masked evaluation; for tests and benchmarks).

        Raises:
            InvalidInput: images of another shape or dtype, a policy the model cannot honour, stops
                that are not of these images.
        """
        batch, sizes = self._checked(images)
        rules, limits = self._resolved(policy, len(sizes))
        if replay is not None:
            levels = replay.levels if isinstance(replay, VisionTrace) else replay
            limits = self.limits.forced(limits, levels)
        if compaction not in ("measured", "always", "never"):
            raise InvalidInput(f"compaction must be measured, always or never, got {compaction!r}")
        if isinstance(replay, VisionTrace) and replay.stops is not None:
            if stops is not None:
                raise InvalidInput("stops and replay both say which patches there are: give one")
            stops = replay.stops
        told = None if stops is None else self._told(stops, sizes)
        return self._run(Patches.of(self.model, batch, rules, told), limits, compaction)

    def features(
        self, images: Tensor | Array | Sequence[Tensor | Array], policy: Policies = None
    ) -> list[Tensor]:
        """A map of every image, float32 [rows, columns, D] of its finest patches; see
        `VisionTransformer.features`. All blocks run, whatever the policy says about exits.

        Raises:
            InvalidInput: as `forward`; a model whose rows leave or merge on the way.
        """
        batch, sizes = self._checked(images)
        rules, _ = self._resolved(policy, len(sizes))
        return [found.clone() for found in self.model.features(batch, rules)] if sizes else []

    def _resolved(
        self, policy: Policies, count: int
    ) -> tuple[ScaleRule | list[ScaleRule] | None, Tensor]:
        """Rules of patches, None in a model of one scale, and limits of exits [n, G, 2]."""
        if policy is None or isinstance(policy, ComputePolicy):
            return self.rule(policy), self.resolve(policy).expand(count, -1, -1)
        if len(policy) != count:
            raise InvalidInput(f"got {len(policy)} policies for {count} images")
        rules = [rule for one in policy if (rule := self.rule(one)) is not None]
        return None if self.spec.scales is None else rules, self.limits.rows(policy)

    def _told(
        self, stops: Tensor | Sequence[Tensor | Array], sizes: tuple[tuple[int, int], ...]
    ) -> Tensor:
        """Stops of all images, bool [C], checked."""
        scales = self.spec.scales
        if scales is None:
            raise InvalidInput("stops are given, but this model has one scale only")
        if len(stops) != len(sizes):
            raise InvalidInput(f"got stops of {len(stops)} images for {len(sizes)} images")
        layout = ScaleLayout.of(sizes, self.spec.patch_size, scales.ratios)
        each = [as_tensor(f"stops of image {number}", one) for number, one in enumerate(stops)]
        for number, (given, grid) in enumerate(zip(each, layout.grids, strict=True)):
            if given.dtype != torch.bool or list(given.shape) != [grid.coarse]:
                raise InvalidInput(
                    f"stops: image {number} has {grid.coarse} coarser patches: expected bool "
                    f"[{grid.coarse}], got {given.dtype} {list(given.shape)}"
                )
        return torch.cat([*each, torch.empty(0, dtype=torch.bool)])

    def _run(self, patches: Patches, limits: Tensor, compaction: Compaction) -> VisionOutput:
        count = len(limits)
        found: _Answers | None = None
        stage_images: list[int] = []
        paths = {"all": 0, "packed": 0, "carried": 0, "none": 0}
        ids = torch.arange(count)
        wave = Wave.start(self.model, patches, limits, ids) if count else None
        while wave is not None:
            stage_images.append(wave.count)
            left, rest = advance(self.model, wave)
            if left is not None and len(left.ids) == count:
                found = _Answers.together(wave, left)
            else:
                found = found or _Answers.room(count, self.spec.num_classes)
                found.put(wave, left)
            if wave.stage < self.exits:
                kept = None if rest is None else self.compacted(rest, compaction)
                paths[_path(rest, kept)] += 1
                rest = kept
            wave = rest
        found = found or _Answers.room(count, self.spec.num_classes)
        trace = VisionTrace(
            levels=found.levels,
            stages=found.stages,
            choice=patches.choice,
            prefix=patches.prefix,
            macs_per_image=found.macs,
            macs_dense_per_image=patches.macs_dense(self.model),
            stage_images=tuple(stage_images),
            paths=paths,
        )
        return VisionOutput(found.logits, found.levels, trace)

    def compacted(self, wave: Wave, compaction: Compaction = "measured") -> Wave:
        """A wave without the images that have left, unless they are to be carried on."""
        if wave.live is None or compaction == "never":
            return wave
        if compaction == "measured":
            before = self.times.work(wave.packed.lengths)
            if not self.times.compaction_pays(wave.stage, before, self.live_work(wave)):
                return wave
        return wave.compacted(self.model.ops)

    def live_work(self, wave: Wave) -> float:
        """Of the images that have not left; see `StageTimes.work`."""
        return self.times.work(wave.live_lengths)

    def _checked(
        self, images: Tensor | Array | Sequence[Tensor | Array]
    ) -> tuple[Pixels, tuple[tuple[int, int], ...]]:
        """Images as the model takes them, with their heights and widths."""
        channels, (height, width) = len(self.spec.preprocess.mean), self.spec.image_size
        if isinstance(images, list | tuple):
            each = [as_tensor(f"image {number}", one) for number, one in enumerate(images)]
            for number, image in enumerate(each):
                if image.dtype != torch.float32 or image.dim() != 3 or len(image) != channels:
                    raise InvalidInput(
                        f"image {number}: expected float32 [{channels}, H, W], got {image.dtype} "
                        f"{list(image.shape)}"
                    )
            if not each:
                return Pixels.of(torch.empty(0, channels, height, width)), ()
            pixels = Pixels.of_list(each)
            return pixels, pixels.sizes
        array = as_tensor("images", images)
        shape = (channels, height, width)
        if array.dim() != 4 or array.shape[1:] != shape or array.dtype != torch.float32:
            raise InvalidInput(
                f"images: expected float32 [B, {', '.join(map(str, shape))}], or a list of "
                f"[{channels}, H, W], got {array.dtype} {list(array.shape)}"
            )
        return Pixels.of(array.contiguous()), ((height, width),) * len(array)


class _Answers(NamedTuple):
    """Of n images: logits float32 [n, C], levels and stages int32 [n], macs int64 [n]."""

    logits: Tensor
    levels: Tensor
    stages: Tensor
    macs: Tensor

    @staticmethod
    def room(count: int, classes: int) -> _Answers:
        """For those that come."""
        levels, stages = torch.empty(2, count, dtype=torch.int32)
        return _Answers(
            torch.empty(count, classes), levels, stages, torch.empty(count, dtype=torch.int64)
        )

    @staticmethod
    def together(wave: Wave, left: Leavers) -> _Answers:
        """All images have left at once: always so without exits, and a good part of the time that
        one small image takes around its blocks."""
        levels = torch.full_like(left.ids, left.level, dtype=torch.int32)
        # Tensors of the model are inference tensors, which autograd does not take; users may.
        return _Answers(left.logits.clone(), levels, levels + 1, wave.macs.clone())

    def put(self, wave: Wave, left: Leavers | None) -> None:
        """What is known after a stage (self is mutated)."""
        if left is not None:
            self.logits[left.ids] = left.logits
            self.levels[left.ids] = left.level
        if left is not None or wave.live is not None:
            self.stages[wave.ids] = wave.stage + 1
            self.macs[wave.ids] = wave.macs


def load_vision(
    path: str | os.PathLike[str], verify: bool = True, backend_name: str | None = None
) -> VisionRuntime:
    """Open a vision folder in the runtime format.

    Args:
        path: the folder `pyruntime convert` wrote.
        verify: compare every shard with its recorded SHA-256 first.
        backend_name: forces an implementation of the ops ("native" or "reference").

    Raises:
        FormatError: the folder is damaged, of another version, or holds no vision transformer.
    """
    return VisionRuntime(read(path, verify), backend_name)


def _path(before: Wave | None, after: Wave | None) -> str:
    if before is None or after is None:
        return "none"
    if before.live is None:
        return "all"
    return "packed" if after is not before else "carried"
