"""Images of mixed scales in batches: what each gets is what it gets alone, and is counted."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyruntime import Classifier, ComputePolicy, ExitPolicy, ScalePolicy
from pyruntime.engine.patches import Patches
from pyruntime.engine.vision import Compaction
from pyruntime.engine.wave import Wave, advance
from pyruntime.errors import FormatError, InvalidInput
from pyruntime.gates.scale import ScaleRule
from pyruntime.gates.vision_trace import ratio_map
from pyruntime.ops.pixels import Pixels
from tests.engine import vision_fakes as fakes
from tests.engine.scale_models import (
    EXITS,
    MODELS,
    images_of,
    policies_of,
    runtime_of,
    scale_policies,
    scale_spec,
)
from tests.models.vision_models import pictures, tensors_of

pytestmark = pytest.mark.usefixtures("one_thread")

COMPACTIONS = get_args(Compaction)


@pytest.mark.parametrize("name", MODELS)
def test_batches_are_what_every_image_gets_alone(name: str) -> None:
    runtime = runtime_of(scale_spec(name))
    images, policies = images_of(30), policies_of(runtime.spec, 30)
    alone = [runtime.forward([image], [p]) for image, p in zip(images, policies, strict=True)]
    assert len({int(one.trace.tokens) for one in alone}) > 5
    order = random.Random(1).sample(range(30), 30)
    for compaction in COMPACTIONS:
        found = runtime.forward(
            [images[i] for i in order], [policies[i] for i in order], compaction=compaction
        )
        assert found.levels.tolist() == [int(alone[i].levels) for i in order]
        assert torch.equal(found.logits, torch.cat([alone[i].logits for i in order]))
        trace = found.trace
        assert trace.tokens.tolist() == [int(alone[i].trace.tokens) for i in order]
        assert trace.stops is not None
        for stops, i in zip(trace.stops, order, strict=True):
            told = alone[i].trace.stops
            assert told is not None and torch.equal(stops, told[0])
        dense = [alone[i].trace.macs_dense for i in order]
        assert trace.macs_dense_per_image.tolist() == dense
        if compaction == "always":
            macs = [alone[i].trace.macs_executed for i in order]
            assert trace.macs_per_image.tolist() == macs


@pytest.mark.parametrize("name", MODELS)
def test_all_fine_is_the_plain_network(name: str) -> None:
    """To the last bit, at the same cost: the same tensors in a model of one scale."""
    spec = scale_spec(name)
    plain_spec = replace(spec, scales=None)
    tensors = tensors_of(spec)
    runtime, plain = runtime_of(spec, None, tensors), runtime_of(plain_spec, None, tensors)
    images = pictures(spec, 7)
    for policy in (ComputePolicy(scales="all_fine"), ComputePolicy(budget=1.0)):
        without = replace(policy, scales=None)
        found, expected = runtime.forward(images, policy), plain.forward(images, without)
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.levels, expected.levels)
        assert torch.equal(found.trace.macs_per_image, expected.trace.macs_per_image)
        assert found.trace.tokens.tolist() == [spec.tokens] * 7
    assert torch.equal(runtime.model.forward(images), plain.model.forward(images))


def test_work_is_counted_by_hand() -> None:
    """Hidden 40, MLP 52, 7 classes, patches of 48 values, regions of 192; gate 12, 10, 1."""
    runtime = runtime_of(scale_spec("no exits"))
    image = pictures(runtime.spec, 1)
    gate = 192 * 12 + 12 * 10 + 10

    def network(tokens: int) -> int:
        block = tokens * (4 * 40 * 40 + 2 * 40 * 52) + 2 * tokens * tokens * 40
        last = tokens * 2 * 40 * 40 + 2 * 40 * 40 + 2 * 40 * 52 + 2 * tokens * 40
        return (tokens - 1) * 48 * 40 + 3 * block + last + 7 * 40

    for policy, fine, gated in (
        (ScalePolicy("all_fine"), 6, 0),
        (ScalePolicy("all_coarse"), 0, 0),
        (ScalePolicy("learned", tokens=6 + 2 * 3), 2, 6),
        (ScalePolicy("random", tokens=6 + 3 * 3), 3, 0),
    ):
        trace = runtime.forward(image, ComputePolicy(scales=policy)).trace
        assert trace.tokens.tolist() == [1 + 6 + 3 * fine]
        assert trace.macs_executed == network(1 + 6 + 3 * fine) + gated * gate
        assert trace.macs_dense == network(25) == runtime.macs_dense
    small = runtime.forward([image[0, :, :8, :16]], ComputePolicy(scales="all_coarse")).trace
    assert small.macs_executed == network(3) and small.macs_dense == network(9)


@given(st.integers(0, 1000), st.lists(st.floats(-3, 3), min_size=2, max_size=5))
@settings(max_examples=20)
def test_a_higher_threshold_divides_no_region_less(seed: int, thresholds: list[float]) -> None:
    runtime, images = RUNTIME, images_of(6, seed)
    found = []
    for threshold in sorted(thresholds):
        trace = runtime.forward(images, ComputePolicy(scales=threshold)).trace
        assert trace.stops is not None
        found.append((torch.cat(trace.stops), trace.tokens))
    for (stops, tokens), (fewer, more) in itertools.pairwise(found):
        assert not bool((fewer & ~stops).any())  # whoever is divided stays divided
        assert bool((more >= tokens).all())


RUNTIME = runtime_of(scale_spec("no exits"))


@pytest.mark.parametrize("name", ["exits", "three scales"])
def test_a_trace_is_repeated(name: str) -> None:
    runtime = runtime_of(scale_spec(name))
    images, policies = images_of(20), policies_of(runtime.spec, 20)
    first = runtime.forward(images, policies)
    other = ComputePolicy(exit="never", scales="all_coarse")
    again = runtime.forward(images, other, replay=first.trace)
    assert torch.equal(again.logits, first.logits) and torch.equal(again.levels, first.levels)
    assert torch.equal(again.trace.tokens, first.trace.tokens)
    # The gate of patches was not asked.
    assert bool((again.trace.macs_per_image <= first.trace.macs_per_image).all())
    told = runtime.forward(images, policies, stops=first.trace.stops)
    assert torch.equal(told.logits, first.logits)
    levels = runtime.forward(images, policies, replay=first.levels)
    assert torch.equal(levels.logits, first.logits)


def test_given_stops() -> None:
    runtime = runtime_of(scale_spec("no exits"))
    images = pictures(runtime.spec, 3)
    stops = torch.rand(3, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    found = runtime.forward(images, stops=stops)
    assert found.trace.tokens.tolist() == [25 - 3 * int(row.sum()) for row in stops]
    assert torch.equal(runtime.forward(images, stops=list(stops)).logits, found.logits)
    whole = runtime.forward(images, ComputePolicy(scales="all_coarse"))
    all_stop = runtime.forward(images, stops=torch.ones(3, 6, dtype=torch.bool))
    assert torch.equal(all_stop.logits, whole.logits)
    for wrong, message in (
        (stops[:2], "stops of 2 images for 3 images"),
        (stops[:, :5], r"image 0 has 6 coarser patches: expected bool \[6\], got torch.bool \[5\]"),
        (stops.int(), r"expected bool \[6\], got torch.int32"),
    ):
        with pytest.raises(InvalidInput, match=message):
            runtime.forward(images, stops=wrong)
    with pytest.raises(InvalidInput, match="stops and replay both say"):
        runtime.forward(images, stops=stops, replay=found.trace)
    plain = runtime_of(replace(runtime.spec, scales=None))
    with pytest.raises(InvalidInput, match="stops are given, but this model has one scale only"):
        plain.forward(images, stops=stops)


def test_images_of_several_sizes_need_no_scales() -> None:
    plain = runtime_of(replace(scale_spec(), scales=None))
    images = images_of(12)
    found = plain.forward(images)
    assert torch.equal(found.logits, torch.cat([plain.forward([i]).logits for i in images]))
    assert found.trace.stops is None and len(set(found.trace.tokens.tolist())) > 3
    same = pictures(plain.spec, 3)
    assert torch.equal(plain.forward(list(same)).logits, plain.forward(same).logits)
    none = plain.forward([])
    assert none.logits.shape == (0, 7) and none.trace.tokens.shape == (0,)
    mixed = runtime_of(scale_spec()).forward([])
    assert mixed.trace.stops == () and mixed.trace.macs_executed == 0


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([torch.zeros(3, 4, 4), torch.zeros(1, 4, 4)], r"image 1: expected float32 \[3, H, W\]"),
        ([torch.zeros(3, 4, 4, dtype=torch.uint8)], r"image 0: .*got torch.uint8 \[3, 4, 4\]"),
        ([torch.zeros(3, 0, 4)], "an image of 0 x 4 pixels has none"),
        ([torch.zeros(1, 3, 4, 4)], r"got torch.float32 \[1, 3, 4, 4\]"),
        (torch.zeros(2, 3, 8, 8), r"expected float32 \[B, 3, 16, 24\], or a list"),
    ],
)
def test_images_that_are_refused(images: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        runtime_of(scale_spec()).forward(images)


@pytest.mark.parametrize("name", ["exits", "bfloat16", "three scales"])
def test_features_lie_on_the_finest_grid(name: str) -> None:
    runtime = runtime_of(scale_spec(name))
    images = images_of(9)
    policies = [ComputePolicy(scales=p) for p in scale_policies(runtime.spec)][:9]
    found = runtime.features(images, policies)
    patch = runtime.spec.patch_size
    for image, policy, features in zip(images, policies, found, strict=True):
        sides = [-(-side // patch) for side in image.shape[1:]]
        assert features.dtype == torch.float32
        assert list(features.shape) == [*sides, runtime.spec.hidden_size]
        assert torch.equal(runtime.features([image], policy)[0], features)
        seen = runtime.forward([image], policy).trace
        assert seen.stops is not None
        ratios = ratio_map(grid_of(runtime, image), seen.stops[0])
        for row, column in itertools.product(range(sides[0]), range(sides[1])):
            ratio = int(ratios[row, column])
            first = features[row // ratio * ratio, column // ratio * ratio]
            assert torch.equal(features[row, column], first)
    assert runtime.features([]) == []


def grid_of(runtime: Any, image: torch.Tensor) -> Any:
    return runtime.model.choose(image[None]).layout.grids[0]


def test_threads_native_sizes_and_refilling_change_nothing() -> None:
    runtime = runtime_of(scale_spec("exits"))
    images, policies = images_of(200), policies_of(runtime.spec, 200)
    with Classifier(runtime, max_batch=8, max_age=2, native=True, max_patches=64) as classifier:
        answers = classifier.classify(images, policies)
        stats = classifier.stats
    for image, policy, answer in zip(images, policies, answers, strict=True):
        alone = runtime.forward([image], policy)
        trace = alone.trace
        assert torch.equal(answer.logits, alone.logits[0])
        assert (answer.level, answer.tokens) == (int(alone.levels), int(trace.tokens))
        assert (answer.macs, answer.macs_dense) == (trace.macs_executed, trace.macs_dense)
        assert trace.stops is not None and answer.stops is not None
        assert torch.equal(answer.stops, trace.stops[0])
        assert answer.tokens_dense == 1 + answer.grid.fine
        ratios, regions = answer.ratios, answer.regions
        assert ratios is not None and regions is not None
        # Every patch of ratio r fills r * r finest ones.
        assert 1 + sum(1 / r**2 for r in ratios.flatten().tolist()) == answer.tokens
        assert regions.shape == (answer.grid.rows // 2, answer.grid.columns // 2)
        assert int((~regions).sum()) * 3 == answer.tokens_dense - answer.tokens
    assert stats.macs_dense == sum(answer.macs_dense for answer in answers)


@pytest.mark.parametrize("mode", ["compact", "lock_step", "dense"])
def test_modes_of_the_classifier(mode: Any) -> None:
    runtime = runtime_of(scale_spec("exits"))
    images, policies = pictures(runtime.spec, 20), policies_of(runtime.spec, 20)
    with Classifier(runtime, mode=mode, max_batch=8) as classifier:
        answers = classifier.classify(images, policies)
    if mode == "dense":
        assert torch.equal(torch.stack([a.logits for a in answers]), runtime.model.forward(images))
        assert {(a.tokens, a.macs, a.level) for a in answers} == {(25, runtime.macs_dense, EXITS)}
    else:
        expected = runtime.forward(images, policies)
        assert torch.equal(torch.stack([a.logits for a in answers]), expected.logits)


def test_a_policy_that_does_not_fit_an_image_fails_alone() -> None:
    runtime = runtime_of(scale_spec("exits"))
    large, small = images_of(2)
    few = ComputePolicy(scales=ScalePolicy(tokens=2))
    with Classifier(runtime, native=True) as classifier:
        good = classifier.submit(small, few)
        with pytest.raises(InvalidInput, match="tokens=2, but all coarse the image has 6"):
            classifier.submit(large, few)
        assert good.result(60).tokens == 2
    with pytest.raises(InvalidInput, match="tokens=2, but all coarse the image has 6"):
        runtime.forward([small, large], few)


def test_waiting_images_hold_no_memory_of_those_that_left() -> None:
    runtime = runtime_of(scale_spec("exits"))
    model, images = runtime.model, images_of(30)
    rules = [ScaleRule("all_fine" if i % 4 else "all_coarse") for i in range(30)]
    for stay in ([3], [0, 4, 8], list(range(15)), list(range(1, 30)), list(range(30))):
        asked = [ComputePolicy(exit=ExitPolicy(never=True) if i in stay else ExitPolicy(level=0))
                 for i in range(30)]  # fmt: skip
        limits = runtime.limits.rows(asked)
        patches = Patches.of(model, Pixels.of_list(images), rules)
        _, rest = advance(model, Wave.start(model, patches, limits, torch.arange(30)))
        assert rest is not None and rest.live_count == len(stay)
        lengths = [int(patches.tokens[i]) for i in stay]
        assert rest.live_lengths == lengths
        trimmed = rest.trimmed(model.ops)
        x = trimmed.packed.x
        row = x.shape[1] * x.element_size()
        assert x.untyped_storage().nbytes() <= 2 * sum(lengths) * row
        one = trimmed.compacted(model.ops)
        assert one.ids.tolist() == stay and one.packed.lengths == lengths


def test_compaction_is_decided_by_work(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = runtime_of(scale_spec("exits"))
    asked: list[tuple[float, float]] = []

    def answer(stage: int, before: float, after: float) -> bool:
        asked.append((before, after))
        return True

    monkeypatch.setattr(runtime.times, "compaction_pays", answer)
    images = pictures(runtime.spec, 8)
    levels = [ExitPolicy(level=0)] * 4 + [ExitPolicy(never=True)] * 4
    for scales, tokens in (("all_fine", 25), ("all_coarse", 7)):
        asked.clear()
        runtime.forward(images, [ComputePolicy(exit=e, scales=scales) for e in levels])
        each = runtime.times.work([tokens])
        assert asked == [pytest.approx((8 * each, 4 * each))]
    assert each < 7 / 25


def record(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "scales",
        "budgets": [1.0, 0.6, 0.4, 0.2],
        "thresholds": [
            [None, None, None, None], [1.0, 0.9, None, None], [None, 0.2, None, 0.4],
            [-1.0, 0.5, 0.4, 0.3],
        ],
        "kept": [1.0, 0.6, 0.4, 0.2],
        "samples": 100,
        "data_sha256": "0" * 64,
        "default_budget": None,
    } | changes  # fmt: skip


def test_budgets_rule_over_patches_and_exits() -> None:
    runtime = runtime_of(scale_spec("exits"), record())
    images = images_of(20)

    def runs_as(budget: float, threshold: Any, exits: list[float]) -> bool:
        found = runtime.forward(images, ComputePolicy(budget=budget))
        limits = runtime.resolve(ComputePolicy(budget=budget))[:, 0].nan_to_num(99.0)
        rule = runtime.rule(ComputePolicy(budget=budget))
        assert rule == runtime.rule(ComputePolicy(scales=threshold))
        tokens = runtime.forward(images, ComputePolicy(scales=threshold)).trace.tokens
        return limits.tolist() == pytest.approx(exits) and torch.equal(found.trace.tokens, tokens)

    assert runs_as(1.0, "all_fine", [99, 99, 99])
    for budget in (0.99, 0.6):  # nothing is interpolated
        assert runs_as(budget, 1.0, [0.9, 99, 99])
    for budget in (0.59, 0.4):
        assert runs_as(budget, "all_fine", [0.2, 99, 0.4])
    assert runs_as(0.2, -1.0, [0.5, 0.4, 0.3])
    with pytest.raises(InvalidInput, match=r"smallest of this model is 0\.2"):
        runtime.forward(images, ComputePolicy(budget=0.19))


def test_defaults() -> None:
    spec = scale_spec("exits")
    own, chosen = runtime_of(spec, record()), runtime_of(spec, record(default_budget=0.2))
    bare = runtime_of(spec)
    assert own.rule(None) == bare.rule(None)
    assert torch.equal(own.resolve(None), bare.resolve(None))
    assert chosen.rule(None) == chosen.rule(ComputePolicy(budget=0.2)) != own.rule(None)
    # What a policy does not set stays with the default budget.
    scales, exit_ = ComputePolicy(scales="all_fine"), ComputePolicy(exit=ExitPolicy(level=0))
    assert chosen.rule(scales) == bare.rule(scales)
    assert torch.equal(chosen.resolve(scales), chosen.resolve(None))
    assert chosen.rule(exit_) == chosen.rule(None)
    assert torch.equal(chosen.resolve(exit_), bare.resolve(exit_))


def test_refusals() -> None:
    with pytest.raises(FormatError, match="kind 'exits', expected 'scales'"):
        runtime_of(scale_spec("exits"), record(kind="exits"))
    with pytest.raises(FormatError, match="kind 'scales', expected 'exits'"):
        fakes.runtime(calibration=record())
    mixed = runtime_of(scale_spec("no exits"))
    with pytest.raises(InvalidInput, match="run `pyruntime calibrate` first"):
        mixed.forward([], ComputePolicy(budget=0.5))
    with pytest.raises(InvalidInput, match="exit is set, but this model has none"):
        mixed.forward([], ComputePolicy(exit=0.5))
    with Classifier(mixed) as classifier:
        for answers in (classifier.stream, classifier.classify):
            with pytest.raises(InvalidInput, match="run `pyruntime calibrate` first"):
                list(answers([], ComputePolicy(budget=0.5)))
