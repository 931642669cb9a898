"""Images from many threads: each gets what it gets alone, and none is ever lost."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, Future, wait
from typing import Any

import pytest
import torch

from pyruntime import Classification, Classifier, ComputePolicy, ExitPolicy
from pyruntime.engine.patches import Patches
from pyruntime.engine.wave import Wave, advance
from pyruntime.engine.wave_thread import MODES, Mode
from pyruntime.errors import InvalidInput, Unavailable
from pyruntime.format.spec import WidthSpec
from tests.engine import vision_fakes as fakes

pytestmark = pytest.mark.usefixtures("one_thread")

EXITS = 4
PATIENCE = 60.0  # seconds; nothing here takes one


def policy(level: int) -> ComputePolicy:
    return ComputePolicy(exit=ExitPolicy(never=True) if level == EXITS else ExitPolicy(level=level))


def same(answer: Classification, runtime: Any, image: torch.Tensor, asked: Any) -> bool:
    level, logits = fakes.alone(runtime.model, image, runtime.resolve(asked))
    return answer.level == level and torch.equal(answer.logits, logits)


@pytest.mark.parametrize("mode", MODES)
def test_answers_come_in_order(mode: Mode) -> None:
    runtime, images = fakes.runtime(), fakes.images(300)
    levels = [random.Random(1).randrange(EXITS + 1) for _ in images]
    policies = [policy(level) for level in levels]
    with Classifier(runtime, mode=mode, max_batch=8) as classifier:
        answers = classifier.classify(images, policies)
        stats = classifier.stats
    if mode == "dense":
        assert {answer.level for answer in answers} == {EXITS}
        assert all(a.macs == a.macs_dense for a in answers)
        policies = [policy(EXITS)] * 300
    assert all(same(*each) for each in zip(answers, [runtime] * 300, images, policies, strict=True))
    assert stats.images == 300 and stats.failed == 0
    assert stats.macs_dense == sum(answer.macs_dense for answer in answers)
    assert stats.macs >= sum(answer.macs for answer in answers)


def test_what_an_answer_says() -> None:
    labels = tuple(f"class {i}" for i in range(fakes.CLASSES))
    runtime = fakes.runtime(fakes.spec(labels=labels))
    image, asked = fakes.images(1)[0], policy(2)
    with Classifier(runtime, top=3) as classifier:
        answer = classifier.submit(image, asked).result(PATIENCE)
    probabilities = answer.logits.softmax(0)
    best = int(probabilities.argmax())
    assert answer.label == best and answer.name == f"class {best}"
    assert answer.probability == pytest.approx(float(probabilities[best]))
    assert [label.probability for label in answer.top] == sorted(
        (label.probability for label in answer.top), reverse=True
    )
    assert len(answer.top) == 3
    assert (answer.level, answer.exits, answer.policy) == (2, EXITS, asked)
    assert answer.macs == runtime.model.cost.image(2)
    assert answer.macs_dense == runtime.model.cost.dense()
    assert answer.compute == answer.macs / answer.macs_dense
    assert answer.queue_seconds >= 0 and answer.run_seconds > 0
    assert not answer.logits.is_inference()
    with Classifier(fakes.runtime(), top=99) as classifier:
        (answer,) = classifier.classify(image, asked)
    assert answer.name is None and len(answer.top) == fakes.CLASSES


@pytest.mark.parametrize(("count", "max_wait_ms"), [(2000, 0.0), (320, 1.0)])
def test_sixteen_threads_at_random_times(count: int, max_wait_ms: float) -> None:
    runtime, images = fakes.runtime(), fakes.images(count)
    draw = random.Random(2)
    asked = [draw.choice([None, policy(draw.randrange(EXITS + 1))]) for _ in images]
    futures: list[Future[Classification] | None] = [None] * count
    with Classifier(runtime, max_batch=16, max_wait_ms=max_wait_ms, max_age=2) as classifier:

        def work(thread: int) -> None:
            rest = random.Random(thread)
            for i in range(thread, count, 16):
                futures[i] = classifier.submit(images[i], asked[i])
                if rest.random() < 0.2:
                    time.sleep(rest.random() * 2e-3)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        answers = [future.result(PATIENCE) for future in futures if future is not None]
    assert len(answers) == count
    again = fakes.runtime()
    for answer, image, one in zip(answers, images, asked, strict=True):
        assert same(answer, again, image, one)
        assert answer.macs == again.model.cost.image(answer.level)
    assert classifier.stats.images == count


@pytest.mark.parametrize("mode", MODES)
def test_none_is_lost_when_close_comes_in_between(mode: Mode) -> None:
    runtime, images = fakes.runtime(), fakes.images(400)
    accepted: dict[int, Future[Classification]] = {}
    refused: list[int] = []
    classifier = Classifier(runtime, mode=mode, max_batch=8)

    def work(thread: int) -> None:
        for i in range(thread, 400, 8):
            try:
                accepted[i] = classifier.submit(images[i])
            except InvalidInput as error:
                assert "closed" in str(error)
                refused.append(i)
            time.sleep(2e-4)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(5e-3)
    classifier.close()
    for thread in threads:
        thread.join()
    assert len(accepted) + len(refused) == 400 and refused
    assert all(future.done() for future in accepted.values())
    for i, future in accepted.items():
        asked = policy(EXITS) if mode == "dense" else None
        assert same(future.result(0), runtime, images[i], asked)
    classifier.close()  # again does nothing
    with pytest.raises(InvalidInput, match="closed"):
        classifier.classify(images[:1])


def test_images_merge_with_later_ones() -> None:
    """Under load, waves of later stages are fuller than what one wave of fresh images leaves."""
    last: dict[Mode, list[int]] = {}
    for mode in ("refill", "compact"):
        runtime = fakes.untimed()
        runtime.times.target = lambda stage, most: most  # type: ignore[method-assign]
        model = fakes.fake_of(runtime)
        with Classifier(runtime, mode=mode, max_batch=16, max_age=50) as classifier:
            model.go.clear()
            futures = [classifier.submit(image) for image in fakes.images(512)]
            model.go.set()
            assert not wait(futures, PATIENCE).not_done
        last[mode] = [count for stage, count in model.calls if stage == EXITS]
    assert sum(last["refill"]) == sum(last["compact"])
    assert len(last["refill"]) < len(last["compact"]) / 2 and max(last["refill"]) <= 16


def test_waiting_images_hold_no_memory_of_those_that_left() -> None:
    runtime = fakes.untimed()
    model = fakes.fake_of(runtime)
    images = fakes.images(64)
    for stay in (1, 31, 32, 33, 63):
        asked = [policy(EXITS if i < stay else 0) for i in range(64)]
        limits = torch.stack([runtime.resolve(one) for one in asked])
        patches = Patches.of(model, images)  # type: ignore[arg-type]
        wave = Wave.start(model, patches, limits, torch.arange(64))  # type: ignore[arg-type]
        _, rest = advance(model, wave)  # type: ignore[arg-type]
        assert rest is not None and rest.live_count == stay
        trimmed = rest.trimmed(model.ops)
        x = trimmed.packed.x
        assert trimmed.live_count == stay
        held = x.untyped_storage().nbytes() / (x.element_size() * 4 * model.spec.tokens)
        assert held <= 2 * stay
        one = trimmed.compacted(model.ops)
        assert one.ids.tolist() == list(range(stay)) and one.count == stay
        assert torch.equal(one.packed.x, rest.compacted(model.ops).packed.x)


def test_a_cancelled_request_does_not_run() -> None:
    runtime = fakes.untimed()
    model = fakes.fake_of(runtime)
    model.step_seconds = 0.02
    with Classifier(runtime, max_batch=1) as classifier:
        first = classifier.submit(fakes.images(1)[0], policy(EXITS))
        second = classifier.submit(fakes.images(1)[0], policy(EXITS))
        third = classifier.submit(fakes.images(1)[0], policy(0))
        assert second.cancel()
        assert third.result(PATIENCE).level == 0 and first.result(PATIENCE).level == EXITS
        assert not first.cancel()
    with pytest.raises(CancelledError):
        second.result(0)
    assert len(model.calls) == 6


@pytest.mark.parametrize("mode", MODES)
def test_a_failing_batch_fails_alone(mode: Mode) -> None:
    runtime, images = fakes.untimed(), fakes.images(40)
    runtime.times.target = lambda stage, most: most  # type: ignore[method-assign]
    images[17] = fakes.BOOM
    with Classifier(runtime, mode=mode, max_batch=4, max_age=50) as classifier:
        fakes.fake_of(runtime).go.clear()
        futures = [classifier.submit(image) for image in images]
        fakes.fake_of(runtime).go.set()  # others wait at the exits when the batch fails
        done, waiting = wait(futures, PATIENCE)
        assert not waiting and len(done) == 40
        failed = [i for i, future in enumerate(futures) if future.exception(0) is not None]
        assert 17 in failed and len(failed) <= 4
        assert str(futures[17].exception(0)) == "injected fault"
        assert classifier.stats.failed == len(failed)
        assert classifier.stats.images == 40 - len(failed)
        assert classifier.submit(images[0]).result(PATIENCE)


def test_when_the_thread_itself_fails_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = Classifier(fakes.runtime(), max_batch=4)

    def broken(fresh: int) -> int:
        raise RuntimeError("injected bug")

    monkeypatch.setattr(classifier._thread._queues, "choose", broken)
    futures = []
    for image in fakes.images(9):
        try:
            futures.append(classifier.submit(image))
        except Unavailable as error:
            assert "injected bug" in str(error)
    assert futures
    for future in futures:
        assert str(future.exception(PATIENCE)) == "injected bug"
    with pytest.raises(Unavailable, match="has failed: injected bug"):
        classifier.submit(fakes.images(1)[0])
    classifier.close()


def test_a_callback_that_ends_the_thread_leaves_nobody_waiting() -> None:
    runtime = fakes.untimed()
    fakes.fake_of(runtime).go.clear()
    classifier = Classifier(runtime, max_batch=2)

    def leave(_: Future[Classification]) -> None:
        raise SystemExit

    futures = [classifier.submit(image) for image in fakes.images(6)]
    futures[0].add_done_callback(leave)
    fakes.fake_of(runtime).go.set()
    assert not wait(futures, PATIENCE).not_done
    assert any(isinstance(future.exception(0), SystemExit) for future in futures)
    classifier.close()


def test_callbacks_may_use_the_classifier() -> None:
    classifier = Classifier(fakes.runtime())
    image = fakes.images(1)[0]
    inner: Future[Classification] = Future()

    def again(_: Future[Classification]) -> None:
        future = classifier.submit(image)
        classifier.close()  # on the thread itself: only told to end
        future.add_done_callback(lambda done: inner.set_result(done.result()))

    classifier.submit(image).add_done_callback(again)
    assert inner.result(PATIENCE).level >= 0
    classifier.close()


def test_a_forgotten_classifier_answers_and_goes() -> None:
    runtime = fakes.runtime()
    fakes.fake_of(runtime).step_seconds = 0.01
    classifier = Classifier(runtime, max_batch=2)
    thread = classifier._thread._thread
    futures = [classifier.submit(image) for image in fakes.images(6)]
    del classifier
    gc.collect()
    assert all(future.result(PATIENCE).exits == EXITS for future in futures)
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_a_process_answers_before_it_ends() -> None:
    code = """
