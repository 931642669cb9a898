"""Identities of early exits: what an image gets depends on itself and on its limits alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pyruntime.errors import FormatError, InvalidInput
from pyruntime.format.spec import VisionSpec
from pyruntime.gates.exit import ExitState
from pyruntime.layers.packed import Packed
from pyruntime.models import vit
from pyruntime.models.vit import VisionTransformer
from tests.models.vision_models import (
    ALWAYS,
    CRITERIA,
    NEVER,
    T2T,
    exits_of,
    forced,
    heads_of,
    model_of,
    pictures,
    spec_of,
    spread,
    staged,
    tensors_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS: dict[str, dict[str, Any]] = {
    "patch": {},
    "t2t": T2T,
    "bfloat16": {"dtype": "bfloat16"},
    "registers, own norms": {"prefix_tokens": 5, "exits": exits_of(norm="own")},
    "distilled": {"prefix_tokens": 2, "pool": "distilled"},
    "mean": {"prefix_tokens": 0, "pool": "mean", "norm_after_pool": True,
             "exits": exits_of(pool="mean")},
    "norm before mean": {"pool": "mean", "exits": exits_of("margin", norm="none")},
    "query and key norms": {"qk_norm": True, "pre_norm": True, "patch_bias": False},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [0, 1, 2, 7, 64])
def test_never_leaving_is_the_backbone(name: str, count: int) -> None:
    model = model_of(spec_of(**MODELS[name]))
    images = pictures(model.spec, count)
    found = staged(model, images, forced(model, [3] * count))
    assert torch.equal(found.logits, model.forward(images))
    assert found.logits.shape == (count, 7) and bool(found.logits.isfinite().all())
    assert found.levels.tolist() == [3] * count


@pytest.mark.parametrize("name", MODELS)
def test_leaving_first_is_the_first_head(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(spec_of(**MODELS[name]))
    images, calls = pictures(model.spec, 6), []
    first = heads_of(model, images)[0]
    monkeypatch.setattr(vit.VisionTransformer, "_run", counted(calls))
    found = staged(model, images, forced(model, [0] * 6))
    assert torch.equal(found.logits, first) and found.levels.tolist() == [0] * 6
    assert found.counts == [6, 0, 0, 0]
    assert calls == [(0, 6), (1, 0), (2, 0), (3, 0)]


def counted(calls: list[tuple[int, int]]) -> Any:
    original = vit.VisionTransformer._run

    def run(self: Any, packed: Packed, blocks: range, features: bool) -> Tensor | None:
        calls.extend((block, packed.count) for block in blocks)
        return original(self, packed, blocks, features)

    return run


@pytest.mark.parametrize("name", ["patch", "t2t", "mean"])
@pytest.mark.parametrize(
    "levels", [[3] * 7, [0] * 7, [0, 3] * 4, [1, 3, 3, 3], [3, 3, 2], [0], [2, 1, 0, 1, 2, 3, 3]]
)  # fmt: skip
def test_every_image_keeps_its_place(name: str, levels: list[int]) -> None:
    """Bit for bit what it gets among those that stay: nothing of a batch enters a row."""
    model = model_of(spec_of(**MODELS[name]))
    images = pictures(model.spec, len(levels))
    heads = torch.stack(heads_of(model, images), 1)
    found = staged(model, images, forced(model, levels))
    assert found.levels.tolist() == levels
    torch.testing.assert_close(found.logits, heads[torch.arange(len(levels)), levels])
    assert found.counts == [sum(level >= stage for level in levels) for stage in range(4)]


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_compacted_is_masked_is_merged(criterion: str, backend: str) -> None:
    model = model_of(spec_of(exits=CRITERIA[criterion]), backend=backend)
    images = pictures(model.spec, 40, seed=5)
    limits = spread(model, images)
    found = staged(model, images, limits)
    assert len(set(found.levels.tolist())) > 2
    masked = staged(model, images, limits, compact=False)
    assert torch.equal(found.levels, masked.levels)
    torch.testing.assert_close(found.logits, masked.logits, atol=2e-5, rtol=1e-5)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    shuffled = staged(model, images[order], limits)
    assert torch.equal(shuffled.levels, found.levels[order])
    torch.testing.assert_close(shuffled.logits, found.logits[order], atol=2e-5, rtol=1e-5)
    single = [staged(model, image[None], limits[:1]) for image in images[:5]]
    assert [int(one.levels) for one in single] == found.levels[:5].tolist()
    torch.testing.assert_close(
        torch.cat([one.logits for one in single]), found.logits[:5], atol=2e-5, rtol=1e-5
    )
    levels, logits = merged(model, images, limits)
    assert torch.equal(levels, found.levels)
    torch.testing.assert_close(logits, found.logits, atol=2e-5, rtol=1e-5)


@torch.inference_mode()
def merged(model: VisionTransformer, images: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Two halves run stage 0 apart; who stays of both runs the rest in one batch."""
    levels = torch.full((len(images),), len(model.stages) - 1)
    logits = torch.empty(len(images), model.spec.num_classes)
    parts, states, ids = [], [], []
    for half in torch.arange(len(images)).chunk(2):
        packed = model.embed(images[half])
        state = ExitState.start(len(half), model.spec.num_classes, model.spec.exits)
        model.run_stage(packed, 0)
        exit_ = model.exit(0, packed, state, limits[half, 0])
        logits[half], levels[half] = exit_.logits, 0
        kept = exit_.plan.rows.long()
        parts.append(packed.select(model.ops, exit_.plan))
        states.append(state.select(exit_.plan))
        ids.append(half[kept])
        levels[half[kept]] = len(model.stages) - 1
    packed, state, rest = Packed.join(parts), ExitState.join(states), torch.cat(ids)
    for stage in range(1, len(model.stages) - 1):
        model.run_stage(packed, stage)
        exit_ = model.exit(stage, packed, state, limits[rest, stage])
        logits[rest] = exit_.logits
        kept = exit_.plan.rows.long()
        gone = torch.ones(len(rest), dtype=torch.bool)
        gone[kept] = False
        levels[rest[gone]] = stage
        packed, state, rest = (
            packed.select(model.ops, exit_.plan),
            state.select(exit_.plan),
            rest[kept],
        )
    model.run_stage(packed, len(model.stages) - 1)
    logits[rest] = model.classify(packed)
    return levels, logits


