"""Whole models behind the runtime and the queue: to the last bit what every image gets alone."""

from __future__ import annotations

import itertools
import random
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from pyruntime import Classification, Classifier, ComputePolicy, ExitPolicy, VisionRuntime
from pyruntime.engine.vision import Compaction
from pyruntime.format.load import Container
from pyruntime.format.manifest import Manifest
from pyruntime.format.spec import ReductionSpec, VisionSpec, WidthSpec
from tests.models.vision_models import (
    CRITERIA,
    T2T,
    exits_of,
    pictures,
    spec_of,
    spread,
    tensors_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS: dict[str, dict[str, Any]] = {
    **{criterion: {"exits": exits} for criterion, exits in CRITERIA.items()},
    "t2t": T2T,
    "bfloat16": {"dtype": "bfloat16"},
    "mean": {"pool": "mean", "exits": exits_of(pool="mean")},
    "adaptive width": {"width": WidthSpec(3, mlp_bottleneck=16, attention_bottleneck=8)},
    "evit": {"reduction": ReductionSpec("evit", (1, 2), keep=(0.7, 0.7), fuse=True)},
    "tome": {"reduction": ReductionSpec("tome", (0, 2), merge=(2, 1), proportional=True)},
    "dynamicvit": {"reduction": ReductionSpec("dynamicvit", (1, 2), keep=(0.8, 0.5))},
}
COMPACTIONS = get_args(Compaction)
EXITS = 3


def runtime_of(spec: VisionSpec, backend: str = "native") -> VisionRuntime:
    manifest = Manifest(spec, None, None, {}, {}, {})
    tensors = tensors_of(spec)
    return VisionRuntime(Container(Path("random"), spec, None, None, tensors, manifest), backend)


def policies_of(runtime: VisionRuntime, images: torch.Tensor) -> list[ComputePolicy | None]:
    """The own rule, thresholds at which a third of the images leave, and levels."""
    draw = random.Random(3)
    thresholds = [float(t) for t in spread(runtime.model, images[:64])[0, :, 0]]
    found: list[ComputePolicy | None] = [None, ComputePolicy(exit="never")]
    found += [ComputePolicy(exit=t) for t in thresholds if t == t]
    found += [ComputePolicy(exit=ExitPolicy(level=level)) for level in range(EXITS)]
    return [draw.choice(found) for _ in images]


@pytest.mark.parametrize("name", MODELS)
def test_batches_are_what_every_image_gets_alone(name: str) -> None:
    runtime = runtime_of(spec_of(**MODELS[name]))
    images = pictures(runtime.spec, 50, seed=6)
    policies = policies_of(runtime, images)
    alone = [runtime.forward(images[i : i + 1], policies[i : i + 1]) for i in range(50)]
    assert len({int(one.levels) for one in alone}) > 2
    for compaction in COMPACTIONS:
        found = runtime.forward(images, policies, compaction=compaction)
        assert found.levels.tolist() == [int(one.levels) for one in alone]
        assert torch.equal(found.logits, torch.cat([one.logits for one in alone]))
        if compaction == "always":
            macs = [one.trace.macs_executed for one in alone]
            assert found.trace.macs_per_image.tolist() == macs
    again = runtime.forward(images, replay=found.trace)
    assert torch.equal(again.logits, found.logits) and torch.equal(again.levels, found.levels)


@pytest.mark.parametrize("name", ["jei_dnn", "patience", "cascade", "t2t", "bfloat16"])
def test_threads_and_refilling_change_nothing(name: str) -> None:
    """16 threads, 2000 images, random times, random policies."""
    runtime = runtime_of(spec_of(**MODELS[name]))
    count = 2000 if name == "jei_dnn" else 320
    images = pictures(runtime.spec, count, seed=7)
    policies = policies_of(runtime, images)
    futures: dict[int, Future[Classification]] = {}
    with Classifier(runtime, max_batch=16, max_age=3) as classifier:

        def work(thread: int) -> None:
            rest = random.Random(thread)
            for i in range(thread, count, 16):
                futures[i] = classifier.submit(images[i], policies[i])
                if rest.random() < 0.1:
                    time.sleep(rest.random() * 2e-3)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(futures) == count
    for i in range(count):
        answer = futures[i].result(0)
        alone = runtime.forward(images[i : i + 1], policies[i : i + 1])
        assert answer.level == int(alone.levels)
        assert torch.equal(answer.logits, alone.logits[0])
        assert answer.macs == alone.trace.macs_executed


def test_never_is_the_backbone_and_level_0_its_first_stage() -> None:
    for name in ("jei_dnn", "t2t", "bfloat16", "mean"):
        runtime = runtime_of(spec_of(**MODELS[name]))
        images = pictures(runtime.spec, 7)
        found = runtime.forward(images, ComputePolicy(exit="never"))
        assert torch.equal(found.logits, runtime.model.forward(images))
        first = runtime.forward(images, ComputePolicy(exit=ExitPolicy(level=0)))
        assert first.trace.stage_images == (7,)


def test_higher_tau_keeps_images_longer() -> None:
    runtime = runtime_of(spec_of())
    images = pictures(runtime.spec, 200, seed=8)
    levels = [
        runtime.forward(images, ComputePolicy(exit=ExitPolicy(tau=tau))).levels
        for tau in (0.1, 0.3, 0.5, 0.9, 3.0)
    ]
    for less, more in itertools.pairwise(levels):
        assert bool((less <= more).all())
    assert not torch.equal(levels[0], levels[-1])


def test_learners_are_counted_as_they_run() -> None:
    runtime = runtime_of(spec_of(**MODELS["adaptive width"]))
    images = pictures(runtime.spec, 20)
    trace = runtime.forward(images, ComputePolicy(exit="never")).trace
    fixed = runtime.model.cost.executed(trace.levels)
    learned = trace.macs_per_image - fixed
    assert bool((learned > 0).all()) and len(set(learned.tolist())) > 1
    heads = sum(runtime.model.cost.exits)
    assert bool((trace.macs_per_image - heads < runtime.macs_dense).all())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_images_that_are_not_finite_run_to_the_end_and_disturb_nobody(bad: float) -> None:
    runtime = runtime_of(spec_of())
    images = pictures(runtime.spec, 9)
    expected = runtime.forward(images)
    images[4, 0, 0, 0] = bad
    found = runtime.forward(images)
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert int(found.levels[4]) == EXITS
    assert torch.equal(found.levels[others], expected.levels[others])
    assert torch.equal(found.logits[others], expected.logits[others])
    with Classifier(runtime) as classifier:
        answers = classifier.classify(images)
    assert [answer.level for answer in answers] == found.levels.tolist()


@pytest.mark.parametrize("name", ["dynamicvit", "adaptive width"])
def test_without_exits_what_ran_is_counted(name: str) -> None:
    runtime = runtime_of(spec_of(**MODELS[name]))
    images = pictures(runtime.spec, 6)
    with Classifier(runtime, mode="dense") as classifier:
        answers = classifier.classify(images)
    never = runtime.forward(images, ComputePolicy(exit="never"))
    heads = sum(runtime.model.cost.exits)
    assert [a.macs + heads for a in answers] == never.trace.macs_per_image.tolist()
    assert all(answer.macs < answer.macs_dense for answer in answers)
    assert torch.equal(torch.stack([answer.logits for answer in answers]), never.logits)
