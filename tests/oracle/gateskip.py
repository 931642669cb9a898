"""GateSkip as its paper runs it: everything dense, skipped results multiplied by zero.

Written from the specification alone, in plain float32 torch, over the original state dict. It
shares no code with the runtime.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Result:
    """Logits [B, T, V]; keep masks bool and importances, both [L, 2, B, T]."""

    logits: Tensor
    kept: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Oracle:
    """A Llama decoder whose branches are wrapped in gates.

    Attributes:
        state: GateSkip's names, `model.layers.0.self_attn.module.q_proj.weight` and so on.
        config: config.json of the base.
        gating_mode, actually_gate: as in the sidecar, the rest is seen in the names.
    """

    state: State
    config: dict[str, Any]
    gating_mode: str = "after_module"
    actually_gate: bool = True

    def forward(self, tokens: Tensor, skip: float = 0.0, forced: Tensor | None = None) -> Result:
        """tokens [B, T]; skip ratio q; or forced keep masks bool [L, 2, B, T]."""
        eos = self.config["eos_token_id"]
        protected = {*(eos if isinstance(eos, list) else [eos]), self.config["pad_token_id"]} - {
            None
        }
        valid = torch.ones_like(tokens, dtype=torch.bool)
        for token in protected:
            valid &= tokens != token
        h = self.state["model.embed_tokens.weight"][tokens].float()
        kept, scores = [], []
        for layer in range(self.config["num_hidden_layers"]):
            for branch, name, norm in (
                (0, "self_attn", "input_layernorm"),
                (1, "mlp", "post_attention_layernorm"),
            ):
                x = self.norm(h, f"model.layers.{layer}.{norm}.weight")
                gate = self.gate(x, f"model.layers.{layer}.{name}.gate.gate")
                if gate is None:
                    importance, keep = torch.ones_like(h[..., 0]), torch.ones_like(valid)
                else:
                    importance = torch.where(valid, gate.mean(-1), 1.0)
                    keep = ~(importance <= self.threshold(importance[valid], skip)) | ~valid
                    if forced is not None:
                        keep = forced[layer, branch]
                    if self.gating_mode == "before_module" and self.actually_gate:
                        x = x * gate
                y = (self.attention, self.mlp)[branch](x, layer, gate is not None)
                if gate is not None and self.actually_gate:
                    y = gate * y
                h = h + y * keep[..., None]
                kept.append(keep)
                scores.append(importance)
        x = self.norm(h, "model.norm.weight")
        head = self.state.get("lm_head.weight", self.state["model.embed_tokens.weight"])
        shape = (-1, 2, *tokens.shape)
        return Result(
            x @ head.float().T,
            torch.stack(kept).view(shape),
            torch.stack(scores).view(shape),
        )

    @staticmethod
    def threshold(valid_scores: Tensor, skip: float) -> Tensor:
        """Quantile over all valid scores jointly, with the published edge rules."""
        if skip <= 0:
            return torch.tensor(-math.inf)
        if valid_scores.numel() <= 1 or bool((valid_scores == 1.0).all()):
            return torch.tensor(0.0)
        return torch.quantile(valid_scores, min(skip, 1.0))

    def norm(self, h: Tensor, name: str) -> Tensor:
        scale = torch.rsqrt(h.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return h * scale * self.state[name].float()

    def gate(self, x: Tensor, name: str) -> Tensor | None:
        if f"{name}.weight" in self.state:
            return torch.sigmoid(self.linear(x, name))
        if f"{name}.0.weight" in self.state:
            return torch.sigmoid(self.linear(F.relu(self.linear(x, f"{name}.0")), f"{name}.2"))
        return None

    def linear(self, x: Tensor, name: str) -> Tensor:
        bias = self.state.get(f"{name}.bias")
        return F.linear(
            x, self.state[f"{name}.weight"].float(), None if bias is None else bias.float()
        )

    def mlp(self, x: Tensor, layer: int, wrapped: bool) -> Tensor:
        name = f"model.layers.{layer}.mlp" + (".module" if wrapped else "")
        inner = F.silu(self.linear(x, f"{name}.gate_proj")) * self.linear(x, f"{name}.up_proj")
        return self.linear(inner, f"{name}.down_proj")

    def attention(self, x: Tensor, layer: int, wrapped: bool) -> Tensor:
        name = f"model.layers.{layer}.self_attn" + (".module" if wrapped else "")
        config, (batch, length, _) = self.config, x.shape
        dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]

        def heads(projection: str) -> Tensor:
            return (
                self.linear(x, f"{name}.{projection}").view(batch, length, -1, dim).transpose(1, 2)
            )

        q, k, v = self.rotate(heads("q_proj")), self.rotate(heads("k_proj")), heads("v_proj")
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(dim)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        return self.linear((weights @ v).transpose(1, 2).flatten(2), f"{name}.o_proj")

    def rotate(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        theta = self.config["rope_theta"] ** (-torch.arange(half) / half)
        angle = torch.arange(x.shape[-2])[:, None] * theta
        a, b = x.split(half, -1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
