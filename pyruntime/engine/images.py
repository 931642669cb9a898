"""Files, pictures and pixels to what a vision model takes, as its training code prepared them."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeAlias, TypeGuard, cast

import torch
from torch import Tensor

from pyruntime.engine.arrays import Array, as_tensor
from pyruntime.engine.native_size import NativeSize
from pyruntime.engine.pillow import pillow, resize, upright
from pyruntime.errors import InvalidInput
from pyruntime.format.spec import Preprocess

if TYPE_CHECKING:
    from pyruntime.engine.pillow import Picture

Image: TypeAlias = "str | os.PathLike[str] | Picture | Tensor | Array"

_MOST_PIXELS = 1 << 26  # of a resized image: a strip of 1 x 20000 pixels would become a huge one
_DEEP = ("I", "F")  # modes with more than 8 bits, which Pillow cuts off instead of scaling


class Preprocessor:
    """Makes float32 [C, H, W] of one image.

    The rules are those of timm and torchvision: resize with Pillow's filters, centre crop, scale
    to [0, 1], subtract the mean, divide by the deviation. The side that is resized to is
    floor(side / crop), as in timm. With a `NativeSize` images keep their aspect ratio and are not
    cropped.
    """

    def __init__(
        self, spec: Preprocess, image_size: tuple[int, ...], native: NativeSize | None = None
    ) -> None:
        self.spec = spec
        self.native = native
        self.height, self.width = image_size
        self.channels = len(spec.mean)
        self._mean = torch.tensor(spec.mean)[:, None, None]
        self._std = torch.tensor(spec.std)[:, None, None]

    def __call__(self, image: Image) -> Tensor:
        """One image, float32 [C, H, W].

        Args:
            image: the path of a file; a Pillow image; pixels, uint8 [H, W, C] (or [H, W], grey) of
                NumPy and CuPy, uint8 [C, H, W] of torch; or float32 [C, H, W] of any of them, which
                is taken as it is: normalised, and of the model's size, or with a `NativeSize` of
                any that has few enough patches. Pictures are turned as their EXIF data says and
                converted to the model's channels; transparency is ignored.

        Raises:
            InvalidInput: what cannot be read or is none of these.
            Unavailable: Pillow is needed and missing.
        """
        if isinstance(image, str | os.PathLike):
            return self._read(image)
        if _is_picture(image):
            return self._normalised(self._pixels("image", image))
        if not hasattr(image, "__dlpack__"):
            raise InvalidInput(
                f"image: expected a path, a Pillow image or an array, got {type(image).__name__}"
            )
        array = as_tensor("image", image)
        if array.dtype == torch.float32:
            return self._checked(array)
        if array.dtype != torch.uint8:
            raise InvalidInput(
                f"image: expected uint8 pixels or normalised float32, got {array.dtype} "
                f"{list(array.shape)}"
            )
        return self._normalised(self._resized(self._channels_last(image, array)))

    def _checked(self, array: Tensor) -> Tensor:
        if self.native is not None:
            return self._bounded(array, self.native)
        expected = [self.channels, self.height, self.width]
        if list(array.shape) != expected:
            raise InvalidInput(
                f"image: float32 must be {expected} and normalised, got {list(array.shape)}; "
                "pixels are uint8"
            )
        return array.contiguous()

    def _bounded(self, array: Tensor, native: NativeSize) -> Tensor:
        shape = list(array.shape)
        if len(shape) != 3 or shape[0] != self.channels or 0 in shape:
            raise InvalidInput(
                f"image: float32 must be [{self.channels}, H, W] and normalised, got {shape}; "
                "pixels are uint8"
            )
        found = native.patches(*shape[1:])
        if found > native.most:
            raise InvalidInput(f"image: {shape} has {found} patches, at most {native.most} may be")
        return array.contiguous()

    def _channels_last(self, image: object, array: Tensor) -> Tensor:
        """uint8 [H, W, C] of pixels in the layout of their library."""
        is_torch = isinstance(image, Tensor)
        if array.dim() == 2:
            array = array[None] if is_torch else array[..., None]
        at = 0 if is_torch else 2
        if array.dim() != 3 or 0 in array.shape or array.shape[at] not in (1, self.channels):
            layout = f"[{self.channels}, H, W]" if is_torch else f"[H, W, {self.channels}]"
            kind = "a torch tensor" if is_torch else "an array"
            raise InvalidInput(
                f"image: pixels of {kind} must be uint8 {layout}, got {list(array.shape)}"
            )
        pixels = array.permute(1, 2, 0) if is_torch else array
        return pixels.expand(-1, -1, self.channels).contiguous()

    def _read(self, path: str | os.PathLike[str]) -> Tensor:
        pil = pillow()
        name = os.fspath(path)
        try:
            with pil.open(name) as picture:
                return self._normalised(self._pixels(name, picture))
        except InvalidInput:
            raise
        except pil.UnidentifiedImageError:
            raise InvalidInput(f"{name}: not an image, or of a kind Pillow cannot read") from None
        except OSError as error:
            raise InvalidInput(f"{name}: {error.strerror or error}") from None
        except Exception as error:  # decoders of damaged files raise about anything
            raise InvalidInput(f"{name}: cannot be decoded: {error}") from None

    def _pixels(self, name: str, picture: Picture) -> Tensor:
        """uint8 [C, H, W] of the model's size."""
        try:
            picture = self._upright(name, picture)
        except InvalidInput:
            raise
        except Exception as error:  # as in `_read`; pixels are decoded when they are first needed
            raise InvalidInput(f"{name}: cannot be decoded: {error}") from None
        return self._resized(picture, name)

    def _upright(self, name: str, picture: Picture) -> Picture:
        """Of the model's channels."""
        # A photograph with a second, smaller version of itself is no animation.
        if getattr(picture, "is_animated", False) and picture.format != "MPO":
            frames = getattr(picture, "n_frames", "several")
            raise InvalidInput(f"{name}: has {frames} frames, expected one")
        if picture.mode.startswith(_DEEP):
            raise InvalidInput(
                f"{name}: has pixels of mode {picture.mode!r}, expected 8 bits per channel"
            )
        mode = {1: "L", 3: "RGB"}.get(self.channels)
        if mode is None:
            raise InvalidInput(
                f"{name}: the model takes {self.channels} channels: give normalised float32"
            )
        return upright(picture, mode)

    def _resized(self, pixels: Tensor | Picture, name: str = "image") -> Tensor:
        """uint8 [C, H, W] of a picture, or of pixels [h, w, C], resized and cropped."""
        if isinstance(pixels, Tensor):
            height, width = pixels.shape[:2]
        else:
            width, height = pixels.size
        rows, columns = self._size(height, width, name)
        interpolation = self.spec.interpolation
        if isinstance(pixels, Tensor):
            if (rows, columns) != (height, width):
                grey = self.channels == 1
                array = (pixels[..., 0] if grey else pixels).numpy()
                pixels = resize(pillow().fromarray(array), rows, columns, interpolation)
        else:
            pixels = resize(pixels, rows, columns, interpolation)
        if not isinstance(pixels, Tensor):
            flat = torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8)
            pixels = flat.view(rows, columns, self.channels)
        if self.native is not None:
            return pixels.permute(2, 0, 1)
        # Rounds half to even, like torchvision.
        top = round((rows - self.height) / 2)
        left = round((columns - self.width) / 2)
        cut = pixels[top : top + self.height, left : left + self.width]
        return cut.permute(2, 0, 1)

    def _size(self, height: int, width: int, name: str = "image") -> tuple[int, int]:
        """Rows and columns to resize to: the smallest that cover the model's, over the crop; or
        what a `NativeSize` says."""
        if self.native is not None:
            return self.native.sides(height, width)
        # 224 / (224 / 256) must be 256, whatever the last bit says.
        rows, columns = (
            math.floor(side / self.spec.crop + 1e-6) for side in (self.height, self.width)
        )
        if self.spec.squash:
            return rows, columns
        if rows * width <= columns * height:  # the width decides
            found = int(columns * height / width), columns
        else:
            found = rows, int(rows * width / height)
        if found[0] * found[1] > _MOST_PIXELS:
            raise InvalidInput(
                f"{name}: {height} x {width} pixels are too narrow to resize to "
                f"{found[0]} x {found[1]}"
            )
        return found

    def _normalised(self, pixels: Tensor) -> Tensor:
        return pixels.float().div_(255).sub_(self._mean).div_(self._std)


def as_images(images: Image | Iterable[Image]) -> Iterable[Image]:
    """One image as a list of it; an array of images as its rows; any other iterable as it is.

    Raises:
        InvalidInput: neither an image nor iterable.
    """
    if isinstance(images, str | os.PathLike) or _is_picture(images):
        return [images]
    if getattr(images, "ndim", None) in (2, 3):
        return [cast("Array", images)]
    if not isinstance(images, Iterable):
        raise InvalidInput(f"images: expected images, got {type(images).__name__}")
    return images


def _is_picture(image: object) -> TypeGuard[Picture]:
    # Who has a Pillow image has imported Pillow.
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(image, module.Image)
