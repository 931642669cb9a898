"""Where `pyruntime classify --regions` writes, and what."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pyruntime.cli.words import caption
from pyruntime.engine.classification import Classification
from pyruntime.engine.classifier import Classifier
from pyruntime.engine.drawing import draw_regions
from pyruntime.engine.pillow import write_png
from pyruntime.errors import InvalidInput


class RegionFiles:
    """Names a file for every image, and draws it.

    Raises:
        InvalidInput: one file for several images, or one that would overwrite an image.
    """

    def __init__(self, target: Path, images: Iterable[Path]) -> None:
        self._target = target
        self._images = list(images)
        self._is_file = target.suffix.lower() == ".png"
        if self._is_file and len(self._images) > 1:
            raise InvalidInput(
                f"--regions {target}: one file cannot show {len(self._images)} images: "
                "name a folder"
            )
        self._paths = [target] if self._is_file else self._inside()
        for path in self._paths:
            if any(path.exists() and image.exists() and path.samefile(image)
                   for image in self._images):  # fmt: skip
                raise InvalidInput(f"--regions {path}: is one of the images")

    def draw(self, number: int, classifier: Classifier, result: Classification) -> Path:
        """The file of one image.

        Raises:
            InvalidInput: the model has one scale.
        """
        ratios, path = result.ratios, self._paths[number]
        if ratios is None:
            raise InvalidInput("--regions: this model has one scale only")
        image = classifier.preprocess(self._images[number])
        spec = classifier.runtime.spec.preprocess
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {
            "image": str(self._images[number]),
            "class": str(result.label if result.name is None else result.name),
            "probability": f"{result.probability:.6f}",
            "tokens": str(result.tokens),
            "tokens_dense": str(result.tokens_dense),
            "macs": str(result.macs),
            "macs_dense": str(result.macs_dense),
        }
        pixels = draw_regions(image, spec, result.grid, ratios)
        write_png(path, pixels, caption(result), facts)
        return path

    def _inside(self) -> list[Path]:
        """`name_regions.png` in the folder; of equal names the later ones get a number."""
        taken: set[str] = set()
        found = []
        for image in self._images:
            name, count = f"{image.stem}_regions", 1
            while name in taken:
                count += 1
                name = f"{image.stem}_regions_{count}"
            taken.add(name)
            found.append(self._target / f"{name}.png")
        return found
