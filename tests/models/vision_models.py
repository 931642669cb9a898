"""Random vision transformers with exits, built from a spec alone, and a loop over their stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyruntime.format.spec import ExitSpec, Preprocess, VisionSpec, vision_tensors
from pyruntime.gates.exit import ExitState, own_limits
from pyruntime.layers.packed import Packed
from pyruntime.models.vit import VisionTransformer
from pyruntime.ops.weight import Weight

ALWAYS, NEVER = -torch.inf, torch.nan
BASE: dict[str, Any] = {
    "source_family": "timm_vit", "image_size": (12, 8), "stem": "patch", "patch_size": 4,
    "hidden_size": 40, "num_layers": 4, "num_heads": 5, "mlp_size": 52, "num_classes": 7,
    "norm_eps": 1e-6, "prefix_tokens": 1, "preprocess": Preprocess((0.5,) * 3, (0.5,) * 3),
}  # fmt: skip
T2T: dict[str, Any] = {
    "source_family": "t2t_vit", "image_size": (32, 32), "stem": "t2t", "patch_size": 16,
    "hidden_size": 128, "num_heads": 2, "mlp_size": 96, "norm_eps": 1e-5, "qkv_bias": False,
}  # fmt: skip


def exits_of(
    criterion: Any = "jei_dnn", threshold: float = 1.0, layers: int = 4, **changes: Any
) -> tuple[ExitSpec, ...]:
    """One after every block but the last."""
    return tuple(ExitSpec(i, criterion, threshold, **changes) for i in range(layers - 1))


def spec_of(**changes: Any) -> VisionSpec:
    return VisionSpec(**{**BASE, "exits": exits_of(), **changes})


def tensors_of(spec: VisionSpec, seed: int = 0) -> dict[str, Tensor | Weight]:
    """Random tensors in kernel layout."""
    random = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor | Weight] = {}
    for tensor in vision_tensors(spec):
        spread = 0.2 if tensor.name.startswith("stem") and spec.stem == "t2t" else 0.5
        values = torch.randn(tensor.shape, generator=random) * spread
        if "norm" in tensor.name and tensor.name.endswith("weight"):
            values = 1 + 0.2 * values
        elif "ensemble" in tensor.name:
            values = values.abs()
        elif ".gate." in tensor.name:
            values = values - 0.5  # some images leave at every gate
        elif tensor.layout == "panel":
            values *= 2 * tensor.shape[-1] ** -0.5
        values = values.to(getattr(torch, tensor.dtype))
        found[tensor.name] = Weight.pack(values) if tensor.layout == "panel" else values
    return found


def model_of(spec: VisionSpec, seed: int = 0, backend: str | None = None) -> VisionTransformer:
    return VisionTransformer(spec, tensors_of(spec, seed), backend)


def pictures(spec: VisionSpec, count: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, len(spec.preprocess.mean), *spec.image_size, generator=random)


def limits_of(model: VisionTransformer, count: int) -> Tensor:
    """The checkpoint's own rule for every image, [B, G, 2]."""
    return own_limits(model.spec.exits).expand(count, -1, -1).clone()


def forced(model: VisionTransformer, levels: Sequence[int]) -> Tensor:
    """Limits [B, G, 2] by which image i leaves at levels[i]."""
    limits = limits_of(model, len(levels))
    limits[..., 0] = NEVER
    for image, level in enumerate(levels):
        if level < limits.shape[1]:
            limits[image, level, 0] = ALWAYS
    return limits


