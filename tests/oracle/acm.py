"""Vision transformers of adaptive width, in plain torch: all partial sums, then one is taken.

Works on the tensors of the official code (Adaptive Computation Modules, acm.py, over the names of
torchvision) and shares no line with the runtime.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracle.t2t import State, attend, linear, norm

EPS = 1e-6
Rule = Literal["paper", "official", "kminus"]


def choices(state: State, name: str, x: Tensor) -> Tensor:
    """k int64 [...] of x [..., d], as the gates say."""
    gate = f"{name}.gating_network"
    if f"{gate}.fc.weight" in state:
        logits = linear(state, f"{gate}.fc", x)
    else:
        logits = linear(state, f"{gate}.net.0", x)
        for i in (1, 2):
            logits = linear(state, f"{gate}.net.{i}", logits)
    least = 0 if name.endswith("mlp") else 1
    return logits.argmax(-1) + least


def partial_sums(state: State, name: str, x: Tensor, learners: int) -> Tensor:
    """h(x, k) for k = 0 .. learners, [..., learners + 1, d]."""
    inner = x @ state[f"{name}.w1"] + state[f"{name}.b1"]
    if name.endswith("mlp"):
        inner = F.gelu(inner)
    w2 = state[f"{name}.w2"].unflatten(0, (learners, -1))
    parts = torch.einsum("...nb,nbd->...nd", inner.unflatten(-1, (learners, -1)), w2)
    parts = torch.cat([torch.zeros_like(parts[..., :1, :]), parts], -2)
    if f"{name}.b2" in state:
        parts = parts + state[f"{name}.b2"].view(learners + 1, -1)
    return parts.cumsum(-2)


def module(state: State, name: str, x: Tensor, learners: int, rule: Rule) -> Tensor:
    """What an adaptive module, or the linear layer it would replace, makes of x [B, N, d]."""
    if f"{name}.w1" not in state:
        return linear(state, name, x)
    k = choices(state, name, x)
    if rule == "kminus":
        k = k.clamp(max=learners - 1)
    elif rule == "official":  # its loop ends before the largest k of the batch
        k = k.clamp(max=max(int(k.max()) - 1, 0))
    sums = partial_sums(state, name, x, learners)
    return sums.gather(-2, k[..., None, None].expand(*k.shape, 1, x.shape[-1])).squeeze(-2)


def forward(
    state: State, images: Tensor, heads: int, learners: int, rule: Rule = "paper"
) -> Tensor:
    """Logits [B, C] of images [B, 3, H, W]."""
    kernel = state["conv_proj.weight"]
    x = F.conv2d(images, kernel, state["conv_proj.bias"], stride=kernel.shape[-1])
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["class_token"].expand(len(x), -1, -1), x], 1)
    x = x + state["encoder.pos_embedding"]
    count = sum(name.endswith("ln_1.weight") for name in state)
    for i in range(count):
        layer = f"encoder.layers.encoder_layer_{i}"
        attention, z = f"{layer}.self_attention", norm(state, f"{layer}.ln_1", x, EPS)
        if f"{attention}.in_proj_weight" in state:
            weight, bias = state[f"{attention}.in_proj_weight"], state[f"{attention}.in_proj_bias"]
            q, k, v = F.linear(z, weight, bias).chunk(3, -1)
            x = x + linear(state, f"{attention}.out_proj", attend(q, k, v, heads))
        else:
            q, k, v = (
                module(state, f"{attention}.{part}_proj", z, learners, rule) for part in "qkv"
            )
            out = attend(q, k, v, heads)
            x = x + module(state, f"{attention}.o_proj", out, learners, rule)
        z = norm(state, f"{layer}.ln_2", x, EPS)
        if f"{layer}.mlp.w1" in state:
            x = x + module(state, f"{layer}.mlp", z, learners, rule)
        else:
            x = x + linear(state, f"{layer}.mlp.3", F.gelu(linear(state, f"{layer}.mlp.0", z)))
    return linear(state, "heads.head", norm(state, "encoder.ln", x, EPS)[:, 0])
