"""Token reduction in whole networks: against plain torch, alone and among others, and counted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pyruntime.errors import FormatError, InvalidInput
from pyruntime.format.spec import ReductionSpec, VisionSpec
from pyruntime.gates.exit import ExitState
from pyruntime.layers.packed import Packed
from pyruntime.layers.vision_block import Rows
from pyruntime.models import vit
from pyruntime.models.vit import VisionTransformer
from pyruntime.ops.pixels import Pixels
from pyruntime.ops.weight import Weight
from tests.models.vision_models import (
    ALWAYS,
    NEVER,
    exits_of,
    model_of,
    pictures,
    spec_of,
    tensors_of,
)
from tests.oracle.reduction import Rule, blocks
from tests.oracle.t2t import linear, norm

pytestmark = pytest.mark.usefixtures("one_thread")

SPARSE = {0: 0.8, 2: 0.5, 3: 0.3}
METHODS: dict[str, tuple[ReductionSpec, dict[str, Any]]] = {
    "dynamicvit": (ReductionSpec("dynamicvit", (0, 2, 3), keep=(0.8, 0.5, 0.3)), SPARSE),
    "evit": (ReductionSpec("evit", (0, 2, 3), keep=(0.8, 0.5, 0.3)), SPARSE),
    "evit, fused": (ReductionSpec("evit", (0, 2, 3), keep=(0.8, 0.5, 0.3), fuse=True), SPARSE),
    "tome": (ReductionSpec("tome", (0, 1, 3), merge=(13, 8, 2)), {0: 13, 1: 8, 3: 2}),
    "tome, plain attention": (
        ReductionSpec("tome", (0, 1, 3), merge=(13, 8, 2), proportional=False),
        {0: 13, 1: 8, 3: 2},
    ),
    "tome, most": (ReductionSpec("tome", (1, 2, 3), merge=(99, 99, 99)), {1: 99, 2: 99, 3: 99}),
}  # fmt: skip
POOLS: dict[str, dict[str, Any]] = {
    "class": {},
    "distilled": {"prefix_tokens": 2, "pool": "distilled"},
    "registers": {"prefix_tokens": 5},
    "mean": {"pool": "mean"},
}


def spec_with(method: str | None, pool: str = "class", **changes: Any) -> VisionSpec:
    reduction = None if method is None else METHODS[method][0]
    base = {"image_size": (28, 24), "exits": (), "reduction": reduction}
    return spec_of(**{**base, **POOLS[pool], **changes})


def rule_of(spec: VisionSpec, method: str) -> Rule:
    reduction, each = METHODS[method]
    return Rule(reduction.method, each, spec.prefix_tokens, reduction.fuse, reduction.proportional)


def expected_logits(model: VisionTransformer, images: Tensor | Pixels, method: str) -> Tensor:
    """Image by image, in plain torch, from the rows of the first block."""
    spec = model.spec
    state = {
        name: tensor.dense()[0] if isinstance(tensor, Weight) else tensor
        for name, tensor in tensors_of(spec).items()
    }
    packed = model.embed(images)
    found = []
    for rows in packed.x.split(packed.lengths):
        x = blocks(state, rows[None], spec.num_heads, spec.num_layers, rule_of(spec, method))
        x = norm(state, "norm", x, spec.norm_eps)[0]
        if spec.pool == "mean":
            logits = linear(state, "head", x[spec.prefix_tokens :].mean(0))
        else:
            logits = linear(state, "head", x[0])
        if spec.pool == "distilled":
            logits = (logits + linear(state, "head_dist", x[1])) / 2
        found.append(logits)
    return torch.stack(found)


def assorted(spec: VisionSpec) -> list[Tensor]:
    """Images of several sizes, down to one patch."""
    random = torch.Generator().manual_seed(7)
    sizes = [(28, 24), (12, 8), (28, 24), (4, 4), (32, 20), (8, 4)]
    return [torch.randn(3, *size, generator=random) for size in sizes]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_parity_with_plain_torch(method: str, pool: str, backend: str) -> None:
    model = model_of(spec_with(method, pool), backend=backend)
    images = pictures(model.spec, 5)
    torch.testing.assert_close(
        model.forward(images), expected_logits(model, images, method), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pool", ["class", "distilled", "mean"])
def test_images_of_different_sizes(method: str, pool: str) -> None:
    """Each gets what plain torch gives it, and bit for bit what it gets alone."""
    model = model_of(spec_with(method, pool), backend="native")
    images = assorted(model.spec)
    if method == "dynamicvit" and pool == "mean":
        images = [image for image in images if image.shape[1] > 8]  # else there is no mean
    together = model.forward(Pixels.of_list(images))
    expected = expected_logits(model, Pixels.of_list(images), method)
    torch.testing.assert_close(together, expected, atol=1e-4, rtol=0)
    for image, logits in zip(images, together, strict=True):
        assert torch.equal(model.forward(Pixels.of_list([image]))[0], logits)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_image_is_the_same_bits_in_any_batch(
    method: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(spec_with(method, dtype=dtype), backend="native")
    images = pictures(model.spec, 9)
    together = model.forward(images)
    assert bool(together.isfinite().all())
    for part in (slice(0, 1), slice(3, 5), slice(2, 9)):
        assert torch.equal(model.forward(images[part]), together[part])
    for rows in (1, 100):
        monkeypatch.setattr(vit, "PART_ROWS", rows)
        assert torch.equal(model.forward(images), together)


@pytest.mark.parametrize("pool", POOLS)
def test_reducing_nothing_is_the_plain_network(pool: str) -> None:
    plain = model_of(spec_with(None, pool), backend="native")
    images = pictures(plain.spec, 4)
    expected = plain.forward(images)
    nothing = [
        ReductionSpec("evit", (1, 2), keep=(1.0, 1.0), fuse=True),
        ReductionSpec("tome", (1, 2), merge=(0, 0)),
        ReductionSpec("dynamicvit", (1, 2), keep=(1.0, 1.0)),
    ]
    for reduction in nothing:
        spec = spec_with(None, pool, reduction=reduction)
        tensors = tensors_of(plain.spec) | {
            name: tensor for name, tensor in tensors_of(spec).items() if "reduce." in name
        }
        model = VisionTransformer(spec, tensors, "native")
        assert torch.equal(model.forward(images), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pool", POOLS)
def test_the_last_block_computes_what_the_head_needs(method: str, pool: str) -> None:
    model = model_of(spec_with(method, pool), backend="native")
    images = pictures(model.spec, 4)
    short = model.run_stage(model.embed(images), 0)
    full = model.run_stage(model.embed(images), 0, features=True)
    assert torch.equal(model.classify(short.packed), model.classify(full.packed))
    assert bool((short.macs <= full.macs).all())
    assert bool((short.macs < full.macs).all()) == (pool != "mean")


@pytest.mark.parametrize("method", METHODS)
def test_what_ran_is_counted(method: str) -> None:
    """Block after block, for images of several sizes."""
    model = model_of(spec_with(method, "mean"))
    reduction, each = METHODS[method]
    d = model.spec.hidden_size
    images = [image for image in assorted(model.spec) if image.shape[1] > 8]
    packed = model.embed(Pixels.of_list(images))
    ran = model.run_stage(packed, 0)
    for image, length in enumerate(packed.lengths):
        began = patches = length - 1
        total = 0
        for block in range(model.spec.num_layers):
            seen = left = patches
            if block in each and reduction.method == "dynamicvit":
                total += patches * (d * d + d * d // 2 + d * d // 8 + d // 4 * 2)
                seen = left = min(int(began * each[block]), patches)
            elif block in each and reduction.method == "evit":
                left = math.ceil(each[block] * patches)
                if left < patches:
                    total += d * (1 + patches + reduction.fuse * (patches - left))
                    left += reduction.fuse
            elif block in each:
                left = patches - min(each[block], patches // 2)
                total += (patches // 2 + 1) * ((patches + 1) // 2) * model.spec.head_dim
            total += 4 * d * d * (seen + 1) + 2 * d * (seen + 1) ** 2 + 2 * d * 52 * (left + 1)
            patches = left
        assert ran.packed.lengths[image] == patches + 1 < length
        assert int(ran.macs[image]) == total


@pytest.mark.parametrize("method", METHODS)
def test_sizes_say_what_merged(method: str) -> None:
    model = model_of(spec_with(method), backend="native")
    images = pictures(model.spec, 3)
    packed = model.run_stage(model.embed(images), 0, features=True).packed
    if method.startswith("tome"):
        assert packed.sizes is not None
        sums = torch.stack([part.sum() for part in packed.sizes.split(packed.lengths)])
        assert sums.tolist() == [model.spec.tokens] * 3
        assert packed.sizes[packed.first_rows.long()].tolist() == [1.0] * 3
    else:
        assert packed.sizes is None


@torch.inference_mode()
def staged(model: VisionTransformer, images: Tensor, levels: list[int]) -> tuple[Tensor, Tensor]:
    """Logits and multiply-accumulates of blocks, of images that leave at these exits."""
    count, level = len(images), torch.tensor(levels)
    packed, ids = model.embed(images), torch.arange(count)
    state = ExitState.start(count, model.spec.num_classes, model.spec.exits)
    logits, macs = torch.empty(count, model.spec.num_classes), torch.zeros(count).long()
    for stage in range(len(model.stages)):
        packed, ran = model.run_stage(packed, stage)
        macs[ids] += ran
        if stage == len(model.stages) - 1:
            logits[ids] = model.classify(packed)
            break
        leaves = torch.where(level[ids] == stage, ALWAYS, NEVER)
        exit_ = model.exit(stage, packed, state, torch.stack([leaves, leaves], 1))
        logits[ids] = exit_.logits
        ids = ids[exit_.plan.rows.long()]
        packed, state = packed.select(model.ops, exit_.plan), state.select(exit_.plan)
    return logits, macs


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pool", ["class", "mean"])
def test_exits_between_reductions(method: str, pool: str) -> None:
    """Who leaves changes nothing for who stays; never leaving is the backbone."""
    spec = spec_with(method, exits=exits_of("max_prob", pool=pool))
    model = model_of(spec, backend="native")
    images = pictures(spec, 8)
    never, whole = staged(model, images, [3] * 8)
    assert torch.equal(never, model.forward(images))
    levels = [0, 3, 1, 2, 3, 0, 3, 1]
    logits, macs = staged(model, images, levels)
    stays = torch.tensor(levels) == 3
    assert torch.equal(logits[stays], never[stays]) and torch.equal(macs[stays], whole[stays])
    assert bool((macs[~stays] < whole[~stays]).all())
    for i, level in enumerate(levels):
        alone = staged(model, images[i : i + 1], [level])
        assert torch.equal(alone[0][0], logits[i]) and torch.equal(alone[1][0], macs[i])


@pytest.mark.parametrize("method", METHODS)
def test_nan_hurts_nobody(method: str) -> None:
    model = model_of(spec_with(method), backend="native")
    images = pictures(model.spec, 5)
    clean = model.forward(images)
    broken = images.clone()
    broken[1, 0, 5, 5] = torch.nan
    broken[3, 0, 5, 5] = torch.inf
    found = model.forward(broken)
    whole = [0, 2, 4]
    assert torch.equal(found[whole], clean[whole])
    assert bool(found[[1, 3]].isnan().all())


@pytest.mark.parametrize("method", METHODS)
def test_no_images(method: str) -> None:
    model = model_of(spec_with(method))
    ran = model.run_stage(model.embed(pictures(model.spec, 0)), 0)
    assert ran.packed.count == 0 and model.classify(ran.packed).shape == (0, 7)


def test_rows_without_a_beginning() -> None:
    model = model_of(spec_with("dynamicvit"))
    packed = model.embed(pictures(model.spec, 2))
    with pytest.raises(InvalidInput, match="began"):
        model._layers.reductions[0].before(model.ops, Rows(packed.x, packed.cu_seqlens))
    with pytest.raises(InvalidInput, match="began"):
        model.run_stage(Packed(packed.x, packed.cu_seqlens), 0)


def test_refusals() -> None:
    with pytest.raises(FormatError, match="block 4 of 4"):
        spec_with(None, reduction=ReductionSpec("tome", (4,), merge=(1,)))
    tensors = tensors_of(spec_with("dynamicvit"))
    del tensors["reduce.1.out.2.weight"]
    with pytest.raises(FormatError, match=r"reduce\.1\.out\.2\.weight: missing"):
        VisionTransformer(spec_with("dynamicvit"), tensors)
    with pytest.raises(InvalidInput, match="leave or merge"):
        model = model_of(spec_with("tome"))
        model.features(pictures(model.spec, 1))