from tests.engine import vision_fakes as fakes
from pyruntime import Classifier
runtime = fakes.runtime()
fakes.fake_of(runtime).step_seconds = 0.02
classifier = Classifier(runtime, max_batch=2)
for image in fakes.images(6):
    classifier.submit(image).add_done_callback(lambda future: print(future.result().exits))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["4"] * 6 and "Traceback" not in done.stderr


def test_an_idle_classifier_sleeps() -> None:
    with Classifier(fakes.runtime()) as classifier:
        classifier.classify(fakes.images(4))
        before = time.thread_time(), time.process_time()
        time.sleep(0.2)
        assert time.process_time() - before[1] < 0.1


def test_a_lone_image_waits_for_company_as_long_as_it_may() -> None:
    runtime = fakes.untimed()
    model = fakes.fake_of(runtime)
    with Classifier(runtime, max_batch=4, max_wait_ms=10_000.0) as classifier:
        futures = [classifier.submit(image, policy(0)) for image in fakes.images(4)]
        assert not wait(futures, PATIENCE).not_done
    assert model.calls == [(0, 4)]
    with Classifier(runtime, max_batch=4, max_wait_ms=20.0) as classifier:
        answer = classifier.submit(fakes.images(1)[0], policy(0)).result(PATIENCE)
    assert answer.queue_seconds >= 0.02
    with Classifier(runtime, max_batch=4, max_wait_ms=10_000.0) as classifier:
        future = classifier.submit(fakes.images(1)[0], policy(0))
    assert future.result(0).level == 0  # close does not wait


