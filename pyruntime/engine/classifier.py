"""Classifier(path).classify(images): images in, classes and their cost out, from any thread."""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType

from pyruntime.engine.classification import Classification
from pyruntime.engine.images import Image, Preprocessor, as_images
from pyruntime.engine.native_size import NativeSize
from pyruntime.engine.vision import VisionRuntime, load_vision
from pyruntime.engine.wave_thread import (
    ClassifierConfig,
    ClassifierStats,
    Mode,
    Request,
    WaveThread,
)
from pyruntime.errors import InvalidInput
from pyruntime.format.spec import VisionSpec
from pyruntime.gates.policy import ComputePolicy

_BATCH = 32
_AHEAD = 4  # batches of images that `stream` reads ahead


class Classifier:
    """A model that classifies images. `path` is a runtime folder, or a VisionRuntime.

    One thread owns the model; every method may be called from any thread. What an image gets does
    not depend on what else is there. `close` (or ``with``) ends it and answers everything that was
    submitted before.

    Attributes:
        runtime: the model.
        preprocess: what happens to files, pictures and pixels first.
    """

    def __init__(
        self,
        path: str | Path | VisionRuntime,
        *,
        verify: bool = True,
        top: int = 5,
        mode: Mode = "refill",
        max_batch: int | None = None,
        max_wait_ms: float = 0.0,
        capacity: int | None = None,
        max_age: int = 8,
        native: bool = False,
        max_patches: int | None = None,
    ) -> None:
        """
        Args:
            verify: compare every shard of a folder with its recorded SHA-256 first.
            top: classes named in an answer.
            mode, max_wait_ms, capacity, max_age: see `ClassifierConfig`.
            max_batch: images that run together; None: 32, or one where the model's width rule
                looks at the whole batch.
            native: images keep their aspect ratio and are not cropped: no larger than they are,
                with sides of whole coarsest patches, and at most `max_patches` finest ones.
            max_patches: None: as many as an image of the model's own size has.

        Raises:
            FormatError: the folder is damaged, or holds no vision transformer.
            InvalidInput: an option out of range.
        """
        if top < 1:
            raise InvalidInput(f"top must be 1 or more, got {top}")
        self.runtime = load_vision(path, verify) if isinstance(path, str | Path) else path
        spec = self.runtime.spec
        mixes = spec.width is not None and spec.width.rule == "official"
        if max_batch is None:
            max_batch = 1 if mixes else _BATCH
        elif mixes and max_batch != 1:
            raise InvalidInput(
                f"max_batch must be 1, got {max_batch}: under this model's width rule, "
                "'official', what an image gets depends on its batch"
            )
        config = ClassifierConfig(mode, max_batch, max_wait_ms, capacity, max_age)
        if self.runtime.exits and max_batch > 1 and mode in ("refill", "compact"):
            self.runtime.times.measure()
        size = _native_size(spec, max_patches) if native else None
        if size is None and max_patches is not None:
            raise InvalidInput("max_patches is set, but images are not native")
        self.preprocess = Preprocessor(spec.preprocess, spec.image_size, size)
        self._thread = WaveThread(self.runtime, config, top)
        # Collected without close: what was submitted is still answered, by the thread alone.
        weakref.finalize(self, self._thread.stop).atexit = False

    @property
    def stats(self) -> ClassifierStats:
        """What has been done so far."""
        return self._thread.stats

    def submit(self, image: Image, policy: ComputePolicy | None = None) -> Future[Classification]:
        """Queue one image.

        Args:
            image: see `pyruntime.engine.images.Preprocessor`. It is read here, on the caller's
                thread; float32 [C, H, W] is not copied.
            policy: how much compute it may use; None: what the model folder stores.

        Returns:
            its answer to come. Cancelling works until its first batch starts.

        Raises:
            InvalidInput: an image or policy that cannot be used, or after `close`.
        """
        policy = policy or ComputePolicy()
        runtime = self.runtime
        rule, limits = runtime.rule(policy), runtime.resolve(policy)
        pixels = self.preprocess(image)
        runtime.rules.check(rule, *pixels.shape[1:])
        request = Request(pixels, limits, rule, policy)
        self._thread.submit(request)
        return request.future

    def classify(
        self,
        images: Image | Iterable[Image],
        policy: ComputePolicy | Sequence[ComputePolicy | None] | None = None,
    ) -> list[Classification]:
        """One answer per image, in order.

        Args:
            images: one or many; an array with one dimension more than an image is many.
            policy: one for all, or one per image.

        Raises:
            InvalidInput: the first image that cannot be used, by its name or number.
        """
        return list(self.stream(images, policy))

    def stream(
        self,
        images: Image | Iterable[Image],
        policy: ComputePolicy | Sequence[ComputePolicy | None] | None = None,
    ) -> Generator[Classification, None, None]:
        """As `classify`, an answer at a time; `images` is read a few batches ahead, no further.

        The answers of all images before one that cannot be used come first.
        """
        each = as_images(images)
        policies: Iterable[ComputePolicy | None]
        if policy is None or isinstance(policy, ComputePolicy):
            # One that cannot be honoured is no fault of an image.
            self.runtime.rule(policy)
            self.runtime.resolve(policy)
            policies = itertools.repeat(policy)
        else:
            each = list(each)
            if len(policy) != len(each):
                raise InvalidInput(f"got {len(policy)} policies for {len(each)} images")
            policies = policy
        pending: deque[Future[Classification]] = deque()
        most = _AHEAD * self._thread.config.max_batch
        refusal: InvalidInput | None = None
        try:
            for number, (image, one) in enumerate(zip(each, policies, strict=False)):
                try:
                    pending.append(self.submit(image, one))
                except InvalidInput as error:
                    refusal = _numbered(number, error)
                    break
                if len(pending) >= most:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
            if refusal is not None:
                raise refusal
        finally:
            for future in pending:
                future.cancel()

    def close(self) -> None:
        """Answer everything that was submitted, then end; later submissions are refused."""
        self._thread.join()

    def __enter__(self) -> Classifier:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _native_size(spec: VisionSpec, most: int | None) -> NativeSize:
    if spec.stem == "t2t":
        raise InvalidInput(
            f"native images need a stem of patches; this model's takes {spec.image_size} alone"
        )
    ratio = 1 if spec.scales is None else spec.scales.ratios[-1]
    rows, columns = spec.grid
    return NativeSize(
        spec.patch_size, ratio * spec.patch_size, rows * columns if most is None else most
    )


def _numbered(number: int, error: InvalidInput) -> InvalidInput:
    """An error about an image that has no name, with its number."""
    text = str(error)
    if not text.startswith("image: "):
        return error
    return InvalidInput(f"image {number}: {text.removeprefix('image: ')}")
