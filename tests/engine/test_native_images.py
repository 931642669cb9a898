"""Images at their own aspect ratio: as large as a bound on their patches lets them be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pyruntime import Classifier, ComputePolicy
from pyruntime.engine.images import Preprocessor
from pyruntime.engine.native_size import NativeSize
from pyruntime.errors import InvalidInput
from pyruntime.format.spec import Preprocess
from tests.engine import vision_fakes as fakes
from tests.engine.scale_models import runtime_of, scale_spec
from tests.models.vision_models import T2T, spec_of

pytestmark = pytest.mark.usefixtures("one_thread")

HALF = Preprocess((0.5,) * 3, (0.5,) * 3)


@given(
    height=st.integers(1, 4000),
    width=st.integers(1, 4000),
    patch=st.sampled_from([4, 14, 16]),
    ratio=st.sampled_from([1, 2, 4]),
    most=st.integers(16, 1024),
)
def test_sides(height: int, width: int, patch: int, ratio: int, most: int) -> None:
    size = NativeSize(patch, ratio * patch, most)
    rows, columns = size.sides(height, width)
    assert rows % size.unit == columns % size.unit == 0 and min(rows, columns) > 0
    assert size.patches(rows, columns) == rows * columns // patch**2 <= most

    def nearest(scale: float) -> tuple[int, int]:
        sides = (max(1, round(side * scale / size.unit)) for side in (height, width))
        down, across = (side * size.unit for side in sides)
        return down, across

    if size.patches(*nearest(1.0)) <= most:
        assert (rows, columns) == nearest(1.0)  # never larger than it is, but for rounding
    else:
        # The next larger image of this aspect ratio has too many patches.
        scales = sorted((n + 0.5) * size.unit / side for side in (height, width)
                        for n in range(-(-side // size.unit)))  # fmt: skip
        larger = [found for scale in scales if (found := nearest(scale * (1 + 1e-9))) != (0, 0)]
        fitting = [found for found in larger if size.patches(*found) <= most]
        assert all(r <= rows and c <= columns for r, c in fitting)


@pytest.mark.parametrize(
    ("shape", "sides"),
    [
        ((64, 64), (64, 64)),
        ((40, 20), (32, 16)),  # no larger, but for the nearest multiple: round half to even
        ((1000, 1000), (64, 64)),
        ((1000, 500), (80, 48)),
        ((5000, 5), (256, 16)),
    ],
)
def test_pictures_keep_their_aspect_ratio(shape: tuple[int, int], sides: tuple[int, int]) -> None:
    prepare = Preprocessor(HALF, (64, 64), NativeSize(4, 16, 256))
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    found = prepare(pixels)
    assert found.shape == (3, *sides)
    picture = Image.fromarray(pixels)
    assert torch.equal(prepare(picture), found)
    if shape != sides:
        picture = picture.resize((sides[1], sides[0]), Image.Resampling.BICUBIC)
    array = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)
    assert torch.equal(found, (array.float() / 255 - 0.5) / 0.5)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 65, 64), r"image: \[3, 65, 64\] has 320 patches, at most 256 may be"),
        (torch.zeros(1, 64, 64), r"float32 must be \[3, H, W\] and normalised, got \[1, 64, 64\]"),
        (torch.zeros(3, 0, 64), r"got \[3, 0, 64\]"),
        (torch.zeros(64, 64), r"got \[64, 64\]"),
    ],
)
def test_arrays_that_are_refused(image: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Preprocessor(HALF, (64, 64), NativeSize(4, 16, 256))(image)


def test_arrays_are_taken_as_they_are() -> None:
    prepare = Preprocessor(HALF, (64, 64), NativeSize(4, 16, 256))
    for size in ((64, 64), (1, 1), (100, 30), (16, 256)):
        image = torch.randn(3, *size)
        assert prepare(image).data_ptr() == image.data_ptr()


def test_a_classifier_of_native_images() -> None:
    runtime = runtime_of(scale_spec("exits"))  # 16 x 24 pixels: 4 x 6 patches, 2 x 3 regions
    random = np.random.default_rng(1)
    shapes = [(16, 24), (24, 16), (9, 9), (200, 300), (8, 48), (100, 10)]
    pictures = [random.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    with Classifier(runtime, native=True) as classifier:
        answers = classifier.classify(pictures)
        sizes = [tuple(classifier.preprocess(picture).shape[1:]) for picture in pictures]
    assert sizes == [(16, 24), (24, 16), (8, 8), (16, 24), (8, 48), (48, 8)]
    for picture, answer, size in zip(pictures, answers, sizes, strict=True):
        with Classifier(runtime, native=True, max_batch=1) as classifier:
            (alone,) = classifier.classify(picture)
        assert torch.equal(alone.logits, answer.logits) and alone.macs == answer.macs
        assert answer.tokens_dense == 1 + size[0] * size[1] // 16 <= 25


def test_options_that_are_refused() -> None:
    mixed = runtime_of(scale_spec("exits"))
    for options, message in (
        ({"native": True, "max_patches": 3}, "max_patches must be at least 4, .* got 3"),
        ({"max_patches": 30}, "max_patches is set, but images are not native"),
    ):
        with pytest.raises(InvalidInput, match=message):
            Classifier(mixed, **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="need a stem of patches"):
        Classifier(runtime_of(spec_of(**T2T)), native=True)
    with Classifier(fakes.runtime()) as classifier, pytest.raises(InvalidInput, match="one scale"):
        classifier.classify(fakes.images(1), ComputePolicy(scales="all_fine"))
