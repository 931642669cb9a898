"""Files, pictures and arrays: prepared as the training code does, or refused in so many words."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pyruntime.engine.images import Preprocessor, as_images
from pyruntime.errors import InvalidInput
from pyruntime.format.spec import Preprocess

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def preprocessor(
    size: tuple[int, int] = (16, 16),
    interpolation: Literal["bilinear", "bicubic"] = "bicubic",
    crop: float = 1.0,
    squash: bool = False,
    channels: int = 3,
) -> Preprocessor:
    spec = Preprocess(MEAN[:channels], STD[:channels], interpolation, crop, squash)
    return Preprocessor(spec, size)


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def saved(path: Path, picture: Image.Image, **options: Any) -> Path:
    picture.save(path, **options)
    return path


def timm_style(array: Any, size: int, crop: float, interpolation: Any) -> torch.Tensor:
    """Resize, CenterCrop, ToTensor and Normalize, as torchvision writes them for squares."""
    picture = Image.fromarray(array)
    wanted = math.floor(size / crop + 1e-6)
    w, h = picture.size
    short, long = min(w, h), max(w, h)
    new = (wanted, int(wanted * long / short))
    w, h = new if w <= h else new[::-1]
    picture = picture.resize((w, h), interpolation)
    top, left = round((h - size) / 2.0), round((w - size) / 2.0)
    picture = picture.crop((left, top, left + size, top + size))
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div(255)
    return (tensor - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    size=st.integers(1, 40),
    crop=st.sampled_from([1.0, 0.95, 0.9, 0.875, 0.5]),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
)
def test_pictures_are_prepared_as_timm_does(
    height: int, width: int, size: int, crop: float, interpolation: Any
) -> None:
    array = pixels(height, width)
    expected = timm_style(array, size, crop, getattr(Image.Resampling, interpolation.upper()))
    prepare = preprocessor((size, size), interpolation, crop)
    for image in (Image.fromarray(array), array, torch.from_numpy(array).permute(2, 0, 1)):
        found = prepare(image)
        assert found.shape == (3, size, size) and found.dtype == torch.float32
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("side", "crop", "resized"), [
    (224, 224 / 256, 256), (224, 0.875, 256), (224, 0.9, 248), (224, 0.95, 235), (384, 1.0, 384),
])  # fmt: skip
def test_the_side_that_is_resized_to(side: int, crop: float, resized: int) -> None:
    assert preprocessor((side, side), crop=crop)._size(1000, 2000) == (resized, 2 * resized)


def test_rectangles_and_squashed_images() -> None:
    array = pixels(30, 50)
    wide = preprocessor((10, 40))(array)  # the width decides, the height is cropped
    whole = Image.fromarray(array).resize((40, 24), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(whole))[7:17].permute(2, 0, 1)
    assert torch.equal(wide, _normalised(expected))
    squashed = preprocessor((20, 20), squash=True)(array)
    whole = Image.fromarray(array).resize((20, 20), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(whole)).permute(2, 0, 1)
    assert torch.equal(squashed, _normalised(expected))


def _normalised(image: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (image.float() / 255 - mean) / std


def test_normalised_float32_passes_as_it_is() -> None:
    image = torch.randn(3, 16, 16)
    prepare = preprocessor()
    assert prepare(image).data_ptr() == image.data_ptr()
    assert torch.equal(prepare(image.numpy()), image)
    assert torch.equal(prepare(image.permute(0, 2, 1)), image.permute(0, 2, 1))
    assert not prepare(image.clone().requires_grad_()).requires_grad


def test_arrays_that_dlpack_does_not_take_as_they_are() -> None:
    array, prepare = pixels(20, 30), preprocessor()
    expected = prepare(array)
    frozen = array.copy()
    frozen.setflags(write=False)
    assert torch.equal(prepare(frozen), expected)
    assert torch.equal(prepare(np.ascontiguousarray(array[:, ::-1])[:, ::-1]), expected)
    assert torch.equal(prepare(np.asfortranarray(array)), expected)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.webp", "a.tif", "a.gif", "a.jpg"])
def test_files_of_every_common_kind(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path / name, Image.fromarray(pixels(24, 24)))
    prepare = preprocessor((24, 24))
    with Image.open(path) as picture:
        expected = _normalised(torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1))
    assert torch.equal(prepare(path), expected) and torch.equal(prepare(str(path)), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_pictures_of_other_modes_become_rgb(mode: str) -> None:
    picture = Image.fromarray(pixels(16, 16)).convert(mode)
    expected = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(preprocessor()(picture), _normalised(expected))


def test_grey_pixels_and_models_of_one_channel() -> None:
    grey = pixels(16, 16)[..., 0]
    expected = preprocessor()(np.stack([grey] * 3, 2))
    for image in (grey, grey[..., None], torch.from_numpy(grey), torch.from_numpy(grey)[None]):
        assert torch.equal(preprocessor()(image), expected)
    one = preprocessor((8, 8), channels=1)
    assert one(grey).shape == (1, 8, 8)
    assert torch.equal(one(grey), one(Image.fromarray(grey)))


def test_photographs_are_turned_as_they_say(tmp_path: Path) -> None:
    array = pixels(8, 12)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    path = saved(tmp_path / "turned.png", Image.fromarray(array), exif=exif)
    upright = Image.fromarray(np.ascontiguousarray(np.rot90(array, -1)))
    prepare = preprocessor((6, 6))
    assert torch.equal(prepare(path), prepare(upright))


def test_a_photograph_with_a_preview_is_one_picture(tmp_path: Path) -> None:
    first, second = Image.fromarray(pixels(16, 16)), Image.fromarray(pixels(8, 8))
    path = saved(tmp_path / "a.jpg", first, format="MPO", save_all=True, append_images=[second])
    with Image.open(path) as picture:
        assert picture.format == "MPO" and picture.n_frames == 2
    assert preprocessor()(path).shape == (3, 16, 16)


def broken(folder: Path, kind: str) -> Path:
    whole = io.BytesIO()
    Image.fromarray(pixels(64, 64)).save(whole, "PNG" if kind == "png" else "JPEG")
    data = whole.getvalue()
    path = folder / f"{kind}.img"
    path.write_bytes({"text": b"not an image", "empty": b"", "head": data[:20]}.get(
        kind, data[: len(data) // 2]))  # fmt: skip
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text", "not an image, or of a kind"),
        ("empty", "not an image, or of a kind"),
        ("head", "not an image, or of a kind|truncated"),
        ("jpeg", "cannot be decoded: .*truncated"),
        ("png", "cannot be decoded: "),
    ],
)
def test_damaged_files(tmp_path: Path, kind: str, message: str) -> None:
    path = broken(tmp_path, kind)
    with pytest.raises(InvalidInput, match=f"{path}: ({message})"):
        preprocessor()(path)


@given(st.data())
def test_files_with_bytes_changed_never_raise_anything_else(data: st.DataObject) -> None:
    whole = io.BytesIO()
    form = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]))
    Image.fromarray(pixels(16, 16)).save(whole, form)
    content = bytearray(whole.getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"pyruntime-damaged-{os.getpid()}"
    path.write_bytes(content)
    try:
        assert preprocessor()(path).shape == (3, 16, 16)
    except InvalidInput as error:
        assert str(error).startswith(str(path))
    finally:
        path.unlink()


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"none\.png: No such file"):
        preprocessor()(tmp_path / "none.png")
    with pytest.raises(InvalidInput, match="Is a directory"):
        preprocessor()(tmp_path)


def test_animations_and_deep_pixels_are_refused(tmp_path: Path) -> None:
    frames = [Image.fromarray(pixels(16, 16, seed)) for seed in range(3)]
    path = saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    with pytest.raises(InvalidInput, match=r"a\.gif: has 3 frames, expected one"):
        preprocessor()(path)
    for dtype, mode in ((np.uint16, "I;16"), (np.int32, "I"), (np.float32, "F")):
        deep = Image.fromarray(np.zeros((16, 16), dtype))
        with pytest.raises(InvalidInput, match=f"image: has pixels of mode '{mode}', expected 8"):
            preprocessor()(deep)


def test_huge_pictures_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.png", Image.new("RGB", (40, 40)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InvalidInput, match=r"a.png: cannot be decoded: .*1600 pixels"):
        preprocessor()(path)


def test_strips_are_refused_before_they_fill_the_memory() -> None:
    strip = Image.new("RGB", (200_000, 1))
    with pytest.raises(InvalidInput, match="too narrow to resize to 224 x 44800000"):
        preprocessor((224, 224))(strip)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 16, 17), r"float32 must be \[3, 16, 16\] and normalised, got"),
        (torch.zeros(16, 16, 3), "float32 must be"),
        (np.zeros((3, 16, 16)), "expected uint8 pixels or normalised float32, got torch.float64"),
        (torch.zeros(3, 16, 16, dtype=torch.int64), "got torch.int64"),
        (torch.zeros(3, 16, 16, dtype=torch.bfloat16), "got torch.bfloat16"),
        (torch.zeros(16, 16, 3, dtype=torch.uint8), r"tensor must be uint8 \[3, H, W\], got"),
        (np.zeros((3, 16, 16), np.uint8), r"array must be uint8 \[H, W, 3\], got"),
        (np.zeros((16, 16, 4), np.uint8), r"array must be uint8 \[H, W, 3\], got"),
        (np.zeros((0, 16, 3), np.uint8), r"got \[0, 16, 3\]"),
        (np.zeros((1, 16, 16, 3), np.uint8), r"got \[1, 16, 16, 3\]"),
        (np.zeros(3, np.uint8), r"got \[3\]"),
        (None, "expected a path, a Pillow image or an array, got NoneType"),
        ([1, 2], "got list"),
        (b"\x89PNG", "got bytes"),
    ],
)
def test_what_is_no_image(image: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        preprocessor()(image)


def test_pictures_for_models_of_other_channels() -> None:
    prepare = Preprocessor(Preprocess((0.5,) * 4, (0.5,) * 4), (16, 16))
    with pytest.raises(InvalidInput, match="takes 4 channels: give normalised float32"):
        prepare(Image.new("RGB", (16, 16)))
    assert prepare(torch.zeros(4, 16, 16)).shape == (4, 16, 16)


class OnDevice:
    """An array in the memory of a GPU, for a torch that has none."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("not here")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use that device")
