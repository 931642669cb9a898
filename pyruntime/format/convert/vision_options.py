"""What the caller of a conversion says about a vision transformer, and changes of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyruntime.errors import ConversionError
from pyruntime.format.convert import apt, exits, msvit, reduction
from pyruntime.format.convert.checkpoint import Checkpoint
from pyruntime.format.convert.preprocess import Given
from pyruntime.format.convert.scales import scale_spec
from pyruntime.format.convert.torchvision_acm import Rule
from pyruntime.format.convert.vision import Found


@dataclass(frozen=True, slots=True)
class VisionOptions:
    """What only the caller can say.

    Attributes:
        heads: a folder of warm-up heads.
        image_size: height and width that images are brought to; positions are resized.
        patch_size: of the finest patches; their kernel is resized.
        scales: fields of ScaleSpec.
    """

    preprocess: Path | None = None
    heads: Path | None = None
    exit: exits.Rule | None = None
    width_rule: Rule | None = None
    image_size: tuple[int, int] | None = None
    patch_size: int | None = None
    scales: dict[str, Any] | None = None
    reduce: reduction.Reduction | None = None

    @property
    def named(self) -> list[str]:
        """The options that were given."""
        names = (field.name for field in dataclasses.fields(self))
        return [name for name in names if getattr(self, name) is not None]


def adapt(
    weights: Checkpoint, found: Found, options: VisionOptions, given: Given | None
) -> list[str]:
    """Change the fields of `found` to what the caller asks for; returns notes.

    Raises:
        ConversionError: what this checkpoint cannot be changed into.
    """
    fields, notes, where = found.fields, list[str](), weights.paths[0]
    mixed = "scales" in fields
    if given is not None and given.mixed and not msvit.is_mixed(weights):
        keys = ", ".join(given.mixed)
        raise ConversionError(f"{given.where}: {keys} are of MSViT checkpoints, which this is not")
    if options.scales is not None and apt.MARK not in weights.entries:
        if mixed:
            raise ConversionError(f"{where}: scales given, but the checkpoint has its own")
        fields["scales"] = scale_spec(options.scales, "shared", source="all_fine")
    if options.reduce is not None:
        fields["reduction"] = options.reduce.spec(fields["num_layers"])
        if options.reduce.method == "evit" and (given is None or given.position_resize is None):
            fields["position_resize"] = "bicubic"  # as its released code does
    reduction.check_predictors(weights, fields.get("reduction"))
    if options.patch_size not in (None, found.patch):
        if mixed or fields["stem"] != "patch":
            raise ConversionError(
                f"{where}: patch_size {options.patch_size} given, but its patches have "
                f"{found.patch} pixels, and only the kernel of a plain ViT can be resized"
            )
        fields["patch_size"] = options.patch_size
        notes.append(
            f"the patches' kernel is resized from {found.patch} to {options.patch_size} pixels "
            "(pseudo-inverse of a bicubic resize, as for FlexiViT)"
        )
    if options.image_size is not None:
        fields["image_size"] = options.image_size
    height, width = fields["image_size"]
    grid = height // fields["patch_size"], width // fields["patch_size"]
    if grid != found.grid:
        aliased = "without" if fields["position_resize"] == "bicubic" else "with"
        notes.append(
            f"positions are resized from {found.grid[0]} x {found.grid[1]} to {grid[0]} x "
            f"{grid[1]} patches (bicubic {aliased} antialias)"
        )
    return notes