def spread(model: VisionTransformer, images: Tensor) -> Tensor:
    """Limits [B, G, 2] by which about a third of the images leave at every exit, nobody nearly."""
    limits, count = limits_of(model, len(images)), len(images)
    all_stay = staged(model, images, forced(model, [len(model.spec.exits)] * count))
    for number, confidence in enumerate(all_stay.confidences):
        if model.spec.exits[number].criterion != "patience":  # which counts
            ordered = confidence.sort().values
            limits[:, number, 0] = ordered[count * 2 // 3 - 1 : count * 2 // 3 + 1].mean()
    return limits


# Where they leave is set by `spread`; patience counts.
CRITERIA: dict[str, tuple[ExitSpec, ...]] = {
    "jei_dnn": exits_of(),
    "jei_dnn, independent": exits_of(composition="independent"),
    "max_prob": exits_of("max_prob", strict=True),
    "max_logit": exits_of("max_logit"),
    "entropy": exits_of("entropy", strict=True),
    "margin": exits_of("margin"),
    "patience": exits_of("patience"),
    "learned": exits_of("learned", norm="own"),
    "boosted": exits_of("max_prob", outputs="sum"),
    "geometric": exits_of("max_prob", outputs="geometric"),
    "arithmetic": exits_of("max_prob", outputs="arithmetic", norm="none"),
    "cascade": (
        ExitSpec(0, "max_prob", 0.5, norm="own"),
        ExitSpec(1, "max_prob", 0.5, norm="shared", cascade=True),
        ExitSpec(2, "max_prob", 0.5, norm="none", cascade=True, outputs="geometric"),
    ),
    "constant": exits_of("learned", constant_class=3),
}


@torch.inference_mode()
def heads_of(model: VisionTransformer, images: Tensor) -> list[Tensor]:
    """Logits of every exit and of the final head, by a run in which nobody leaves."""
    packed = model.embed(images)
    state = ExitState.start(len(images), model.spec.num_classes, model.spec.exits)
    never, found = torch.full((len(images), 2), NEVER), []
    for stage in range(len(model.stages) - 1):
        packed = model.run_stage(packed, stage).packed
        found.append(model.exit(stage, packed, state, never).logits)
    packed = model.run_stage(packed, len(model.stages) - 1).packed
    return [*found, model.classify(packed)]


class Ran(NamedTuple):
    """What a loop over the stages found.

    Attributes:
        logits: [B, C]; levels: int64 [B].
        confidences: per exit, of the images that reached it.
        counts: images that ran each stage.
        macs: int64 [B], of the blocks.
    """

    logits: Tensor
    levels: Tensor
    confidences: list[Tensor]
    counts: list[int]
    macs: Tensor


@torch.inference_mode()
def staged(model: VisionTransformer, images: Tensor, limits: Tensor, compact: bool = True) -> Ran:
    """Stage by stage; images that have left are dropped, or with `compact` False ignored."""
    count, last = len(images), len(model.stages) - 1
    packed, ids = model.embed(images), torch.arange(len(images))
    state = ExitState.start(count, model.spec.num_classes, model.spec.exits)
    found = Ran(
        torch.full((count, model.spec.num_classes), torch.nan), torch.full((count,), last), [], [],
        torch.zeros(count, dtype=torch.int64),
    )  # fmt: skip
    gone = torch.zeros(count, dtype=torch.bool)
    for stage in range(last):
        found.counts.append(packed.count)
        packed = run(model, packed, stage, ids, found)
        exit_ = model.exit(stage, packed, state, limits[ids, stage])
        found.confidences.append(exit_.confidence)
        stays = torch.zeros(len(ids), dtype=torch.bool)
        stays[exit_.plan.rows.long()] = True
        leaves = ids[~stays & ~gone[ids]]
        at = torch.searchsorted(ids, leaves)
        found.logits[leaves], found.levels[leaves] = exit_.logits[at], stage
        gone[leaves] = True
        if compact:
            packed, state = packed.select(model.ops, exit_.plan), state.select(exit_.plan)
            ids = ids[stays]
    found.counts.append(packed.count)
    packed = run(model, packed, last, ids, found)
    left = ~gone[ids]
    found.logits[ids[left]] = model.classify(packed)[left]
    return found


def run(model: VisionTransformer, packed: Packed, stage: int, ids: Tensor, found: Ran) -> Packed:
    ran = model.run_stage(packed, stage)
    found.macs[ids] += ran.macs
    return ran.packed
