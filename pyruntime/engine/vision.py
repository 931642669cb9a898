"""A loaded vision transformer: logits of a batch of images, each as deep as its exits let it go."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from pyruntime.engine.arrays import Array, as_tensor
from pyruntime.engine.exit_limits import ExitLimits
from pyruntime.engine.stage_times import StageTimes
from pyruntime.engine.wave import Wave, advance
from pyruntime.errors import FormatError, InvalidInput
from pyruntime.format.load import Container, read
from pyruntime.format.spec import VisionSpec
from pyruntime.gates.calibration import Calibration
from pyruntime.gates.policy import ComputePolicy
from pyruntime.gates.vision_trace import VisionTrace
from pyruntime.models.vit import VisionTransformer

Compaction = Literal["measured", "always", "never"]


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
        times: how long its parts take; measured at first need.
        macs_dense: multiply-accumulates of an image without exits, all learners running.
    """

    def __init__(self, container: Container, backend_name: str | None = None) -> None:
        spec, record = container.spec, container.calibration
        if not isinstance(spec, VisionSpec):
            raise FormatError(f"{container.path}: holds no vision transformer; open it with "
                              "pyruntime.load or pyruntime.load_encoder")  # fmt: skip
        if record is not None and record.get("kind") != "exits":
            raise FormatError(
                f"{container.path}: calibration of kind {record.get('kind')!r}, expected 'exits'"
            )
        self.container = container
        self.spec = spec
        self.model = VisionTransformer(spec, container.tensors, backend_name)
        self.limits = ExitLimits(spec.exits, None if record is None else Calibration(record))
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

    def forward(
        self,
        images: Tensor | Array,
        policy: ComputePolicy | Sequence[ComputePolicy | None] | None = None,
        *,
        replay: Tensor | VisionTrace | None = None,
        compaction: Compaction = "measured",
    ) -> VisionOutput:
        """Logits of B images, in one pass.

        What an image gets does not depend on the others, nor on `compaction`.

        Args:
            images: float32 [B, C, H, W], normalised; see `pyruntime.engine.images`. Any array with
                DLPack.
            policy: one for all, or one per image.
            replay: an earlier trace, or its levels: every image leaves where it did there. One
                whose logits are not finite runs to the end.
            compaction: when the images that stay at an exit are moved together: where it was
                measured to pay, always, or never, which computes every stage for all images until
                the last one has left (masked evaluation; for tests and benchmarks).

        Raises:
            InvalidInput: images of another shape or dtype, a policy the model cannot honour.
        """
        images = self._checked(images)
        count = images.shape[0]
        if policy is None or isinstance(policy, ComputePolicy):
            limits = self.resolve(policy).expand(count, -1, -1)
        elif len(policy) != count:
            raise InvalidInput(f"got {len(policy)} policies for {count} images")
        else:
            limits = self.limits.rows(policy)
        if replay is not None:
            levels = replay.levels if isinstance(replay, VisionTrace) else replay
            limits = self.limits.forced(limits, levels)
        if compaction not in ("measured", "always", "never"):
            raise InvalidInput(f"compaction must be measured, always or never, got {compaction!r}")
        return self._run(images, limits, compaction)

    def _run(self, images: Tensor, limits: Tensor, compaction: Compaction) -> VisionOutput:
        count = images.shape[0]
        logits = torch.empty(count, self.spec.num_classes)
        levels, stages = torch.empty(2, count, dtype=torch.int32)
        macs = torch.empty(count, dtype=torch.int64)
        stage_images: list[int] = []
        paths = {"all": 0, "packed": 0, "carried": 0, "none": 0}
        wave = Wave.start(self.model, images, limits, torch.arange(count)) if count else None
        while wave is not None:
            stage_images.append(wave.count)
            left, rest = advance(self.model, wave)
            if left is not None:
                logits[left.ids] = left.logits
                levels[left.ids] = left.level
            if left is not None or wave.live is not None:
                stages[wave.ids] = wave.stage + 1
                macs[wave.ids] = wave.macs
            if wave.stage < self.exits:
                kept = None if rest is None else self.compacted(rest, compaction)
                paths[_path(rest, kept)] += 1
                rest = kept
            wave = rest
        dense = torch.full((count,), self.macs_dense)
        trace = VisionTrace(levels, stages, macs, dense, tuple(stage_images), paths)
        return VisionOutput(logits, levels, trace)

    def compacted(self, wave: Wave, compaction: Compaction = "measured") -> Wave:
        """A wave without the images that have left, unless they are to be carried on."""
        if wave.live is None or compaction == "never":
            return wave
        if compaction == "measured":
            if not self.times.compaction_pays(wave.stage, wave.count, wave.live_count):
                return wave
        return wave.compacted(self.model.ops)

    def _checked(self, images: Tensor | Array) -> Tensor:
        images = as_tensor("images", images)
        shape = (len(self.spec.preprocess.mean), *self.spec.image_size)
        if images.dim() != 4 or images.shape[1:] != shape or images.dtype != torch.float32:
            raise InvalidInput(
                f"images: expected float32 [B, {', '.join(map(str, shape))}], got "
                f"{images.dtype} {list(images.shape)}"
            )
        return images.contiguous()


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
