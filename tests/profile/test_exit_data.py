"""What `--data` accepts for a model that classifies images, and what it says of the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pyruntime.engine.images import Preprocessor
from pyruntime.errors import InvalidInput
from pyruntime.format.spec import Preprocess, VisionSpec
from pyruntime.profile.image_data import ImageSet, read_images
from tests.profile.exit_models import IMAGE, pixels

SPEC = VisionSpec(
    source_family="vit", image_size=IMAGE, stem="patch", patch_size=4, hidden_size=8, num_layers=2,
    num_heads=1, mlp_size=8, num_classes=3, norm_eps=1e-6, prefix_tokens=1,
    preprocess=Preprocess((0.5,) * 3, (0.25,) * 3),
)  # fmt: skip
PREPROCESS = Preprocessor(SPEC.preprocess, SPEC.image_size)


def save(path: Path, images: Any = None, labels: Any = None, **others: Any) -> Path:
    """A .npz file; an array that is None is left out."""
    arrays = {"images": images, "labels": labels, **others}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def draw(folder: Path, **classes: int) -> Path:
    """A sub-folder for each class with so many pictures."""
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for number, image in enumerate(pixels(count, seed=len(name))):
            Image.fromarray(image).save(folder / name / f"{number}.png")
    return folder


def test_a_file_of_arrays(tmp_path: Path) -> None:
    images, labels = pixels(5), np.array([2, 0, 1, 1, 2])
    data = read_images(save(tmp_path / "d.npz", images, labels), SPEC)
    assert len(data) == 5 and data.labels.tolist() == labels.tolist()
    found, wanted = data.batch(PREPROCESS, torch.tensor([3, 0]))
    assert wanted.tolist() == [1, 2]
    expected = (torch.from_numpy(images[[3, 0]]).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    torch.testing.assert_close(found, expected)


def test_a_folder_of_classes(tmp_path: Path) -> None:
    draw(tmp_path, ant=2, bee=1, cat=3)
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    data = read_images(tmp_path, SPEC)
    assert data.labels.tolist() == [0, 0, 1, 2, 2, 2]
    found, _ = data.batch(PREPROCESS, torch.arange(6))
    array = save(tmp_path / "d.npz", np.concatenate([pixels(n, 3) for n in (2, 1, 3)]),
                 data.labels.numpy())  # fmt: skip
    same, _ = read_images(array, SPEC).batch(PREPROCESS, torch.arange(6))
    assert torch.equal(found, same)


def test_folders_are_found_by_their_names(tmp_path: Path) -> None:
    draw(tmp_path / "named", cat=1, ant=1)
    labels = ("bee", "cat", "ant")
    assert read_images(tmp_path / "named", replace(SPEC, labels=labels)).labels.tolist() == [2, 1]
    draw(tmp_path / "numbered", **{"2": 1, "00": 2})
    assert read_images(tmp_path / "numbered", SPEC).labels.tolist() == [0, 0, 2]


def test_a_limit_takes_images_from_everywhere(tmp_path: Path) -> None:
    path = save(tmp_path / "d.npz", pixels(30), np.arange(30) // 10)
    data = read_images(path, SPEC, limit=6)
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(read_images(path, SPEC, limit=31)) == 30


def test_batches_are_fair_samples() -> None:
    data = ImageSet("d", list(pixels(50)), torch.arange(50) // 10)
    dealt = data.deal(8)
    assert sorted(torch.cat(dealt).tolist()) == list(range(50))
    assert all(6 <= len(part) <= 8 for part in dealt)
    assert all(set(data.labels[part].tolist()) == set(range(5)) for part in dealt)


def test_the_digest_is_of_pixels_and_labels(tmp_path: Path) -> None:
    images, labels = pixels(4), np.array([0, 1, 2, 0])
    path = tmp_path / "d.npz"
    digest = read_images(save(path, images, labels), SPEC).sha256
    assert read_images(save(tmp_path / "e.npz", images, labels), SPEC).sha256 == digest
    assert read_images(save(path, images, labels[::-1]), SPEC).sha256 != digest
    assert read_images(save(path, images[::-1], labels), SPEC).sha256 != digest
    folder = draw(tmp_path / "f", a=1, b=1, c=1)
    before = read_images(folder, SPEC).sha256
    Image.fromarray(images[0]).save(folder / "a" / "0.png")
    assert read_images(folder, SPEC).sha256 != before


GOOD = (pixels(3), np.array([0, 1, 2]))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (None, GOOD[1], "has no array 'images'"),
        (GOOD[0], None, "has no array 'labels'"),
        (GOOD[0].astype(np.float32), GOOD[1], r"images must be uint8 \[N, H, W, C\], are float32"),
        (GOOD[0][0], GOOD[1], r"are uint8 \[12, 8, 3\]"),
        (GOOD[0], GOOD[1][:2], r"labels must be integers \[3\], one for each image, are .*\[2\]"),
        (GOOD[0], GOOD[1].astype(float), "are float64"),
        (GOOD[0], np.array([0, 1, 3]), "label 2 is 3; the classes of the model are 0 to 2"),
        (GOOD[0], np.array([0, -1, 3]), "label 1 is -1"),
        (GOOD[0][:0], GOOD[1][:0], "holds no image"),
        (GOOD[0], np.array(["a", None, "b"], dtype=object), "cannot be read: .*pickle"),
    ],
)
def test_arrays_that_cannot_be_used_are_named(
    tmp_path: Path, images: Any, labels: Any, message: str
) -> None:
    path = save(tmp_path / "d.npz", images, labels)
    with pytest.raises(InvalidInput, match=rf"d\.npz: .*{message}"):
        read_images(path, SPEC)


def test_an_image_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "d.npz", pixels(2)[..., :2], np.array([0, 1]))
    with pytest.raises(InvalidInput, match=r"d\.npz: image 1: .*\[12, 8, 2\]"):
        read_images(path, SPEC).batch(PREPROCESS, torch.tensor([1]))
    folder = draw(tmp_path / "f", a=1, b=1, c=1)
    (folder / "b" / "0.png").write_bytes(b"nothing")
    with pytest.raises(InvalidInput, match=r"0\.png: not an image"):
        read_images(folder, SPEC).batch(PREPROCESS, torch.tensor([1]))


def _loose(folder: Path) -> None:
    draw(folder, a=1, b=1, c=1)
    Image.fromarray(pixels(1)[0]).save(folder / "loose.jpg")


def _empty(folder: Path) -> None:
    for name in "abc":
        (folder / name).mkdir(parents=True)


@pytest.mark.parametrize(
    ("make", "labels", "message"),
    [
        (lambda f: draw(f, a=1, b=1), (), "has 2 sub-folders, .*expected one for each of its 3"),
        (lambda f: draw(f, **{"0": 1, "3": 1}), (), "f/3: the classes of the model are 0 to 2"),
        (lambda f: draw(f, a=1, x=1), ("a", "b", "c"), "f/x: no class of the model is called 'x'"),
        (lambda f: draw(f, a=1), ("a", "a", "c"), "f/a: more than one class"),
        (_loose, (), r"loose\.jpg: has no label"),
        (_empty, (), "no sub-folder holds a"),
        (lambda f: f.mkdir(), (), "has 0 sub-folders"),
        (lambda f: None, (), "f: no such file or folder"),
        (lambda f: f.write_text("x"), (), r"f: expected a \.npz file"),
    ],
)
def test_folders_that_cannot_be_used_are_named(
    tmp_path: Path, make: Callable[[Path], object], labels: tuple[str, ...], message: str
) -> None:
    make(tmp_path / "f")
    with pytest.raises(InvalidInput, match=message):
        read_images(tmp_path / "f", replace(SPEC, labels=labels))


def test_a_damaged_file_and_a_limit_of_none(tmp_path: Path) -> None:
    (tmp_path / "d.npz").write_bytes(b"nothing of the kind")
    with pytest.raises(InvalidInput, match=r"d\.npz: cannot be read"):
        read_images(tmp_path / "d.npz", SPEC)
    with pytest.raises(InvalidInput, match="number of images"):
        read_images(save(tmp_path / "e.npz", *GOOD), SPEC, limit=0)