def test_arrays_of_devices_that_torch_cannot_use() -> None:
    with pytest.raises(InvalidInput, match="copy it to the host"):
        preprocessor()(OnDevice())


def test_one_image_or_many() -> None:
    path, picture, array = Path("a.png"), Image.new("RGB", (4, 4)), pixels(4, 4)
    for one in ("a.png", path, picture, array, array[..., 0], torch.zeros(3, 4, 4)):
        (found,) = as_images(one)
        assert found is one
    for many in ([path, picture], torch.zeros(2, 3, 4, 4), np.zeros((2, 4, 4, 3), np.uint8)):
        assert len(list(as_images(many))) == 2
    with pytest.raises(InvalidInput, match="expected images, got NoneType"):
        as_images(None)  # type: ignore[arg-type]


def test_without_pillow() -> None:
    """Pixels of the right size need no package, files say which one they need."""
    code = """
import sys
sys.modules["PIL"] = None
import torch
from pyruntime.engine.images import Preprocessor
from pyruntime.errors import Unavailable
from pyruntime.format.spec import Preprocess
prepare = Preprocessor(Preprocess((0.5,) * 3, (0.5,) * 3), (4, 4))
prepare(torch.zeros(3, 4, 4)), prepare(torch.zeros(3, 4, 4, dtype=torch.uint8))
for image in ("a.png", torch.zeros(3, 5, 5, dtype=torch.uint8)):
    try:
        prepare(image)
    except Unavailable as error:
        print(error)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=environment, check=True)  # fmt: skip
    assert done.stdout.count("pip install 'pyruntime[vision]'") == 2
