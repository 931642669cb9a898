"""Pixels: images of any sizes in one memory, as the ops that read patches take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput


@dataclass(frozen=True, slots=True, eq=False)
class Pixels:
    """B images of the same channels, each [C, H, W] contiguous in ``data``.

    Attributes:
        data: float32 [any], contiguous.
        table: int64 [B, 3] in host memory, whatever the device of ``data``: the first element,
            height and width of every image.
        channels: C.
    """

    data: Tensor
    table: Tensor
    channels: int

    @staticmethod
    def of(images: Tensor) -> Pixels:
        """Images float32 [B, C, H, W] of one size: a view of them if they are contiguous.

        Raises:
            InvalidInput: another rank or dtype.
        """
        if images.dim() != 4 or images.dtype != torch.float32:
            raise InvalidInput(
                f"pixels: images must be float32 [B, C, H, W], got {images.dtype} "
                f"{list(images.shape)}"
            )
        count, channels, height, width = images.shape
        step = channels * height * width
        rows = [(i * step, height, width) for i in range(count)]
        return Pixels(images.reshape(-1), _table(rows), channels)

    @staticmethod
    def of_list(images: Sequence[Tensor]) -> Pixels:
        """A copy of images float32 [C, H, W] that may differ in height and width; at least one.

        Raises:
            InvalidInput: no image; another rank or dtype; channels or devices that differ.
        """
        if not images:
            raise InvalidInput("pixels: expected at least one image, got none")
        channels, device = images[0].shape[:1], images[0].device
        rows, first = [], 0
        for i, image in enumerate(images):
            if (
                image.dim() != 3
                or image.dtype != torch.float32
                or image.shape[:1] != channels
                or image.device != device
            ):
                raise InvalidInput(
                    f"pixels: image {i} must be float32 [C, H, W] with the channels and device of "
                    f"the first, {list(channels)} on {device}, got {image.dtype} "
                    f"{list(image.shape)} on {image.device}"
                )
            rows.append((first, *image.shape[1:]))
            first += image.numel()
        data = torch.cat([image.reshape(-1) for image in images])
        return Pixels(data, _table(rows), images[0].shape[0])

    @property
    def count(self) -> int:
        """B, the number of images."""
        return self.table.shape[0]

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of every image."""
        return tuple((height, width) for _, height, width in self.table.tolist())

    def image(self, i: int) -> Tensor:
        """Image i as [C, H, W]: a view."""
        first, height, width = self.table[i].tolist()
        step = self.channels * height * width
        return self.data[first : first + step].view(self.channels, height, width)


def _table(rows: Sequence[tuple[int, ...]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).view(-1, 3)
