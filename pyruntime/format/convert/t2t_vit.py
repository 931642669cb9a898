"""T2T-ViT with performer tokens (arXiv 2101.11986), the backbone of JEI-DNN's checkpoints too."""

from __future__ import annotations

from pyruntime.errors import UnsupportedModel
from pyruntime.format.convert.assemble import Assembly
from pyruntime.format.convert.checkpoint import Checkpoint
from pyruntime.format.convert.preprocess import Given
from pyruntime.format.convert.vision import Found, Names, read_backbone
from pyruntime.format.spec.vision_tensors import T2T_LAYERS, T2T_PATCH

MARK = "tokens_to_token."
_NAMES = Names(tokens=("cls_token",), patch="tokens_to_token.project")


def read(weights: Checkpoint, given: Given) -> Found:
    """A T2T-ViT under the names of its official code.

    Raises:
        UnsupportedModel: transformer tokens.
        ConversionError: see `read_backbone`.
    """
    if not any(name.startswith(MARK) and ".kqv." in name for name in weights.entries):
        raise UnsupportedModel(
            f"{weights.paths[0]}: T2T-ViT with transformer tokens (T2T-ViT_t) is not implemented; "
            "performer tokens (tokens_to_token.attention1.kqv) are"
        )
    found = read_backbone(
        weights, _NAMES, given, "t2t_vit", norm_eps=1e-5, pool="class", stem="t2t",
        patch_size=T2T_PATCH, position_resize="bicubic",
    )  # fmt: skip
    if given.num_heads is None:
        found.notes[:] = []  # they are 64 wide in every T2T-ViT
    return found


def add_stem(made: Assembly) -> None:
    """The tensors of the tokens-to-token stem; its mlp is called by what its layers do here."""
    for i in range(len(T2T_LAYERS)):
        ours, theirs = f"stem.layers.{i}", f"{MARK}attention{i + 1}"
        for part in ("norm1", "kqv", "proj", "norm2"):
            made.module(f"{ours}.{part}", f"{theirs}.{part}")
        made.tensor(f"{ours}.features", f"{theirs}.w")
        made.module(f"{ours}.up", f"{theirs}.mlp.0")
        made.module(f"{ours}.down", f"{theirs}.mlp.2")
    made.module("stem.project", f"{MARK}project")
