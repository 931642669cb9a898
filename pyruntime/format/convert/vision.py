"""A vision transformer in a checkpoint: what its tensors say about its shape.

Checkpoints of vision transformers hardly describe themselves, but their tensors do: every family
names them differently, and has the same ones.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyruntime.errors import ConversionError, UnsupportedModel
from pyruntime.format.convert.checkpoint import Checkpoint
from pyruntime.format.convert.preprocess import Given

# Widths and heads of what timm calls by these names, where heads are not 64 wide as well.
_NAMED_HEADS = {
    "tiny": (192, 3), "small": (384, 6), "base": (768, 12), "large": (1024, 16),
    "huge": (1280, 16), "giant": (1408, 16), "gigantic": (1664, 16),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Names:
    """What a family calls the modules of a vision transformer; {i} is the layer.

    Attributes:
        tokens: the tensors of the prefix rows, in their order; those that exist count.
        positions, scales: tensors; the others are modules with weight and bias.
        qkv: one module, or the three whose rows it joins.
        scales: layer scale of the attention and of the feed-forward part.
        fc_norm: the final norm where it follows the pooling.
        drop: prefixes of tensors that inference does not use.
    """

    tokens: tuple[str, ...] = ("cls_token", "dist_token", "reg_token")
    positions: str = "pos_embed"
    patch: str = "patch_embed.proj"
    pre_norm: str = "norm_pre"
    attn_norm: str = "blocks.{i}.norm1"
    qkv: tuple[str, ...] = ("blocks.{i}.attn.qkv",)
    q_norm: str = "blocks.{i}.attn.q_norm"
    k_norm: str = "blocks.{i}.attn.k_norm"
    o: str = "blocks.{i}.attn.proj"
    mlp_norm: str = "blocks.{i}.norm2"
    up: str = "blocks.{i}.mlp.fc1"
    down: str = "blocks.{i}.mlp.fc2"
    scales: tuple[str, str] = ("blocks.{i}.ls1.gamma", "blocks.{i}.ls2.gamma")
    norm: str = "norm"
    fc_norm: str = "fc_norm"
    head: str = "head"
    head_dist: str = "head_dist"
    drop: tuple[str, ...] = ("mask_token", "pre_logits.")


@dataclass(slots=True)
class Found:
    """A backbone as its tensors describe it.

    Attributes:
        fields: those of VisionSpec, without exits, width and dtype.
        covered: prefix rows, counted from the first, that `positions` has rows for.
        grid: rows and columns of patches that `positions` were learned for.
        patch: side of the patches that the kernel was learned for.
        notes: what was concluded from little.
    """

    names: Names
    fields: dict[str, Any]
    covered: int
    grid: tuple[int, int]
    patch: int
    notes: list[str] = field(default_factory=list)


def read_backbone(
    weights: Checkpoint,
    names: Names,
    given: Given,
    source_family: str,
    *,
    norm_eps: float,
    pool: str | None = None,
    stem: str = "patch",
    patch_size: int | None = None,
    mlp_size: int | None = None,
    position_resize: str = "bicubic_aa",
) -> Found:
    """The fields of VisionSpec that the shapes of `weights` tell.

    `patch_size` and `mlp_size` are read from the tensors unless they are given, `pool` follows from
    what there is. `position_resize` is the family's rule, unless `given` has another.

    Raises:
        ConversionError: what is missing or contradicts `given`, one line each.
    """
    found = _Reader(weights, names, given).read(
        source_family, norm_eps, pool, stem, patch_size, mlp_size
    )
    found.fields["position_resize"] = given.position_resize or position_resize
    return found


def heads_of(given: Given, hidden: int) -> tuple[int, str]:
    """The number of heads, which no tensor tells, and how it was found.

    Raises:
        UnsupportedModel: nothing tells it.
    """
    if given.num_heads is not None:
        return given.num_heads, f"num_heads of {given.where}"
    words = re.split(r"[_\d]", given.architecture or "")
    for word, (width, heads) in _NAMED_HEADS.items():
        if word in words and width == hidden:
            return heads, f"of a model called {given.architecture}"
    if hidden % 64 == 0:
        return hidden // 64, "64 channels each, which nothing says"
    raise UnsupportedModel(f"{given.where}: num_heads is needed: {hidden} channels do not tell it")


class _Reader:
    def __init__(self, weights: Checkpoint, names: Names, given: Given) -> None:
        self._entries = weights.entries
        self._where = weights.paths[0] if weights.paths else Path()
        self._names = names
        self._given = given
        self._problems: list[str] = []

    def read(
        self,
        source_family: str,
        norm_eps: float,
        pool: str | None,
        stem: str,
        patch_size: int | None,
        mlp_size: int | None,
    ) -> Found:
        names, given, entries = self._names, self._given, self._entries
        positions = self._shape(names.positions, 3)
        first = names.up.replace("{i}", "0")
        up = self._shape(f"{first}.weight", 2) if mlp_size is None else (mlp_size,)
        head = self._head()
        channels, patch = len(given.preprocess.mean), patch_size
        if patch is None:
            patch = self._patch(channels)
        prefix = sum(self._shape(name, 3)[1] for name in names.tokens if name in entries)
        self._raise()
        hidden = positions[-1]
        grid, covered = self._grid(positions[1], prefix, patch)
        heads, how = heads_of(given, hidden)
        if pool is None:
            pool = self._pool()
        after = f"{names.fc_norm}.weight" in entries
        self._raise()
        fields: dict[str, Any] = {
            "source_family": source_family, "stem": stem,
            "image_size": given.image_size or (grid[0] * patch, grid[1] * patch),
            "patch_size": patch, "hidden_size": hidden, "num_layers": self._layers(),
            "num_heads": heads, "mlp_size": up[0], "num_classes": head[0],
            "norm_eps": norm_eps if given.norm_eps is None else given.norm_eps,
            "prefix_tokens": prefix, "preprocess": given.preprocess, "pool": pool,
            "norm_after_pool": after and pool == "mean",
            "pre_norm": f"{names.pre_norm}.weight" in entries,
            "patch_bias": f"{names.patch}.bias" in entries,
            "qkv_bias": f"{names.qkv[0].replace('{i}', '0')}.bias" in entries,
            "qk_norm": f"{names.q_norm.replace('{i}', '0')}.weight" in entries,
            "labels": given.labels,
        }  # fmt: skip
        if stem == "t2t":
            fields["patch_bias"] = True
        return Found(names, fields, covered, grid, patch, [f"{heads} heads: {how}"])

    def _layers(self) -> int:
        """How many layers have tensors; a gap between them shows as what is missing and unused."""
        start = re.escape(self._names.attn_norm.split("{i}")[0])
        found = (re.match(rf"{start}(\d+)\.", name) for name in self._entries)
        return max(1, len({match[1] for match in found if match}))

    def _pool(self) -> str:
        names, entries = self._names, self._entries
        if f"{names.head_dist}.weight" in entries:
            return "distilled"
        mean = f"{names.fc_norm}.weight" in entries or names.tokens[0] not in entries
        return "mean" if mean else "class"

    def _head(self) -> tuple[int, ...]:
        name = f"{self._names.head}.weight"
        if name not in self._entries:
            self._problems.append(
                f"no {name}: a backbone without a classifier cannot say what an image shows"
            )
            return (1, 1)
        shape, count = self._shape(name, 2), self._given.num_classes
        if count not in (None, shape[0]):
            self._problems.append(
                f"{name} has {shape[0]} rows, {self._given.where} says num_classes {count}"
            )
        return shape

    def _patch(self, channels: int) -> int:
        """The side of a patch; very old checkpoints store its kernel as a matrix."""
        name = f"{self._names.patch}.weight"
        shape = self._entries[name].shape if name in self._entries else ()
        if len(shape) == 2:
            side = math.isqrt(shape[1] // channels)
            if side and side * side * channels == shape[1]:
                return side
        elif len(shape) == 4 and shape[2] == shape[3] and shape[1] == channels:
            return shape[2]
        found = f"is {list(shape)}" if shape else "is missing"
        self._problems.append(
            f"{name} {found}, expected [width, {channels}, p, p]: {channels} channels as in mean"
        )
        return 1

    def _grid(self, rows: int, prefix: int, patch: int) -> tuple[tuple[int, int], int]:
        """The grid of the positions, and how many of their `rows` belong to prefix rows.

        It is that of the image size where they fit, and else the one square grid that they may be:
        such positions are resized.
        """
        names, size = self._names, self._given.image_size
        single = sum(name in self._entries for name in names.tokens[:2])
        options = dict.fromkeys((prefix, min(single, prefix), 0))
        wanted = (0, 0) if size is None else (size[0] // patch, size[1] // patch)
        for covered in options if size is not None else ():
            if rows == wanted[0] * wanted[1] + covered:
                return wanted, covered
        squares = {covered: math.isqrt(rows - covered) for covered in options if rows > covered}
        fitting = {c: side for c, side in squares.items() if side * side == rows - c}
        if len(fitting) == 1:
            covered, side = fitting.popitem()
            return (side, side), covered
        if size is None:
            self._problems.append(
                f"{names.positions} has {rows} rows, which do not tell the grid of the patches: "
                f"image_size [height, width] is needed in {self._given.where}"
            )
        else:
            counts = sorted(wanted[0] * wanted[1] + covered for covered in options)
            self._problems.append(
                f"{names.positions} has {rows} rows, expected {' or '.join(map(str, counts))} for "
                f"{size[0]} x {size[1]} pixels in patches of {patch}; positions of another image "
                "size are resized where they are those of one square grid"
            )
        return (1, 1), 0

    def _shape(self, name: str, rank: int) -> tuple[int, ...]:
        entry = self._entries.get(name)
        if entry is None:
            self._problems.append(f"missing {name}")
        elif len(entry.shape) != rank or 0 in entry.shape:
            self._problems.append(f"misshapen {name} {list(entry.shape)}, expected {rank} axes")
        else:
            return entry.shape
        return (1,) * rank

    def _raise(self) -> None:
        if self._problems:
            raise ConversionError("\n".join(f"{self._where}: {text}" for text in self._problems))