def test_streams_read_only_a_little_ahead() -> None:
    read: list[int] = []

    def endless() -> Any:
        while True:
            read.append(len(read))
            yield fakes.images(1, len(read))[0]

    with Classifier(fakes.runtime(), max_batch=2) as classifier:
        stream = classifier.stream(endless())
        assert [next(stream).exits for _ in range(20)] == [EXITS] * 20
        assert len(read) < 40
        stream.close()


def test_one_image_or_many() -> None:
    images = fakes.images(3)
    with Classifier(fakes.runtime()) as classifier:
        alone = classifier.classify(images[0])
        assert len(alone) == 1
        for many in (images, list(images), images.numpy(), iter(images)):
            answers = classifier.classify(many)
            assert [torch.equal(answers[0].logits, alone[0].logits), len(answers)] == [True, 3]
        assert classifier.classify([]) == []


def test_what_is_refused_is_named() -> None:
    images = fakes.images(3)
    with Classifier(fakes.runtime()) as classifier:
        with pytest.raises(InvalidInput, match="image 2: float32 must be"):
            classifier.classify([images[0], images[1], images[2, :, :2]])
        answers = classifier.stream([images[0], images[1], 3, images[2]])  # type: ignore[list-item]
        assert [next(answers).exits for _ in range(2)] == [EXITS] * 2
        with pytest.raises(InvalidInput, match=r"image 2: expected a path, .* got int"):
            next(answers)
        with pytest.raises(InvalidInput, match=r"^budget 0\.5 needs"):
            classifier.classify(images, ComputePolicy(budget=0.5))
        with pytest.raises(InvalidInput, match="2 policies for 3 images"):
            classifier.classify(images, [None, None])
        with pytest.raises(InvalidInput, match="expected images, got int"):
            classifier.classify(3)  # type: ignore[arg-type]
        with pytest.raises(InvalidInput, match="calibrate"):
            classifier.submit(images[0], ComputePolicy(budget=0.5))
        assert classifier.submit(images[0]).result(PATIENCE)
    for options, message in (
        ({"mode": "fast"}, "mode must be one of refill, compact, lock_step, dense, got 'fast'"),
        ({"max_wait_ms": -1.0}, "max_wait_ms must be"),
        ({"max_batch": 0}, "expected max_batch"),
        ({"capacity": 3}, "expected max_batch"),
        ({"top": 0}, "top must be"),
    ):
        with pytest.raises(InvalidInput, match=message):
            Classifier(fakes.runtime(), **options)  # type: ignore[arg-type]


def test_a_width_rule_that_looks_at_the_batch_runs_alone() -> None:
    width = WidthSpec(2, mlp_bottleneck=4, rule="official")
    runtime = fakes.untimed(fakes.spec(width=width))
    with Classifier(runtime) as classifier:
        classifier.classify(fakes.images(5), policy(0))
    assert fakes.fake_of(runtime).calls == [(0, 1)] * 5
    with pytest.raises(InvalidInput, match="depends on its batch"):
        Classifier(runtime, max_batch=2)
