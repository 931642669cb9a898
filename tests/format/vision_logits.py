"""A converted vision model in a few lines of torch: what its tensors mean, not how they run."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pyruntime.format.load import Container, read
from pyruntime.format.spec import VisionSpec
from tests.format.vision_values import values


def spec_of(container: Container) -> VisionSpec:
    assert isinstance(container.spec, VisionSpec)
    return container.spec


def logits(folder: Path, images: Tensor) -> Tensor:
    """Logits float32 [B, C] of the final head."""
    container = read(folder)
    spec = spec_of(container)
    t = {name: values(tensor).float() for name, tensor in container.tensors.items()}
    n, d = len(images), spec.hidden_size

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, t[f"{name}.weight"], t.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        weight = t[f"{name}.weight"]
        return F.layer_norm(x, (len(weight),), weight, t[f"{name}.bias"], spec.norm_eps)

    x = linear(F.unfold(images, spec.patch_size, stride=spec.patch_size).mT, "stem")
    x = x + t["positions"]
    if spec.prefix_tokens:
        x = torch.cat([t["prefix"].expand(n, -1, -1), x], 1)
    if spec.pre_norm:
        x = norm(x, "pre_norm")
    for i in range(spec.num_layers):
        attn, mlp = f"layers.{i}.attn", f"layers.{i}.mlp"
        q, k, v = (
            part.unflatten(-1, (spec.num_heads, -1)).transpose(1, 2)
            for part in linear(norm(x, f"{attn}.norm"), f"{attn}.qkv").split(d, -1)
        )
        if spec.qk_norm:
            q, k = norm(q, f"{attn}.q_norm"), norm(k, f"{attn}.k_norm")
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(y, f"{attn}.o")
        x = x + linear(F.gelu(linear(norm(x, f"{mlp}.norm"), f"{mlp}.up")), f"{mlp}.down")
    patches = slice(spec.prefix_tokens, None)
    if spec.norm_after_pool:
        return linear(norm(x[:, patches].mean(1), "norm"), "head")
    x = norm(x, "norm")
    if spec.pool == "mean":
        return linear(x[:, patches].mean(1), "head")
    if spec.pool == "class_mean":
        return linear(torch.cat([x[:, 0], x[:, patches].mean(1)], -1), "head")
    if spec.pool == "distilled":
        return (linear(x[:, 0], "head") + linear(x[:, 1], "head_dist")) / 2
    return linear(x[:, 0], "head")


def gate_logits(folder: Path, images: Tensor) -> Tensor:
    """Logits float32 [B, regions] of the gate of scales, above whose threshold one stays coarse."""
    container = read(folder)
    scales = spec_of(container).scales
    assert scales is not None and scales.gate is not None
    t = {name: values(tensor) for name, tensor in container.tensors.items()}
    side, gate = scales.ratios[0] * spec_of(container).patch_size, scales.gate
    x = F.unfold(images, side, stride=side).mT
    for i, width in enumerate((*gate.widths, 1)):
        x = F.linear(x, t[f"gate.fc{i}.weight"], t[f"gate.fc{i}.bias"])
        if i == 0 and gate.positions:
            x = x + t["gate.positions"]
        if i == len(gate.widths):
            break
        if gate.norms:
            x = F.layer_norm(x, (width,), t[f"gate.norm{i}.weight"], t[f"gate.norm{i}.bias"], 1e-6)
        x = F.gelu(x)
    return x[..., 0]