@pytest.mark.parametrize("name", ["patch", "t2t", "bfloat16"])
def test_an_image_is_the_same_bits_in_any_batch(name: str) -> None:
    """Native ops compute every row by itself, whatever lies beside it."""
    model = model_of(spec_of(**MODELS[name]), backend="native")
    images = pictures(model.spec, 9)
    together = model.forward(images)
    for part in (slice(0, 1), slice(3, 5), slice(2, 9)):
        assert torch.equal(model.forward(images[part]), together[part])


def test_parts_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    for changes in ({}, T2T, MODELS["distilled"]):
        model = model_of(spec_of(**changes), backend="native")
        images = pictures(model.spec, 11)
        whole = model.forward(images)
        for rows in (1, 7, 40):
            monkeypatch.setattr(vit, "PART_ROWS", rows)
            assert torch.equal(model.forward(images), whole)
        monkeypatch.undo()


@pytest.mark.parametrize("name", MODELS)
def test_the_last_block_computes_what_the_head_needs(name: str) -> None:
    model = model_of(spec_of(**MODELS[name]), backend="native")
    images = pictures(model.spec, 5)
    short, full = model.embed(images), model.embed(images)
    for stage in range(4):
        model.run_stage(short, stage)
        model.run_stage(full, stage, features=True)
    assert torch.equal(model.classify(short), model.classify(full))
    changed = (short.x != full.x).any(1).sum()
    read = {"class": 1, "distilled": 2, "mean": model.spec.tokens}[model.spec.pool]
    assert int(changed) == 5 * (model.spec.tokens - read)


def test_images_of_different_lengths_share_a_batch() -> None:
    """Every image gets what it gets alone, whatever the lengths around it."""
    model = model_of(spec_of(), backend="native")
    random = torch.Generator().manual_seed(3)
    lengths = [7, 1, 30, 2, 7]
    x = torch.randn(sum(lengths), 40, generator=random)
    packed = Packed.of(x.clone(), lengths)
    for stage in range(4):
        model.run_stage(packed, stage)
    together = model.classify(packed)
    for number, rows in enumerate(x.split(lengths)):
        alone = Packed.of(rows.clone(), [len(rows)])
        for stage in range(4):
            model.run_stage(alone, stage)
        assert torch.equal(model.classify(alone)[0], together[number])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_nan_never_leaves_and_hurts_nobody(criterion: str) -> None:
    model = model_of(spec_of(exits=CRITERIA[criterion]), backend="native")
    images = pictures(model.spec, 7, seed=5)
    limits = spread(model, images)
    clean = staged(model, images, limits)
    broken = images.clone()
    broken[3, 0, 5, 5] = torch.nan
    broken[5, 0, 5, 5] = torch.inf
    found = staged(model, broken, limits)
    assert found.levels[[3, 5]].tolist() == [3, 3]
    whole = [0, 1, 2, 4, 6]
    assert torch.equal(found.levels[whole], clean.levels[whole])
    assert torch.equal(found.logits[whole], clean.logits[whole])
    assert bool(found.logits[[3, 5]].isnan().all())


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_stricter_rule_lets_nobody_leave_earlier(criterion: str) -> None:
    model = model_of(spec_of(exits=CRITERIA[criterion]))
    images = pictures(model.spec, 40, seed=6)
    own, before, seen = spread(model, images), torch.zeros(40, dtype=torch.int64), set()
    for step in (-2.0, -0.6, -0.2, -0.05, 0.0, 0.05, 0.2, 0.6, 2.0):
        limits = own.clone()
        if criterion.startswith("jei_dnn"):
            limits[..., 1] *= 2.0**-step  # tau rises
        else:
            limits[..., 0] += step
        levels = staged(model, images, limits).levels
        assert bool((levels >= before).all())
        before, seen = levels, seen | set(levels.tolist())
    assert len(seen) > 2


