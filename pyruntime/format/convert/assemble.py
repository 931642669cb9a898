"""Where every tensor of a vision transformer comes from, once its shape is known."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from pyruntime.format.convert.checkpoint import Checkpoint, Need
from pyruntime.format.convert.derive import Derivation, Rows
from pyruntime.format.convert.kernels import patch_rows
from pyruntime.format.convert.vision import Found
from pyruntime.format.spec import VisionSpec
from pyruntime.format.spec.positions import resize_positions


class Assembly:
    """Collects, for each of our tensors, the names of those whose rows it joins.

    `computed` tensors bear our name in the checkpoint that `result` returns.
    """

    def __init__(self, weights: Checkpoint) -> None:
        self.weights = weights
        self.tensors: dict[str, tuple[str, ...]] = {}
        self._made = Derivation(weights)

    def tensor(self, ours: str, *theirs: str) -> None:
        """One tensor, as it is stored."""
        self.tensors[ours] = theirs

    def module(self, ours: str, *theirs: str, bias: bool = True) -> None:
        """A weight, and its bias."""
        for suffix in ("weight", "bias") if bias else ("weight",):
            self.tensor(f"{ours}.{suffix}", *(f"{name}.{suffix}" for name in theirs))

    def computed(
        self,
        ours: str,
        shape: tuple[int, ...],
        needs: Mapping[str, Need],
        read: Rows,
        dtype: str | None = None,
    ) -> None:
        """A tensor of `shape` whose rows `read` computes; see `Derivation.add`."""
        self._made.add(ours, shape, needs, read, dtype)
        self.tensor(ours, ours)

    def patches(
        self, ours: str, theirs: str, shape: tuple[int, int], side: int, to_side: int, bias: bool
    ) -> None:
        """A projection of patches: `theirs` is a kernel [D, C, side, side], with (D, C) `shape`.

        The matrix is for patches of `to_side` pixels.
        """
        rows, channels = shape
        name = f"{theirs}.weight"
        kernel: tuple[int, ...] = (rows, channels, side, side)
        if len(self.weights.entries[name].shape) == 2:
            kernel = (rows, channels * side * side)
        read = patch_rows(self.weights, name, channels, side, to_side)
        self.computed(f"{ours}.weight", (rows, channels * to_side**2), {name: Need(kernel)}, read)
        if bias:
            self.tensor(f"{ours}.bias", f"{theirs}.bias")

    def positions(
        self,
        ours: str,
        theirs: str,
        grids: tuple[tuple[int, int], tuple[int, int]],
        width: int,
        spec: VisionSpec,
        covered: int = 0,
    ) -> None:
        """A table learned for the first of `grids`, brought to the second; float32.

        The first `covered` rows of `theirs` are not of it.
        """
        weights, ((rows, columns), to_grid) = self.weights, grids
        count = rows * columns

        @functools.cache
        def table() -> Tensor:
            found = weights.rows(theirs, covered, covered + count).float()
            return resize_positions(found, grids[0], to_grid, spec.position_resize)

        def read(start: int, stop: int) -> Tensor:
            if to_grid == grids[0]:
                return weights.rows(theirs, covered + start, covered + stop)
            return table()[start:stop]

        needs = {theirs: Need((1, covered + count, width))}
        self.computed(ours, (to_grid[0] * to_grid[1], width), needs, read)

    def drop(self, prefix: str) -> None:
        """Leave out the tensors whose names start so."""
        self._made.drop(prefix)

    def result(self) -> Checkpoint:
        """The checkpoint with everything that is computed."""
        return self._made.result()


def add_backbone(made: Assembly, spec: VisionSpec, found: Found) -> None:
    """Stem, prefix, positions, layers without adaptive width, final norm and heads."""
    names = found.names
    for prefix in names.drop:
        made.drop(prefix)
    if spec.stem == "patch":
        shape = spec.hidden_size, len(spec.preprocess.mean)
        made.patches("stem", names.patch, shape, found.patch, spec.patch_size, spec.patch_bias)
    _add_rows(made, spec, found)
    if spec.pre_norm:
        made.module("pre_norm", names.pre_norm)
    # A layer scale in one layer is one in all: without it, that layer's is missing.
    scaled = {
        scale
        for scale in names.scales
        for i in range(spec.num_layers)
        if scale.replace("{i}", str(i)) in made.weights.entries
    }
    for i in range(spec.num_layers):
        _add_layer(made, spec, found, scaled, i)
    last = names.fc_norm if f"{names.fc_norm}.weight" in made.weights.entries else names.norm
    made.module("norm", last)
    made.module("head", names.head)
    if spec.pool == "distilled":
        made.module("head_dist", names.head_dist)


def _add_rows(made: Assembly, spec: VisionSpec, found: Found) -> None:
    """Prefix rows with their positions added, and the positions of the patches."""
    weights, d, covered = made.weights, spec.hidden_size, found.covered
    tokens = [name for name in found.names.tokens if name in weights.entries]
    positions, (rows, columns) = found.names.positions, found.grid
    whole = {positions: Need((1, covered + rows * columns, d))}

    def read_prefix(start: int, stop: int) -> Tensor:
        parts = [weights.rows(name, 0, weights.entries[name].shape[1]) for name in tokens]
        prefix = torch.cat(parts).float()
        if covered:
            prefix[:covered] += weights.rows(positions, 0, covered).float()
        return prefix[start:stop]

    if tokens:
        needs = {name: Need((1, weights.entries[name].shape[-2], d)) for name in tokens}
        made.computed("prefix", (spec.prefix_tokens, d), {**needs, **whole}, read_prefix)
    made.positions("positions", positions, (found.grid, spec.grid), d, spec, covered)


def _add_layer(made: Assembly, spec: VisionSpec, found: Found, scaled: set[str], i: int) -> None:
    names, width, d = found.names, spec.width, spec.hidden_size
    attn, mlp = f"layers.{i}.attn", f"layers.{i}.mlp"

    def theirs(name: str) -> str:
        return name.replace("{i}", str(i))

    def scaled_module(ours: str, name: str, scale: str, columns: int) -> None:
        if scale in scaled:
            _add_scaled(made, ours, theirs(name), theirs(scale), (d, columns))
        else:
            made.module(ours, theirs(name))

    made.module(f"{attn}.norm", theirs(names.attn_norm))
    if width is None or not width.attention_bottleneck:
        made.module(f"{attn}.qkv", *map(theirs, names.qkv), bias=spec.qkv_bias)
        scaled_module(f"{attn}.o", names.o, names.scales[0], d)
    if spec.qk_norm:
        made.module(f"{attn}.q_norm", theirs(names.q_norm))
        made.module(f"{attn}.k_norm", theirs(names.k_norm))
    made.module(f"{mlp}.norm", theirs(names.mlp_norm))
    if width is None or not width.mlp_bottleneck:
        made.module(f"{mlp}.up", theirs(names.up))
        scaled_module(f"{mlp}.down", names.down, names.scales[1], spec.mlp_size)


def _add_scaled(made: Assembly, ours: str, theirs: str, scale: str, shape: tuple[int, int]) -> None:
    """The module `theirs`, its outputs times the layer scale."""
    weights, (rows, _) = made.weights, shape

    def scaled(name: str) -> Rows:
        def read(start: int, stop: int) -> Tensor:
            factor = weights.rows(scale, start, stop).float()
            values = weights.rows(name, start, stop).float()
            return values * (factor[:, None] if values.dim() == 2 else factor)

        return read

    for suffix, whole in (("weight", shape), ("bias", (rows,))):
        name = f"{theirs}.{suffix}"
        needs = {name: Need(whole), scale: Need((rows,))}
        made.computed(f"{ours}.{suffix}", whole, needs, scaled(name))
