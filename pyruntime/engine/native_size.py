"""Images at their own aspect ratio: how large each may be."""

from __future__ import annotations

from dataclasses import dataclass

from pyruntime.errors import InvalidInput

_STEPS = 60  # of a bisection: more than a float has digits


@dataclass(frozen=True, slots=True)
class NativeSize:
    """NaFlex's and NaViT's way: no crop and no fixed shape, but a bound on the patches.

    Attributes:
        patch: side of a finest patch, in pixels.
        unit: side of a coarsest patch; sides of images are multiples of it.
        most: finest patches of an image.

    Raises:
        InvalidInput: not even one coarsest patch fits.
    """

    patch: int
    unit: int
    most: int

    def __post_init__(self) -> None:
        least = (self.unit // self.patch) ** 2
        if self.most < least:
            raise InvalidInput(
                f"max_patches must be at least {least}, the patches of a region, got {self.most}"
            )

    def patches(self, height: int, width: int) -> int:
        """Finest patches of an image, padded up to whole coarsest ones."""
        across = (self.unit // self.patch) ** 2
        return -(-height // self.unit) * -(-width // self.unit) * across

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns to resize an image to: its own size, or the largest smaller one of its
        aspect ratio that has few enough patches; each the nearest multiple of `unit`."""
        scale = 1.0
        if not self._fits(height, width, scale):
            low, high = 0.0, 1.0  # one fits, the other does not
            for _ in range(_STEPS):
                middle = (low + high) / 2
                low, high = (middle, high) if self._fits(height, width, middle) else (low, middle)
            scale = low
        return self._rounded(height * scale), self._rounded(width * scale)

    def _fits(self, height: int, width: int, scale: float) -> bool:
        sides = self._rounded(height * scale), self._rounded(width * scale)
        return self.patches(*sides) <= self.most

    def _rounded(self, side: float) -> int:
        return max(1, round(side / self.unit)) * self.unit