def test_limits_are_those_of_each_image() -> None:
    model = model_of(spec_of(exits=CRITERIA["max_prob"]))
    images = pictures(model.spec, 12, seed=5)
    own, strict = spread(model, images), forced(model, [3] * 12)
    mixed = torch.where(torch.arange(12)[:, None, None] % 2 == 0, own, strict)
    found = staged(model, images, mixed)
    assert torch.equal(found.levels[::2], staged(model, images, own).levels[::2])
    assert found.levels[1::2].tolist() == [3] * 6


@pytest.mark.parametrize("name", ["patch", "t2t", "distilled", "mean"])
def test_counted_calls_are_counted_levels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(spec_of(**MODELS[name]))
    images, calls = pictures(model.spec, 30, seed=5), []
    monkeypatch.setattr(vit.VisionTransformer, "_run", counted(calls))
    limits = spread(model, images)
    calls.clear()
    found = staged(model, images, limits)
    cost, last = model.cost, model.spec.num_layers - 1
    total = 30 * cost.stem
    for block, count in calls:
        total += count * (cost.last_block if block == last else cost.block)
    total += sum(count * one for count, one in zip(found.counts, cost.exits, strict=False))
    total += found.counts[-1] * cost.head
    assert int(cost.executed(found.levels).sum()) == total
    assert len(set(found.levels.tolist())) > 1


def test_mass_is_the_sum_of_the_gates() -> None:
    model = model_of(spec_of())
    images = pictures(model.spec, 20, seed=5)
    packed, state = model.embed(images), ExitState.start(20, 7, model.spec.exits)
    limits = torch.tensor([[NEVER, 2.0]]).repeat(20, 1)
    passed = torch.zeros(20)
    for stage in range(3):
        model.run_stage(packed, stage)
        confidence = model.exit(stage, packed, state, limits).confidence
        gate = (confidence - passed) / 2
        assert bool(((gate > 0) & (gate < 1)).all())
        passed = passed + gate
        torch.testing.assert_close(state.counters[:, 0], passed)
    mass = passed.clamp(max=1)
    torch.testing.assert_close(mass + (1 - passed).clamp(min=0), torch.ones(20))


def test_keeping_all_copies_nothing() -> None:
    model = model_of(spec_of())
    packed = model.embed(pictures(model.spec, 4))
    state = ExitState.start(4, 7, model.spec.exits)
    model.run_stage(packed, 0)
    never = model.exit(0, packed, state, torch.full((4, 2), NEVER))
    assert packed.select(model.ops, never.plan) is packed and state.select(never.plan) is state
    always = model.exit(0, packed, state, torch.tensor([[ALWAYS, 2.0]] * 4))
    assert packed.select(model.ops, always.plan).count == 0


def test_refusals() -> None:
    model = model_of(spec_of())
    with pytest.raises(InvalidInput, match=r"float32 \[B, 3, H, W\]"):
        model.embed(torch.zeros(2, 1, 12, 8))
    with pytest.raises(InvalidInput, match="0 x 8 pixels has none"):
        model.embed(torch.zeros(2, 3, 0, 8))
    with pytest.raises(InvalidInput, match="float64"):
        model.embed(torch.zeros(2, 3, 12, 8, dtype=torch.float64))
    tensors = tensors_of(model.spec)
    with pytest.raises(FormatError, match=r"layers\.2\.attn\.qkv\.weight: missing"):
        VisionTransformer(
            model.spec, {n: t for n, t in tensors.items() if n != "layers.2.attn.qkv.weight"}
        )
    with pytest.raises(FormatError, match="expected panels"):
        VisionTransformer(model.spec, tensors | {"head.weight": torch.zeros(7, 40)})
    with pytest.raises(FormatError, match="expected a plain tensor"):
        VisionTransformer(model.spec, tensors | {"positions": tensors["head.weight"]})
    exits = exits_of("learned", outputs="arithmetic")
    with pytest.raises(FormatError, match="no learned score"):
        model_of(spec_of(exits=exits))


def test_a_backbone_without_exits_has_one_stage() -> None:
    spec: VisionSpec = spec_of(exits=())
    model = model_of(spec)
    images = pictures(spec, 3)
    assert model.stages == (range(4),)
    assert torch.equal(staged(model, images, torch.zeros(3, 0, 2)).logits, model.forward(images))
