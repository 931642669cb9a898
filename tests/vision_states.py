"""Random state dicts of vision models under the names of their families, with tiny odd shapes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from tests.checkpoints import State

TOKEN = 64  # channels of the tokens-to-token layers


class _Random:
    """Tensors by name, drawn one after the other."""

    def __init__(self, seed: int, std: float = 0.2) -> None:
        self.state: State = {}
        self._random = torch.Generator().manual_seed(seed)
        self._std = std

    def tensor(self, name: str, *shape: int) -> None:
        self.state[name] = torch.randn(*shape, generator=self._random) * self._std

    def linear(self, name: str, rows: int, columns: int, bias: bool = True) -> None:
        self.tensor(f"{name}.weight", rows, columns)
        if bias:
            self.tensor(f"{name}.bias", rows)

    def norm(self, name: str, width: int) -> None:
        self.tensor(f"{name}.weight", width)
        self.state[f"{name}.weight"] += 1
        self.tensor(f"{name}.bias", width)

    def heads(self, exits: int, classes: int, width: int, gates: bool = True) -> None:
        """JEI-DNN's intermediate heads and gates."""
        for i in range(exits):
            self.linear(f"intermediate_heads.{i}", classes, width)
            if gates:
                self.linear(f"gates.{i}.linear", 1, 4)


