"""What every exit of a model says of every image: one pass that nobody leaves.

Confidences do not depend on thresholds: what an image carries from exit to exit (the mass of
JEI-DNN gates, a patience counter, a running sum) is the same for every image that is still there.
So one pass tells what any thresholds would do, for patches that one rule has chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyruntime.engine.images import Preprocessor
from pyruntime.engine.patches import Patches
from pyruntime.engine.vision import VisionRuntime
from pyruntime.gates.exit import NEVER, ExitState, own_limits
from pyruntime.gates.scale import ScaleRule
from pyruntime.profile.image_data import ImageSet
from pyruntime.profile.measure import Ticker


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """Of n images at G exits; the last column of [n, G + 1] is the final head's.

    Attributes:
        confidence: float32 [n, G]; NaN where an image can never leave.
        correct: bool [n, G + 1].
        macs: int64 [n, G + 1], what an image has run that leaves there.
        macs_dense: of one image on the model without exits, all patches fine.
        strict: leaves iff its confidence is larger than the threshold, not equal; for each exit.
    """

    confidence: Tensor
    correct: Tensor
    macs: Tensor
    macs_dense: int
    strict: Sequence[bool]

    def levels(self, thresholds: Tensor) -> Tensor:
        """Where each image leaves, int64 [n], under thresholds float32 [G]; NaN is never."""
        found = torch.full((len(self.confidence),), len(self.strict))
        for exit_ in reversed(range(len(self.strict))):
            gone = leaves(self.confidence[:, exit_], thresholds[exit_], self.strict[exit_])
            found[gone] = exit_
        return found

    def accuracy(self, levels: Tensor) -> float:
        """Share of right answers of images that leave at these levels."""
        return float(_at(self.correct, levels).double().mean())

    def cost(self, levels: Tensor) -> float:
        """Their mean share of the dense multiply-accumulates."""
        return float(_at(self.macs, levels).double().mean()) / self.macs_dense


def leaves(confidence: Tensor, threshold: Tensor | float, strict: bool) -> Tensor:
    """Whose confidence, float32 [n], suffices; nothing compares with NaN."""
    return confidence > threshold if strict else confidence >= threshold


@torch.inference_mode()
def collect(
    runtime: VisionRuntime,
    data: ImageSet,
    batch: int,
    tick: Ticker,
    rules: Sequence[ScaleRule | None] = (None,),
) -> list[Answers]:
    """One pass over all images for every rule of patches; `tick` is called after each batch.

    Args:
        rules: None is all fine.

    Raises:
        InvalidInput: an image that cannot be used.
    """
    spec = runtime.spec
    preprocess = Preprocessor(spec.preprocess, spec.image_size)
    exits, strict = len(spec.exits), [exit_.strict for exit_ in spec.exits]
    found = [
        Answers(
            torch.empty(len(data), exits),
            torch.empty(len(data), exits + 1, dtype=torch.bool),
            torch.empty(len(data), exits + 1, dtype=torch.int64),
            runtime.macs_dense,
            strict,
        )
        for _ in rules
    ]
    for numbers in data.deal(batch):
        images, labels = data.batch(preprocess, numbers)
        for rule, answers in zip(rules, found, strict=True):
            _ask(runtime, Patches.of(runtime.model, images, rule), labels, numbers, answers)
            tick()
    return found


def _ask(
    runtime: VisionRuntime, patches: Patches, labels: Tensor, numbers: Tensor, answers: Answers
) -> None:
    """Fill in the rows `numbers` of `answers` (mutated)."""
    model, spec = runtime.model, runtime.spec
    packed = model.embed(patches.images, patches.choice)
    spent = patches.macs(model)
    state = ExitState.start(len(numbers), spec.num_classes, spec.exits)
    limits = own_limits(spec.exits)
    limits[:, 0] = NEVER
    for stage in range(len(spec.exits) + 1):
        packed, macs = model.run_stage(packed, stage)
        spent = spent + macs
        if stage == len(spec.exits):
            spent = spent + model.cost.head
            logits = model.classify(packed)
        else:
            spent = spent + model.cost.exits[stage]
            rows = limits[stage].expand(len(numbers), 2).contiguous()
            logits, sure, _ = model.exit(stage, packed, state, rows)
            # Logits that are not finite hold an image back, whatever its confidence.
            sure = torch.where(logits.isfinite().all(1), sure, NEVER)
            answers.confidence[numbers, stage] = sure
        answers.macs[numbers, stage] = spent
        answers.correct[numbers, stage] = logits.argmax(1) == labels


def _at(table: Tensor, levels: Tensor) -> Tensor:
    return table.gather(1, levels[:, None])[:, 0]
