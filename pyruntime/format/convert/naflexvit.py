"""timm's NaFlexVit: images of any size and aspect ratio, their positions from one learned grid.

timm pads a batch of such images to its longest (a `patch_valid` mask); here rows are packed. Of its
kinds of positions this is the learned grid resized to the rows and columns of every image; pooling
is the mean over patches or the class token.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pyruntime.errors import ConversionError, UnsupportedModel
from pyruntime.format.convert import timm_vit
from pyruntime.format.convert.checkpoint import Checkpoint
from pyruntime.format.convert.derive import Computed, Rows
from pyruntime.format.convert.preprocess import Given
from pyruntime.format.convert.timm_vit import Family
from pyruntime.format.convert.vision import Found, Names, read_backbone

MARK = "embeds.proj.weight"
_POSITIONS = "embeds.pos_embed"
_NAMES = Names(
    tokens=("embeds.cls_token", "embeds.dist_token", "embeds.reg_token"),
    positions=_POSITIONS,
    patch="embeds.proj",
)
_FAMILY = Family(
    starts=("naflexvit_",),
    unlike={
        "_par_": "resizing positions with their aspect ratio (pos_embed_ar_preserving)",
        "_parfac_": "factorized positions",
        "siglip": "siglip",
        "radio": "radio",
    },
    told=("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias",
          "qk_norm", "init_values", "class_token", "reg_tokens", "pre_norm", "fc_norm",
          "final_norm", "proj_bias", "num_classes", "in_chans", "global_pool", "dynamic_img_pad",
          "pos_embed_grid_size", "embed_proj_type", "use_key_only_attn_mask",
          "enable_patch_interpolator", "drop_rate", "pos_drop_rate", "patch_drop_rate",
          "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "weight_init", "fix_init"),
    only={
        "act_layer": (None, "gelu"), "norm_layer": (None,), "embed_norm_layer": (None,),
        "input_norm_layer": (None,), "pos_embed": ("learned",), "rope_type": ("", "none"),
        "pos_embed_interp_mode": ("bicubic",), "pos_embed_ar_preserving": (False,),
        "pos_embed_align_corners": (False,), "pos_embed_use_grid_sample": (False,),
        "pos_embed_antialias": (True, False), "patchify_channels_last": (True, False),
        "pool_include_prefix": (False,), "attn_type": ("standard",), "qkv_fused": (True,),
    },
)  # fmt: skip
_PARTS = {
    "embeds.pos_embed_y": "factorized positions",
    "embeds.norm.": "a norm of the embeddings",
    "embeds.norm_input.": "a norm of the pixels",
}


@dataclass(frozen=True, slots=True)
class Facts:
    """What no tensor tells.

    Attributes:
        pool: "class" or "mean"; None follows from the tensors.
        channels_last: the channels of a pixel lie together in a flattened patch.
        seen: height and width that the configuration names; images need not have them.
    """

    pool: str | None
    channels_last: bool
    seen: tuple[int, int] | None


def is_config(data: dict[str, Any]) -> bool:
    """Whether a config.json of timm's hub is of such a model."""
    return str(data.get("architecture", "")).startswith(_FAMILY.starts)


def read_config(data: dict[str, Any], path: Path) -> tuple[Given, Facts]:
    """A config.json of timm's hub.

    Raises:
        UnsupportedModel, ConversionError: everything that is wrong with it.
    """
    given, pool = timm_vit.read_config(data, path, _FAMILY)
    arguments = data.get("model_args") or {}
    rule = "bicubic_aa" if arguments.get("pos_embed_antialias", True) else "bicubic"
    facts = Facts(pool, arguments.get("patchify_channels_last", True), given.image_size)
    return dataclasses.replace(given, image_size=None, position_resize=rule), facts


def read(weights: Checkpoint, given: Given, facts: Facts | None = None) -> tuple[Checkpoint, Found]:
    """A model under timm's names, and the view of its tensors that they need.

    The model's own size is that of the learned grid, from which timm resizes to every other: so do
    we, unless `given` has another size, whose table then stands for the learned one.

    Args:
        facts: None: a bare checkpoint, of timm's defaults.

    Raises:
        UnsupportedModel: a part that the runtime does not implement.
        ConversionError: see `read_backbone`.
    """
    unlike = _FAMILY.problems(given.architecture or "")
    if unlike:
        raise UnsupportedModel("\n".join(f"{given.where}: {text}" for text in unlike))
    timm_vit.refuse_parts(weights, _PARTS.items())
    grid = _grid(weights)
    channels = len(given.preprocess.mean)
    weights = _viewed(weights, channels, facts is None or facts.channels_last)
    patch = _side(weights, channels)
    size = grid[0] * patch, grid[1] * patch
    found = read_backbone(
        weights, _NAMES, dataclasses.replace(given, image_size=size), "timm_naflexvit",
        norm_eps=1e-6, pool=None if facts is None else facts.pool,
    )  # fmt: skip
    found.fields["image_size"] = given.image_size or size
    if facts is None:
        found.notes.append(
            "timm's defaults, which no tensor tells: patches are flattened channel last, positions "
            "resized to the rows and columns of an image, none are rotary"
        )
    elif facts.seen not in (None, size):
        height, width = facts.seen or size
        patches = height // patch * (width // patch)
        found.notes.append(
            f"its own size is {size[0]} x {size[1]}, of the learned positions, but images may have "
            f"any; the configuration's {height} x {width} are {patches} patches"
        )
    return weights, found


def _grid(weights: Checkpoint) -> tuple[int, int]:
    """Rows and columns of the learned positions."""
    entry = weights.entries.get(_POSITIONS)
    shape = () if entry is None else entry.shape
    if len(shape) != 4 or shape[0] != 1 or 0 in shape:
        found = "is missing" if entry is None else f"is {list(shape)}"
        raise ConversionError(
            f"{weights.paths[0]}: {_POSITIONS} {found}, expected a learned grid of positions "
            "[1, rows, columns, width]"
        )
    return shape[1], shape[2]


def _side(weights: Checkpoint, channels: int) -> int:
    """Of a patch, in pixels; 1 where the kernel, as `read_backbone` will say, is none."""
    shape = weights.entries[MARK].shape if MARK in weights.entries else ()
    if len(shape) == 4:
        return max(1, shape[-1])
    return max(1, math.isqrt(shape[1] // channels)) if len(shape) == 2 else 1


def _viewed(weights: Checkpoint, channels: int, channels_last: bool) -> Checkpoint:
    """Positions in one raster, and the rows of the projection as those of a convolution."""
    entries = dict(weights.entries)
    one, rows, columns, width = entries[_POSITIONS].shape
    entries[_POSITIONS] = dataclasses.replace(
        entries[_POSITIONS], shape=(one, rows * columns, width)
    )
    entry = entries.get(MARK)
    if channels_last and entry is not None and len(entry.shape) == 2:
        entries[MARK] = dataclasses.replace(
            entry, file=Computed(_channels_first(weights, channels))
        )
    return Checkpoint(entries, weights.paths, weights.problems)


def _channels_first(weights: Checkpoint, channels: int) -> Rows:
    """Rows [channels * pixels] of a matrix [D, pixels * channels]."""

    def read(start: int, stop: int) -> Tensor:
        rows = weights.rows(MARK, start, stop)
        return rows.view(stop - start, -1, channels).transpose(1, 2).flatten(1)

    return read
