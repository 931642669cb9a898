"""Labelled images from a folder or a file, as batches a model can be measured on."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyruntime.engine.images import Preprocessor
from pyruntime.errors import InvalidInput
from pyruntime.format.spec import VisionSpec

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_ARRAYS = ("images", "labels")


@dataclass(frozen=True, slots=True, eq=False)
class ImageSet:
    """n labelled images, not yet decoded.

    Attributes:
        name: of where they are from.
        images: paths, or pixels uint8 [H, W, C].
        labels: int64 [n].
    """

    name: str
    images: Sequence[Path | np.ndarray[Any, Any]]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    @property
    def sha256(self) -> str:
        """Digest, in hex, of the files' bytes or the pixels and their shapes, and of the labels."""
        digest = hashlib.sha256()
        for image, label in zip(self.images, self.labels.tolist(), strict=True):
            if isinstance(image, Path):
                content = image.read_bytes()
                digest.update(f"{len(content)} {label} ".encode())
            else:
                content = image.tobytes()
                digest.update(f"{image.shape} {label} ".encode())
            digest.update(content)
        return digest.hexdigest()

    def deal(self, size: int) -> list[Tensor]:
        """Numbers of the images in batches of at most `size`, int64 [b] each.

        Dealt like cards, so that each batch is a fair sample though the set is sorted by class.
        """
        count = -(-len(self) // size)
        return [torch.arange(first, len(self), count) for first in range(count)]

    def batch(self, preprocess: Preprocessor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """What the model takes of some images, float32 [b, C, H, W], and their labels int64 [b].

        Raises:
            InvalidInput: an image that cannot be used, by its name.
        """
        images = [self._one(preprocess, number) for number in numbers.tolist()]
        return torch.stack(images), self.labels[numbers]

    def _one(self, preprocess: Preprocessor, number: int) -> Tensor:
        image = self.images[number]
        if isinstance(image, Path):
            return preprocess(image)
        try:
            return preprocess(image)
        except InvalidInput as error:
            raise InvalidInput(f"{self.name}: image {number}: {error}") from None


def read_images(
    path: str | os.PathLike[str], spec: VisionSpec, *, limit: int | None = None
) -> ImageSet:
    """The images of a folder with a sub-folder for each class, or of a .npz file.

    A sub-folder is named like a class of the model, or like its number. Otherwise there must be as
    many sub-folders as classes, which then are the classes in the order of their names, as
    torchvision has it. The file holds ``images``, uint8 [N, H, W, C], and ``labels``, integers [N].
    Of more than `limit` images, that many are taken, spread evenly over the whole.

    Raises:
        InvalidInput: what cannot be used, by name; or nothing is left.
    """
    if limit is not None and limit < 1:
        raise InvalidInput(f"the number of images must be at least 1, got {limit}")
    source = Path(path)
    if source.is_dir():
        found = _folder(source, spec)
    elif not source.is_file():
        raise InvalidInput(f"{source}: no such file or folder")
    elif source.suffix != ".npz":
        raise InvalidInput(f"{source}: expected a .npz file, or a folder with one for each class")
    else:
        found = _arrays(source, spec)
    if limit is None or len(found) <= limit:
        return found
    chosen = [number * len(found) // limit for number in range(limit)]
    return ImageSet(found.name, [found.images[i] for i in chosen], found.labels[chosen])


def _folder(folder: Path, spec: VisionSpec) -> ImageSet:
    loose = [p.name for p in sorted(folder.iterdir()) if _is_image(p)]
    if loose:
        raise InvalidInput(
            f"{folder / loose[0]}: has no label; images lie in a sub-folder for each class"
        )
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    numbers = _class_numbers(folder, [p.name for p in classes], spec)
    images: list[Path] = []
    labels: list[int] = []
    for inside, number in zip(classes, numbers, strict=True):
        files = sorted(p for p in inside.rglob("*") if _is_image(p))
        images += files
        labels += [number] * len(files)
    if not images:
        raise InvalidInput(f"{folder}: no sub-folder holds a {', '.join(SUFFIXES)} file")
    return ImageSet(str(folder), images, torch.tensor(labels))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def _class_numbers(folder: Path, names: Sequence[str], spec: VisionSpec) -> list[int]:
    """The class of each sub-folder."""
    if set(names) & set(spec.labels):
        for name in names:
            if spec.labels.count(name) != 1:
                how = "no class" if name not in spec.labels else "more than one class"
                raise InvalidInput(f"{folder / name}: {how} of the model is called {name!r}")
        return [spec.labels.index(name) for name in names]
    if names and all(name.isdecimal() for name in names):
        numbers = [int(name) for name in names]
        for name, number in zip(names, numbers, strict=True):
            if number >= spec.num_classes:
                raise InvalidInput(
                    f"{folder / name}: the classes of the model are 0 to {spec.num_classes - 1}"
                )
        return numbers
    if len(names) != spec.num_classes:
        raise InvalidInput(
            f"{folder}: has {len(names)} sub-folders, and their names are not those of the model's "
            f"classes; expected one for each of its {spec.num_classes} classes"
        )
    return list(range(len(names)))


def _arrays(path: Path, spec: VisionSpec) -> ImageSet:
    try:
        with np.load(path, allow_pickle=False) as stored:
            missing = [name for name in _ARRAYS if name not in stored]
            if missing:
                raise InvalidInput(f"{path}: has no array {missing[0]!r}")
            images, labels = (stored[name] for name in _ARRAYS)
    except InvalidInput:
        raise
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise InvalidInput(f"{path}: cannot be read: {error}") from None
    if images.dtype != np.uint8 or images.ndim != 4:
        raise InvalidInput(
            f"{path}: images must be uint8 [N, H, W, C], are {images.dtype} {list(images.shape)}"
        )
    if labels.dtype.kind not in "iu" or list(labels.shape) != [len(images)]:
        raise InvalidInput(
            f"{path}: labels must be integers [{len(images)}], one for each image, are "
            f"{labels.dtype} {list(labels.shape)}"
        )
    if not len(images):
        raise InvalidInput(f"{path}: holds no image")
    if labels.min() < 0 or labels.max() >= spec.num_classes:
        wrong = int(((labels < 0) | (labels >= spec.num_classes)).argmax())
        raise InvalidInput(
            f"{path}: label {wrong} is {labels[wrong]}; the classes of the model are 0 to "
            f"{spec.num_classes - 1}"
        )
    return ImageSet(str(path), list(images), torch.from_numpy(labels.astype(np.int64)))
