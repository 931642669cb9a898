"""DigitScenes: small digits on large, smooth photo scenes, made from data that needs no download.

The digits are scikit-learn's 8×8 scans, the photos come with scikit-learn and scikit-image. A scene
is a blurred, darkened photo crop, up to `clutter` sharp photo tiles that mean nothing, and one
bright digit; its class is the digit. The object is small and the rest is smooth, so a network that
decides where or how long to look has something to decide.

Splits are by digit index and by photo *file*: no digit and no photo pixel of the test split is ever
seen in training. "fit" and "calibration" cut "train" once more, by digit index, for work that needs
scenes which are neither trained on nor tested on; they share the training photos.

Two settings in use: 64 px with digits of 6 or 8 px (``Scenes(split)``), and 96 px with digits of 12
to 24 px (``Scenes(split, size=96, digit_px=tuple(range(12, 25)), tile_px=(12, 24))``).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from skimage import data as photos
from sklearn.datasets import load_digits, load_sample_images

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

# Digit indices; the tail of the file is by other writers.
SPLITS = {"train": (0, 1297), "fit": (0, 1097), "calibration": (1097, 1297), "test": (1297, 1797)}
BACKGROUND_BLUR = 14.0


@dataclass(frozen=True)
class Batch:
    """`images` uint8 [n, size, size, 3]; `labels` int64 [n]; `boxes` int64 [n, 3]: y, x, side."""

    images: Bytes
    labels: Ints
    boxes: Ints


def _rgb(image: NDArray[np.uint8]) -> Floats:
    """[h, w] or [h, w, 3+] of 0..255 -> float32 [h, w, 3] of 0..1."""
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    return image[..., :3].astype(np.float32) / 255


def _photos(split: str) -> list[Floats]:
    china, flower = load_sample_images().images
    if split == "test":
        found = [flower, photos.coffee(), photos.chelsea(), photos.grass(), photos.page()]
    else:
        found = [china, photos.astronaut(), photos.rocket(), photos.brick(), photos.coins()]
    return [_rgb(image) for image in found]


def _resize(digit: Floats, side: int) -> Floats:
    """Bilinear, half-pixel centres: [8, 8] -> [side, side]."""
    at = (np.arange(side) + 0.5) * 8 / side - 0.5
    low = np.clip(np.floor(at).astype(int), 0, 7)
    high = np.clip(low + 1, 0, 7)
    part = np.clip(at - low, 0, 1).astype(np.float32)
    rows = digit[low] * (1 - part)[:, None] + digit[high] * part[:, None]
    return rows[:, low] * (1 - part)[None] + rows[:, high] * part[None]


class Scenes:
    """A stream of scenes, fixed by its arguments and seed.

    `digit_px`: the sides a digit may have; `grid`: its position is a multiple of this; `tile_px`:
    smallest and largest clutter tile; `clutter`: how many tiles at most.
    """

    def __init__(
        self,
        split: str,
        seed: int = 0,
        *,
        size: int = 64,
        digit_px: tuple[int, ...] = (6, 8),
        grid: int = 4,
        clutter: int = 2,
        tile_px: tuple[int, int] = (8, 16),
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
        first, last = SPLITS[split]
        digits = load_digits()
        self.digits: Floats = (digits.images[first:last] / 16).astype(np.float32)
        self.labels: Ints = digits.target[first:last]
        self.sharp = _photos(split)
        self.smooth = [
            np.stack([gaussian_filter(p[..., c], BACKGROUND_BLUR) for c in range(3)], axis=-1)
            for p in self.sharp
        ]
        self.rng = np.random.default_rng(seed)
        self.size, self.digit_px, self.grid = size, digit_px, grid
        self.clutter, self.tile_px = clutter, tile_px

    def batch(self, count: int) -> Batch:
        images = np.empty((count, self.size, self.size, 3), np.uint8)
        labels = np.empty(count, np.int64)
        boxes = np.empty((count, 3), np.int64)
        for i in range(count):
            images[i], labels[i], boxes[i] = self.scene()
        return Batch(images, labels, boxes)

    def scene(self) -> tuple[Bytes, int, tuple[int, int, int]]:
        """One image uint8 [size, size, 3], its class, and the digit's (y, x, side)."""
        rng, size = self.rng, self.size
        image = self._crop(self.smooth, size) * rng.uniform(0.2, 0.55) + rng.uniform(0, 0.08, 3)
        image = image.astype(np.float32)
        index = rng.integers(len(self.digits))
        side = int(rng.choice(self.digit_px))
        y, x = (int(v) for v in rng.integers(0, (size - side) // self.grid + 1, 2) * self.grid)
        box = (y, x, side)
        for _ in range(rng.integers(0, self.clutter + 1)):
            self._add_tile(image, box)
        alpha = np.clip(_resize(self.digits[index], side) * 1.6 - 0.2, 0, 1)[..., None]
        colour = rng.uniform(0.75, 1.0, 3).astype(np.float32)
        place = (slice(y, y + side), slice(x, x + side))
        image[place] = image[place] * (1 - alpha) + colour * alpha
        noisy = np.clip(image + rng.normal(0, 0.01, image.shape), 0, 1)
        return (noisy * 255).astype(np.uint8), int(self.labels[index]), box

    def _crop(self, sources: list[Floats], side: int) -> Floats:
        photo = sources[self.rng.integers(len(sources))]
        y = self.rng.integers(photo.shape[0] - side + 1)
        x = self.rng.integers(photo.shape[1] - side + 1)
        return photo[y : y + side, x : x + side]

    def _add_tile(self, image: Floats, box: tuple[int, int, int]) -> None:
        """Paste a sharp photo tile beside the digit; gives up after eight places that cover it."""
        y, x, side = box
        tile = int(self.rng.integers(self.tile_px[0], self.tile_px[1] + 1))
        for _ in range(8):
            ty, tx = self.rng.integers(0, self.size - tile + 1, 2)
            if ty + tile <= y or y + side <= ty or tx + tile <= x or x + side <= tx:
                cut = self._crop(self.sharp, tile)
                image[ty : ty + tile, tx : tx + tile] = cut * self.rng.uniform(0.5, 0.9)
                return


def large_scenes(split: str, seed: int = 0) -> Scenes:
    """The 96 px setting: digits of 12 to 24 px, tiles of 12 to 24 px, positions on a 4 px grid."""
    return Scenes(split, seed, size=96, digit_px=tuple(range(12, 25)), tile_px=(12, 24))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write scenes to an .npz file: images, labels.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", choices=sorted(SPLITS), default="test")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--size", type=int, choices=(64, 96), default=64, help="the setting")
    parser.add_argument("--seed", type=int, default=99)
    args = parser.parse_args()
    stream = Scenes if args.size == 64 else large_scenes
    scenes = stream(args.split, args.seed).batch(args.count)
    np.savez(args.out, images=scenes.images, labels=scenes.labels)


if __name__ == "__main__":
    main()
