"""A small Mixtral with Hugging Face parameter names, one module per expert.

Shapes: B batch, T tokens of a window, N = B·T, H hidden, E experts, I expert intermediate size.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Says which tokens use their first expert only: (layer, [N, 2] top-2 probabilities) -> [N] bool.
Cut = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Config:
    """The fields of config.json that the mathematics needs."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    num_local_experts: int
    num_experts_per_tok: int
    vocab_size: int
    rope_theta: float
    rms_norm_eps: float

    @classmethod
    def load(cls, path: Path) -> Config:
        raw = json.loads(path.read_text())
        config = cls(**{name: raw[name] for name in cls.__dataclass_fields__})
        if config.num_experts_per_tok != 2:
            raise ValueError(f"two experts per token, not {config.num_experts_per_tok}")
        return config


@dataclass
class Routing:
    """What one layer's router decided.

    `probs` [N, E] softmax over all experts (with gradient), `experts` [N, 2] the best two, best
    first, `single` [N] true where the second one was left out.
    """

    probs: Tensor
    experts: Tensor
    single: Tensor

    def top(self) -> Tensor:
        """[N, 2]: the probabilities of the best two experts."""
        return self.probs.gather(1, self.experts)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H] in fp32."""
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def rope_tables(config: Config, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [length, head_dim]."""
    # Rounded as transformers does it: at position 500 the last bit of a frequency shows in logits.
    half = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    angles = torch.arange(length).float()[:, None] * (1.0 / config.rope_theta**half)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Hugging Face's half-split rotary embedding; x is [B, heads, T, head_dim]."""
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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, H] -> [B, T, H], causal."""

        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        q = rotate(heads(self.q_proj(x)), cos, sin)
        k = rotate(heads(self.k_proj(x)), cos, sin)
        v = heads(self.v_proj(x))
        k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Expert(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.w1 = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.w2 = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)
        self.w3 = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, H] -> [rows, H]."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class SparseMoE(nn.Module):
    """Mixtral's rule: softmax over all experts, best two, weights renormalised over those used."""

    def __init__(self, c: Config, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.gate = nn.Linear(c.hidden_size, c.num_local_experts, bias=False)
        self.experts = nn.ModuleList(Expert(c) for _ in range(c.num_local_experts))

    def forward(self, x: Tensor, cut: Cut | None) -> tuple[Tensor, Routing]:
        """[B, T, H] -> [B, T, H], and what the router decided."""
        rows = x.flatten(0, 1)
        # The router stays in fp32 under autocast too: its decisions are comparisons of near values.
        with torch.autocast("cpu", enabled=False):
            probs = self.gate(rows.float()).softmax(-1)
        top, experts = probs.topk(2, dim=-1)
        single = cut(self.layer, top.detach()) if cut else torch.zeros_like(top[:, 0]).bool()
        used = torch.stack([torch.ones_like(single), ~single], dim=-1)
        weights = top * used
        weights = weights / weights.sum(-1, keepdim=True)

        # One dense matmul per expert over the rows sent to it. The (token, slot) pairs are sorted
        # by expert; pairs that are cut get the expert number E, end up last and are dropped.
        count = len(self.experts)
        keys = experts.masked_fill(~used, count).flatten()
        order = keys.argsort(stable=True)
        sizes = torch.bincount(keys, minlength=count + 1)[:count].tolist()
        order = order[: sum(sizes)]
        token = order // 2
        parts = rows[token].split(sizes)
        out = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        out = out.float() * weights.flatten()[order][:, None]
        mixed = torch.zeros_like(rows, dtype=torch.float32).index_add(0, token, out)
        return mixed.view(x.shape), Routing(probs, experts, single)


class Layer(nn.Module):
    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.block_sparse_moe = SparseMoE(c, index)

    def forward(
        self, h: Tensor, cos: Tensor, sin: Tensor, cut: Cut | None
    ) -> tuple[Tensor, Routing]:
        h = h + self.self_attn(self.input_layernorm(h), cos, sin)
        out, routing = self.block_sparse_moe(self.post_attention_layernorm(h), cut)
        return h + out, routing


class Decoder(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Mixtral(nn.Module):
    """Tied embeddings: the state dict has no lm_head.weight."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # Branch outputs start smaller so that the sum of them does not drown the embedding.
                last = name.endswith(("o_proj.weight", "w2.weight"))
                scale = (2 * config.num_hidden_layers) ** -0.5 if last else 1.0
                nn.init.normal_(parameter, std=0.04 * scale)

    def forward(self, ids: Tensor, cut: Cut | None = None) -> tuple[Tensor, list[Routing]]:
        """[B, T] ids -> [B, T, vocabulary] logits, and one Routing per layer."""
        cos, sin = rope_tables(self.config, ids.shape[1])
        h = self.model.embed_tokens(ids)
        routings: list[Routing] = []
        for layer in self.model.layers:
            h, routing = layer(h, cos, sin, cut)
            routings.append(routing)
        return F.linear(self.model.norm(h), self.model.embed_tokens.weight), routings
