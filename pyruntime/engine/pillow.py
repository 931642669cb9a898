"""Pillow, where it is installed: reading pictures, resizing them, writing PNG files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from pyruntime.errors import Unavailable

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

    Picture: TypeAlias = PillowImage

_CAPTION = 18  # height of a caption's letters, in pixels


def pillow() -> Any:
    """The module ``PIL.Image``.

    Raises:
        Unavailable: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise Unavailable(
            "image files and pixels to resize need the package Pillow: "
            "pip install 'pyruntime[vision]'"
        ) from None
    return Image


def upright(picture: Picture, mode: str) -> Picture:
    """Turned as its EXIF data says, in a Pillow mode."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(picture).convert(mode)


def resize(picture: Picture, rows: int, columns: int, interpolation: str) -> Picture:
    """With Pillow's ``bilinear`` or ``bicubic`` filter."""
    pil = pillow()
    filters = {"bilinear": pil.Resampling.BILINEAR, "bicubic": pil.Resampling.BICUBIC}
    return picture.resize((columns, rows), filters[interpolation])


def write_png(
    path: str | os.PathLike[str], pixels: Tensor, caption: str, facts: Mapping[str, str]
) -> None:
    """A picture with a line of text below it.

    Args:
        pixels: uint8 [H, W, 3].
        facts: what the file says about itself (its text chunks), by keyword.

    Raises:
        OSError: the file cannot be written.
        Unavailable: Pillow is not installed.
    """
    pil = pillow()
    from PIL import ImageDraw, ImageFont, PngImagePlugin

    font = ImageFont.load_default(_CAPTION)
    left, _, right, _ = font.getbbox(caption)
    if right - left > pixels.shape[1] - 8:  # shrink rather than cut
        font = ImageFont.load_default(_CAPTION * (pixels.shape[1] - 8) / (right - left))
    strip = torch.full((_CAPTION + 12, pixels.shape[1], 3), 255, dtype=torch.uint8)
    picture = pil.fromarray(torch.cat([pixels, strip]).contiguous().numpy())
    ImageDraw.Draw(picture).text((4, pixels.shape[0] + 5), caption, fill=(20, 20, 20), font=font)
    text = PngImagePlugin.PngInfo()
    for name, value in facts.items():
        text.add_text(name, value)
    picture.save(path, "PNG", pnginfo=text)
