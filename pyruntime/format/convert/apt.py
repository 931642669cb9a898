"""Adaptive Patch Transformers (APT, arXiv 2510.18091) as their released code saves them.

A timm ViT with two more layers: a convolution that joins 2 x 2 embeddings into one, and the
zero-initialised linear layer through which that reaches the embedding of a coarser patch. Sizes and
thresholds are in the training's configuration, which no checkpoint holds.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pyruntime.errors import UnsupportedModel
from pyruntime.format.convert import timm_vit
from pyruntime.format.convert.assemble import Assembly
from pyruntime.format.convert.checkpoint import Checkpoint, Need
from pyruntime.format.convert.kernels import child_rows
from pyruntime.format.convert.preprocess import Given
from pyruntime.format.convert.scales import scale_spec
from pyruntime.format.convert.vision import Found
from pyruntime.format.spec import VisionSpec

_MIXED = "mixed_patch."
MARK = f"{_MIXED}patch_attn.weight"
# Their module of mixed patches has the model's own parameters under a second name. Of the table of
# positions inside a patch nothing is read.
COPIES = {
    f"{_MIXED}patch_embed.proj.weight": "patch_embed.proj.weight",
    f"{_MIXED}patch_embed.proj.bias": "patch_embed.proj.bias",
    f"{_MIXED}base_pos_embed": "pos_embed",
}
_UNUSED = f"{_MIXED}base_mini_pos_embed"


def renamed(weights: Checkpoint) -> Checkpoint:
    """The class token, which moves into that module when training begins, under timm's name."""
    return weights.renamed(lambda name: "cls_token" if name == f"{_MIXED}cls_token" else name)


def read(weights: Checkpoint, given: Given, scales: dict[str, Any] | None) -> Found:
    """A model whose sizes and thresholds `scales` tells.

    Raises:
        UnsupportedModel: what the released code itself would not run.
        ConversionError: no `scales`, or see `read_backbone`.
    """
    where = weights.paths[0]
    if scales is None:
        raise UnsupportedModel(
            f"{where}: an APT checkpoint does not hold its sizes and thresholds: scales are needed "
            "(such as ratio=2,thresholds=5.5)"
        )
    found = timm_vit.read(weights, given)
    if found.covered != 1 or found.fields["prefix_tokens"] != 1:
        raise UnsupportedModel(
            f"{where}: APT with {found.fields['prefix_tokens']} prefix tokens, {found.covered} of "
            "them with a position, is not implemented (one with one is: the class token)"
        )
    found.names = dataclasses.replace(found.names, drop=(*found.names.drop, _UNUSED))
    found.fields["source_family"] = "apt"
    if given.norm_eps is None:
        found.fields["norm_eps"] = 1e-6  # of their CLIP models as well, unlike in timm
    found.fields["scales"] = scale_spec(
        scales, "conv", resize="bilinear", positions="bicubic_aa", source="entropy"
    )
    return found


def add_scales(made: Assembly, spec: VisionSpec) -> None:
    """The convolution and the linear layer."""
    d, name = spec.hidden_size, MARK
    read = child_rows(made.weights, name, d)
    made.computed("conv.weight", (d, 4 * d), {name: Need((d, d, 2, 2))}, read)
    made.tensor("conv.bias", f"{_MIXED}patch_attn.bias")
    made.module("zero", f"{_MIXED}zero_conv")
