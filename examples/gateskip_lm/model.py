"""A small Llama with Hugging Face parameter names, and the GateSkip wrapper around its branches."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rules import SkipRule


@dataclass(frozen=True)
class Config:
    """The fields of config.json that the mathematics needs."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float
    rms_norm_eps: float
    pad_token_id: int
    eos_token_id: int

    @classmethod
    def load(cls, path: Path) -> Config:
        raw = json.loads(path.read_text())
        return cls(**{name: raw[name] for name in cls.__dataclass_fields__})


@dataclass
class Context:
    """What a forward pass hands to every branch, and what the gates leave behind."""

    cos: Tensor
    sin: Tensor
    valid: Tensor
    rule: SkipRule | None
    gate_squares: list[Tensor]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def rope_tables(config: Config, length: int) -> tuple[Tensor, Tensor]:
    half = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    angles = torch.arange(length).float()[:, None] / config.rope_theta**half
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Hugging Face's half-split rotary embedding; x is [batch, heads, tokens, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.head_dim, self.groups = c.head_dim, c.num_attention_heads // c.num_key_value_heads
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        q = rotate(heads(self.q_proj(x)), context.cos, context.sin)
        # Keys and values come from every token, skipped or not: GateSkip's "dense" KV mode.
        k = rotate(heads(self.k_proj(x)), context.cos, context.sin)
        v = heads(self.v_proj(x))
        k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """sigmoid(W x + b), always in fp32: values crowd together near 1, where bf16 has no room."""

    def __init__(self, hidden: int, outputs: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, outputs)
        nn.init.normal_(self.gate.weight, std=0.01)
        nn.init.constant_(self.gate.bias, 5.0)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return torch.sigmoid(self.gate(x.detach().float()))


class GatedBranch(nn.Module):
    """One wrapped residual branch: gate ⊙ module(x), or exactly zero for a skipped token."""

    def __init__(self, module: nn.Module, gate: Gate, branch: int) -> None:
        super().__init__()
        self.module, self.gate, self.branch = module, gate, branch

    def forward(self, x: Tensor, context: Context) -> Tensor:
        g = self.gate(x)
        context.gate_squares.append(g.square().mean())
        out = g * self.module(x, context)
        if context.rule is None:
            return out
        scores = g.detach().mean(-1).masked_fill(~context.valid, 1.0)
        skip = context.rule(self.branch, scores, context.valid) & context.valid
        return out.masked_fill(skip[..., None], 0.0)


class Layer(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn: nn.Module = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp: nn.Module = MLP(c)

    def forward(self, h: Tensor, context: Context) -> Tensor:
        h = h + self.self_attn(self.input_layernorm(h), context)
        return h + self.mlp(self.post_attention_layernorm(h), context)


class Decoder(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Llama(nn.Module):
    """Tied embeddings: the state dict has no lm_head.weight."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # Branch outputs start smaller so that sixteen of them do not drown the embedding.
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = (2 * config.num_hidden_layers) ** -0.5 if last else 1.0
                nn.init.normal_(parameter, std=0.04 * scale)

    def add_gates(self, kind: str) -> None:
        """Wrap every branch in place; kind is "scalar" or "vector"."""
        if kind not in ("scalar", "vector"):
            raise ValueError(f"gate kind must be scalar or vector, not {kind!r}")
        hidden = self.config.hidden_size
        outputs = 1 if kind == "scalar" else hidden
        for i, layer in enumerate(self.model.layers):
            layer.self_attn = GatedBranch(layer.self_attn, Gate(hidden, outputs), 2 * i)
            layer.mlp = GatedBranch(layer.mlp, Gate(hidden, outputs), 2 * i + 1)

    def forward(self, ids: Tensor, rule: SkipRule | None = None) -> tuple[Tensor, list[Tensor]]:
        """Logits, and each gated branch's mean(g²) for the gate loss."""
        cos, sin = rope_tables(self.config, ids.shape[1])
        valid = (ids != self.config.pad_token_id) & (ids != self.config.eos_token_id)
        context = Context(cos, sin, valid, rule, [])
        h = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            h = layer(h, context)
        return F.linear(self.model.norm(h), self.model.embed_tokens.weight), context.gate_squares