def timm_state(
    *,
    hidden: int = 40,
    layers: int = 3,
    heads: int = 5,
    patch: int = 4,
    image: tuple[int, int] = (12, 8),
    mlp: int = 52,
    classes: int = 7,
    channels: int = 3,
    class_token: bool = True,
    distilled: bool = False,
    registers: int = 0,
    prefix_positions: bool = True,
    qkv_bias: bool = True,
    qk_norm: bool = False,
    layer_scale: str | None = None,
    fc_norm: bool = False,
    pre_norm: bool = False,
    patch_bias: bool = True,
    flat_patch: bool = False,
    exits: int = 0,
    gates: bool = True,
    seed: int = 0,
) -> State:
    """A timm VisionTransformer. `layer_scale` is "ls{n}.gamma" or "gamma_{n}".

    `prefix_positions`: pos_embed has rows for the prefix tokens too. `exits` adds JEI-DNN's heads
    after the first blocks, with their gates.
    """
    made = _Random(seed)
    count = (image[0] // patch) * (image[1] // patch)
    prefix = 0
    for name, size in (("cls_token", int(class_token)), ("dist_token", int(distilled)),
                       ("reg_token", registers)):  # fmt: skip
        if size:
            made.tensor(name, 1, size, hidden)
            prefix += size
    made.tensor("pos_embed", 1, count + prefix * prefix_positions, hidden)
    if flat_patch:
        made.tensor("patch_embed.proj.weight", hidden, channels * patch * patch)
    else:
        made.tensor("patch_embed.proj.weight", hidden, channels, patch, patch)
    if patch_bias:
        made.tensor("patch_embed.proj.bias", hidden)
    if pre_norm:
        made.norm("norm_pre", hidden)
    for i in range(layers):
        block = f"blocks.{i}"
        made.norm(f"{block}.norm1", hidden)
        made.linear(f"{block}.attn.qkv", 3 * hidden, hidden, qkv_bias)
        if qk_norm:
            made.norm(f"{block}.attn.q_norm", hidden // heads)
            made.norm(f"{block}.attn.k_norm", hidden // heads)
        made.linear(f"{block}.attn.proj", hidden, hidden)
        made.norm(f"{block}.norm2", hidden)
        made.linear(f"{block}.mlp.fc1", mlp, hidden)
        made.linear(f"{block}.mlp.fc2", hidden, mlp)
        for n in (1, 2) if layer_scale else ():
            made.tensor(f"{block}.{layer_scale}".replace("{n}", str(n)), hidden)
    made.norm("fc_norm" if fc_norm else "norm", hidden)
    made.linear("head", classes, hidden)
    if distilled:
        made.linear("head_dist", classes, hidden)
    made.heads(exits, classes, hidden, gates)
    return made.state


def t2t_state(
    *,
    hidden: int = 128,
    layers: int = 3,
    mlp: int = 96,
    classes: int = 7,
    image: tuple[int, int] = (32, 32),
    exits: int | None = None,
    gates: bool = True,
    seed: int = 0,
) -> State:
    """A T2T-ViT with performer tokens; by default with JEI-DNN's heads and gates on all blocks
    but the last. Heads are `hidden` / 64."""
    made = _Random(seed, std=0.1)
    for n, width in ((1, 147), (2, 9 * TOKEN)):
        layer = f"tokens_to_token.attention{n}"
        made.norm(f"{layer}.norm1", width)
        made.linear(f"{layer}.kqv", 3 * TOKEN, width)
        made.tensor(f"{layer}.w", TOKEN // 2, TOKEN)
        made.linear(f"{layer}.proj", TOKEN, TOKEN)
        made.norm(f"{layer}.norm2", TOKEN)
        made.linear(f"{layer}.mlp.0", TOKEN, TOKEN)
        made.linear(f"{layer}.mlp.2", TOKEN, TOKEN)
    made.linear("tokens_to_token.project", hidden, 9 * TOKEN)
    made.tensor("cls_token", 1, 1, hidden)
    made.tensor("pos_embed", 1, 1 + (image[0] // 16) * (image[1] // 16), hidden)
    for i in range(layers):
        block = f"blocks.{i}"
        made.norm(f"{block}.norm1", hidden)
        made.linear(f"{block}.attn.qkv", 3 * hidden, hidden, bias=False)
        made.linear(f"{block}.attn.proj", hidden, hidden)
        made.norm(f"{block}.norm2", hidden)
        made.linear(f"{block}.mlp.fc1", mlp, hidden)
        made.linear(f"{block}.mlp.fc2", hidden, mlp)
    made.norm("norm", hidden)
    made.linear("head", classes, hidden)
    made.heads(layers - 1 if exits is None else exits, classes, hidden, gates)
    return made.state


def msvit_state(
    *,
    ratio: int = 2,
    widths: tuple[int, ...] = (11, 6),
    norms: bool = True,
    positions: bool = True,
    separate: int | None = None,
    image: tuple[int, int] = (16, 8),
    patch: int = 4,
    hidden: int = 40,
    channels: int = 3,
    seed: int = 0,
    **shape: Any,
) -> State:
    """A timm ViT with a gate of scales; `shape` is that of `timm_state`.

    `widths` are the gate's hidden units. `separate`: coarse patches have a projection of their own,
    with a kernel of so many pixels.
    """
    state = timm_state(
        image=image, patch=patch, hidden=hidden, channels=channels, seed=seed, **shape
    )
    made, side = _Random(seed + 1), patch * ratio
    sizes = (channels * side * side, *widths, 1)
    for i, (columns, rows) in enumerate(pairwise(sizes)):
        made.linear(f"msvit.gate.fc{i}", rows, columns)
    for i, width in enumerate(widths if norms else ()):
        made.norm(f"msvit.gate.norm{i}", width)
    if positions:
        regions = (image[0] // side) * (image[1] // side)
        made.tensor("msvit.gate.pos_embed", 1, regions, sizes[1])
    if separate is not None:
        made.tensor("msvit.coarse_embed.proj.weight", hidden, channels, separate, separate)
        if shape.get("patch_bias", True):
            made.tensor("msvit.coarse_embed.proj.bias", hidden)
    return state | made.state


def apt_state(*, trained: bool = True, hidden: int = 40, seed: int = 0, **shape: Any) -> State:
    """A timm ViT as the released code of Adaptive Patch Transformers saves it.

    `trained`: its module of mixed patches has taken the class token and shares parameters.
    """
    state = timm_state(hidden=hidden, seed=seed, **shape)
    made = _Random(seed + 1)
    made.tensor("mixed_patch.base_mini_pos_embed", 1, 4, hidden)
    made.tensor("mixed_patch.patch_attn.weight", hidden, hidden, 2, 2)
    made.tensor("mixed_patch.patch_attn.bias", hidden)
    made.linear("mixed_patch.zero_conv", hidden, hidden)
    if trained:
        state["mixed_patch.cls_token"] = state.pop("cls_token")
        state["mixed_patch.base_pos_embed"] = state["pos_embed"]
        for kind in ("weight", "bias"):
            name = f"patch_embed.proj.{kind}"
            state[f"mixed_patch.{name}"] = state[name]
    return state | made.state


def dynamicvit_state(*, hidden: int = 40, stages: int = 3, seed: int = 0, **shape: Any) -> State:
    """A DynamicViT: a timm ViT with a predictor of scores for each of its `stages`."""
    state = timm_state(hidden=hidden, seed=seed, **shape)
    made = _Random(seed + 1)
    for i in range(stages):
        made.norm(f"score_predictor.{i}.in_conv.0", hidden)
        made.linear(f"score_predictor.{i}.in_conv.1", hidden, hidden)
        for j, (rows, columns) in enumerate(pairwise((2, hidden // 4, hidden // 2, hidden))):
            made.linear(f"score_predictor.{i}.out_conv.{4 - 2 * j}", rows, columns)
    return state | made.state


def torchvision_state(
    *,
    hidden: int = 40,
    layers: int = 2,
    patch: int = 4,
    image: tuple[int, int] = (8, 8),
    mlp: int = 52,
    classes: int = 7,
    learners: int = 3,
    mlp_bottleneck: int = 0,
    attention_bottleneck: int = 0,
    final_bias: bool = False,
    gate_hidden: int | None = 6,
    split: bool = False,
    seed: int = 0,
) -> State:
    """A torchvision vit_b_16, or what the code of Adaptive Computation Modules makes of it.

    A bottleneck above 0 replaces that part by learners of it. `gate_hidden` None makes gates of one
    layer. `split`: plain attention has q_proj … o_proj instead of torchvision's fused in_proj.
    """
    made = _Random(seed)

    def adaptive(name: str, bottleneck: int, choices: int) -> None:
        made.tensor(f"{name}.w1", hidden, learners * bottleneck)
        made.tensor(f"{name}.b1", learners * bottleneck)
        made.tensor(f"{name}.w2", learners * bottleneck, hidden)
        if final_bias:
            made.tensor(f"{name}.b2", (learners + 1) * hidden)
        gate = f"{name}.gating_network"
        if gate_hidden is None:
            return made.linear(f"{gate}.fc", choices, hidden)
        made.linear(f"{gate}.net.0", gate_hidden, hidden)
        made.linear(f"{gate}.net.1", gate_hidden, gate_hidden)
        made.linear(f"{gate}.net.2", choices, gate_hidden)

    made.tensor("class_token", 1, 1, hidden)
    made.tensor("conv_proj.weight", hidden, 3, patch, patch)
    made.tensor("conv_proj.bias", hidden)
    made.tensor("encoder.pos_embedding", 1, 1 + (image[0] // patch) * (image[1] // patch), hidden)
    for i in range(layers):
        layer = f"encoder.layers.encoder_layer_{i}"
        made.norm(f"{layer}.ln_1", hidden)
        attention = f"{layer}.self_attention"
        if attention_bottleneck:
            for part in "qkvo":
                adaptive(f"{attention}.{part}_proj", attention_bottleneck, learners)
        elif split:
            for part in "qkvo":
                made.linear(f"{attention}.{part}_proj", hidden, hidden)
        else:
            made.tensor(f"{attention}.in_proj_weight", 3 * hidden, hidden)
            made.tensor(f"{attention}.in_proj_bias", 3 * hidden)
            made.linear(f"{attention}.out_proj", hidden, hidden)
        made.norm(f"{layer}.ln_2", hidden)
        if mlp_bottleneck:
            adaptive(f"{layer}.mlp", mlp_bottleneck, learners + 1)
        else:
            made.linear(f"{layer}.mlp.0", mlp, hidden)
            made.linear(f"{layer}.mlp.3", hidden, mlp)
    made.norm("encoder.ln", hidden)
    made.linear("heads.head", classes, hidden)
    return made.state


def hf_state(
    model: str,
    *,
    hidden: int = 40,
    layers: int = 3,
    patch: int = 4,
    image: tuple[int, int] = (12, 8),
    mlp: int = 160,
    classes: int = 7,
    registers: int = 4,
    modern: bool = False,
    teacher: bool = True,
    qkv_bias: bool = True,
    seed: int = 0,
) -> State:
    """A "vit", "deit", "dinov2" or "dinov2_with_registers" for image classification.

    `modern`: the names that transformers 5 has in memory, not those it writes. `teacher`: a DeiT
    with the classifier of its distillation token.
    """
    made = _Random(seed)
    dino = model.startswith("dinov2")
    made.tensor(f"{model}.embeddings.cls_token", 1, 1, hidden)
    if dino:
        made.tensor(f"{model}.embeddings.mask_token", 1, hidden)
    if model == "dinov2_with_registers":
        made.tensor(f"{model}.embeddings.register_tokens", 1, registers, hidden)
    if model == "deit":
        made.tensor(f"{model}.embeddings.distillation_token", 1, 1, hidden)
    count = (image[0] // patch) * (image[1] // patch) + (2 if model == "deit" else 1)
    made.tensor(f"{model}.embeddings.position_embeddings", 1, count, hidden)
    stem = f"{model}.embeddings.patch_embeddings.projection"
    made.tensor(f"{stem}.weight", hidden, 3, patch, patch)
    made.tensor(f"{stem}.bias", hidden)
    for i in range(layers):
        layer = f"{model}.encoder.layer.{i}" if dino or not modern else f"{model}.layers.{i}"
        before, after = ("norm1", "norm2") if dino else ("layernorm_before", "layernorm_after")
        made.norm(f"{layer}.{before}", hidden)
        for part in ("query", "key", "value"):
            name = f"{part[0]}_proj" if modern else f"attention.{part}"
            made.linear(f"{layer}.attention.{name}", hidden, hidden, qkv_bias)
        made.linear(f"{layer}.attention.{'o_proj' if modern else 'output.dense'}", hidden, hidden)
        made.norm(f"{layer}.{after}", hidden)
        plain = dino or modern
        made.linear(f"{layer}.{'mlp.fc1' if plain else 'intermediate.dense'}", mlp, hidden)
        made.linear(f"{layer}.{'mlp.fc2' if plain else 'output.dense'}", hidden, mlp)
        for n in (1, 2) if dino else ():
            made.tensor(f"{layer}.layer_scale{n}.lambda1", hidden)
    made.norm(f"{model}.layernorm", hidden)
    if model == "deit" and teacher:
        made.linear("cls_classifier", classes, hidden)
        made.linear("distillation_classifier", classes, hidden)
    else:
        made.linear("classifier", classes, 2 * hidden if dino else hidden)
    return made.state
