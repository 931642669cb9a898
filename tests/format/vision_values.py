"""What the tensors of a converted vision model must be, put together from timm's names.

Checkpoints of other families are renamed to timm's first, by tables that are not the converter's.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from pyruntime.format.load import Container, read
from pyruntime.format.spec import VisionSpec, vision_tensors
from pyruntime.ops.weight import Weight
from tests.checkpoints import State

_TOKENS = ("cls_token", "dist_token", "reg_token")
_PARTS = {
    "attn.norm": "norm1", "attn.qkv": "attn.qkv", "attn.o": "attn.proj", "mlp.norm": "norm2",
    "attn.q_norm": "attn.q_norm", "attn.k_norm": "attn.k_norm", "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}  # fmt: skip
_STEM = {"kqv": "kqv", "proj": "proj", "norm1": "norm1", "norm2": "norm2", "up": "mlp.0",
         "down": "mlp.2"}  # fmt: skip


def values(tensor: Tensor | Weight) -> Tensor:
    """Logical numbers of a stored tensor; a matrix of one segment is two-dimensional."""
    if not isinstance(tensor, Weight):
        return tensor
    dense = tensor.dense()
    return dense[0] if len(dense) == 1 else dense


def check(folder: Path, state: State, rtol: float = 0.0) -> Container:
    """Every tensor of the folder against those of a timm state."""
    container = read(folder)
    spec = container.spec
    assert isinstance(spec, VisionSpec)
    for tensor in vision_tensors(spec):
        found = values(container.tensors[tensor.name])
        wanted = expected(state, spec, tensor.name)
        assert found.shape == tensor.shape == wanted.shape, tensor.name
        assert found.dtype == getattr(torch, tensor.dtype), tensor.name
        wanted = wanted.to(found.dtype)
        assert torch.allclose(found, wanted, rtol=rtol, atol=0.0), tensor.name
    return container


def expected(state: State, spec: VisionSpec, name: str) -> Tensor:
    """The tensor of our `name`."""
    module, _, suffix = name.rpartition(".")
    prefix, positions = prefix_and_positions(state, spec)
    if name == "prefix":
        return prefix
    if name == "positions":
        return positions
    if module == "stem":
        stem = state[f"patch_embed.proj.{suffix}"]
        return stem.flatten(1) if suffix == "weight" else stem
    if match := re.fullmatch(r"stem\.layers\.(\d)\.(.*)", name):
        layer = f"tokens_to_token.attention{int(match[1]) + 1}"
        part, _, kind = match[2].rpartition(".")
        return state[f"{layer}.{_STEM[part]}.{kind}" if part else f"{layer}.w"]
    if module == "stem.project":
        return state[f"tokens_to_token.project.{suffix}"]
    if match := re.fullmatch(r"exits\.(\d+)\.(head|gate)\.(weight|bias)", name):
        block = spec.exits[int(match[1])].after_block
        if match[2] == "head":
            return state[f"intermediate_heads.{block}.{suffix}"]
        return state[f"gates.{block}.linear.{suffix}"].flatten()
    if (scaled := _scales(state, spec, name)) is not None:
        return scaled
    if match := re.fullmatch(r"layers\.(\d+)\.(.*)\.(weight|bias)", name):
        block = f"blocks.{match[1]}"
        found = state[f"{block}.{_PARTS[match[2]]}.{suffix}"].float()
        scale = {"attn.o": "ls1.gamma", "mlp.down": "ls2.gamma"}.get(match[2], "-")
        if (gamma := state.get(f"{block}.{scale}")) is not None:
            found = torch.diag(gamma.float()) @ found
        return found
    if module == "norm" and "fc_norm.weight" in state:
        return state[f"fc_norm.{suffix}"]
    return state[{"pre_norm": "norm_pre"}.get(module, module) + f".{suffix}"]


def _scales(state: State, spec: VisionSpec, name: str) -> Tensor | None:
    """Of mixed scales and of token reduction; None: the tensor is of neither."""
    module, _, suffix = name.rpartition(".")
    if name == "gate.positions":
        return state["msvit.gate.pos_embed"][0]
    if module.startswith("gate."):
        return state[f"msvit.{name}"]
    if module == "coarse.0":
        found = state[f"msvit.coarse_embed.proj.{suffix}"]
        return found.flatten(1) if suffix == "weight" else found
    if name == "conv.weight":
        return torch.cat([*state["mixed_patch.patch_attn.weight"].flatten(2).unbind(2)], 1)
    if module in ("conv", "zero"):
        layer = {"conv": "patch_attn", "zero": "zero_conv"}[module]
        return state[f"mixed_patch.{layer}.{suffix}"]
    if match := re.fullmatch(r"reduce\.(\d)\.(in\.norm|in|out\.(\d))", module):
        part = {"in.norm": "in_conv.0", "in": "in_conv.1"}.get(match[2])
        part = part or f"out_conv.{2 * int(match[3])}"
        return state[f"score_predictor.{match[1]}.{part}.{suffix}"]
    return None


def prefix_and_positions(state: State, spec: VisionSpec) -> tuple[Tensor, Tensor]:
    tokens = [state[name][0] for name in _TOKENS if name in state]
    prefix = torch.cat(tokens).float() if tokens else torch.empty(0)
    rows = state["pos_embed"][0].float()
    grid = spec.tokens - spec.prefix_tokens
    covered = len(rows) - grid
    if covered:
        prefix[:covered] += rows[:covered]
    return prefix, rows[covered:]


_HF = (
    (r"^(vit|deit|dinov2|dinov2_with_registers)\.", ""),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"^layers\.(\d+)\.", r"blocks.\1."),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.distillation_token", "dist_token"),
    (r"embeddings\.register_tokens", "reg_token"),
    (r"embeddings\.(cls|mask)_token", r"\1_token"),
    (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"^layernorm", "norm"),
    (r"attention\.(output\.dense|o_proj)", "attn.proj"),
    (r"attention\.(?:attention\.)?([qkv])(uery|ey|alue|_proj)", r"attn.\1"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"(?<=\d\.)output\.dense", "mlp.fc2"),
    (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
    (r"^(cls_)?classifier", "head"),
    (r"^distillation_classifier", "head_dist"),
)
_TORCHVISION = (
    (r"^class_token", "cls_token"),
    (r"^encoder\.pos_embedding", "pos_embed"),
    (r"^conv_proj", "patch_embed.proj"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"ln_([12])", r"norm\1"),
    (r"self_attention\.in_proj_", "attn.qkv."),
    (r"self_attention\.o(ut)?_proj", "attn.proj"),
    (r"self_attention\.([qkv])_proj", r"attn.\1"),
    (r"mlp\.(0|linear_1)\.", "mlp.fc1."),
    (r"mlp\.(3|linear_2)\.", "mlp.fc2."),
    (r"^encoder\.ln", "norm"),
    (r"^heads\.head", "head"),
)


def to_timm(state: State) -> State:
    """A transformers or torchvision state under timm's names, q, k and v joined."""
    rules = _TORCHVISION if "class_token" in state else _HF
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    for name in [name for name in renamed if ".attn.q." in name]:
        parts = [renamed.pop(name.replace(".q.", f".{part}.")) for part in "qkv"]
        renamed[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    return renamed
