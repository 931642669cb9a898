"""A whole forward pass, in plain torch, of what a model folder says: slow, and easy to check.

It reads the same specification and tensors as the runtime, but shares no layer and no op with it:
when another implementation differs, one sees whether the folder is at fault or the runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pyruntime.format.load import read
from pyruntime.format.spec import DecoderSpec, ExpertSpec, LatentSpec, RouterSpec
from pyruntime.layers.rope import cos_sin_table
from pyruntime.ops.weight import Weight

State = Mapping[str, Tensor]  # plain matrices [rows, columns] or [S, rows, columns], float32


def logits_of_folder(folder: Path, tokens: Tensor) -> Tensor:
    """float32 [T, vocabulary] of one sequence through a float32 or int8 model folder."""
    container = read(folder)
    tensors: dict[str, Tensor] = {}
    for name, tensor in container.tensors.items():
        if isinstance(tensor, Weight):
            shape = container.manifest.placement[name][1].shape
            tensor = tensor.dense().reshape(shape)
        tensors[name] = tensor
    return logits(container.spec, tensors, cos_sin_table(container.spec, len(tokens)), tokens)


def logits(spec: DecoderSpec, tensors: State, cos_sin: Tensor, tokens: Tensor) -> Tensor:
    """float32 [T, vocabulary] of one sequence; `cos_sin` is `layers.rope.cos_sin_table`."""
    h = tensors["embed.weight"][tokens] * spec.embedding_multiplier
    for i in range(spec.num_layers):
        name = f"layers.{i}.attn"
        x = _norm(spec, tensors, f"{name}.norm", h)
        mixed = _latent if spec.latent is not None else _attention
        h = h + mixed(spec, tensors, name, x, cos_sin, i) * spec.residual_multiplier
        name = f"layers.{i}.mlp"
        x = _norm(spec, tensors, f"{name}.norm", h)
        if spec.experts is not None and i in spec.experts.layers:
            y = _experts(spec.experts, tensors, name, x)
        else:
            y = _gated(tensors, name, x)
        h = h + y * spec.residual_multiplier
    x = _norm(spec, tensors, "norm", h)
    head = "embed" if spec.tie_embeddings else "lm_head"
    y = x @ tensors[f"{head}.weight"].T + tensors.get("lm_head.bias", torch.zeros(1))
    return y / spec.logits_scaling


def _norm(spec: DecoderSpec, tensors: State, name: str, x: Tensor) -> Tensor:
    weight = tensors[f"{name}.weight"]
    if spec.norm == "layer":
        bias = tensors[f"{name}.bias"]
        return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, spec.norm_eps)
    return _rms(x, weight, spec.norm_eps)


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _linear(tensors: State, name: str, x: Tensor) -> Tensor:
    y = x @ tensors[f"{name}.weight"].T
    return y + tensors[f"{name}.bias"] if f"{name}.bias" in tensors else y


def _gated(tensors: State, name: str, x: Tensor) -> Tensor:
    gate, up = _linear(tensors, f"{name}.gate_up", x).chunk(2, -1)
    return _linear(tensors, f"{name}.down", torch.nn.functional.silu(gate) * up)


def _rotated(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x [T, heads, D], rotated in pairs (j, j + D/2)."""
    cos, sin = cos_sin[: x.shape[0], None].chunk(2, -1)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _attend(
    spec: DecoderSpec, q: Tensor, k: Tensor, v: Tensor, layer: int, sinks: Tensor | None
) -> Tensor:
    """[T, heads, D] over keys and values [T, kv heads, ...]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = q.shape[2] ** -0.5 if spec.attention_scale is None else spec.attention_scale
    scores = torch.einsum("thd,shd->hts", q, k) * scale
    at = torch.arange(len(q))
    hidden = at[None] > at[:, None]
    if spec.window is not None and layer in spec.window_layers:
        hidden |= at[None] <= at[:, None] - spec.window
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(q), 1)], -1)
    weights = scores.softmax(-1)[..., : len(q)]
    return torch.einsum("hts,shd->thd", weights, v).flatten(1)


def _attention(
    spec: DecoderSpec, tensors: State, name: str, x: Tensor, cos_sin: Tensor, layer: int
) -> Tensor:
    q = _linear(tensors, f"{name}.q", x)
    k, v = _linear(tensors, f"{name}.kv", x).chunk(2, -1)
    heads = (-1, spec.head_dim)
    if spec.qk_norm and spec.qk_norm_span == "all":
        q = _rms(q, tensors[f"{name}.q_norm.weight"], spec.norm_eps)
        k = _rms(k, tensors[f"{name}.k_norm.weight"], spec.norm_eps)
    q, k, v = (t.unflatten(1, heads) for t in (q, k, v))
    if spec.qk_norm and spec.qk_norm_span == "head":
        q = _rms(q, tensors[f"{name}.q_norm.weight"], spec.norm_eps)
        k = _rms(k, tensors[f"{name}.k_norm.weight"], spec.norm_eps)
    sinks = tensors[f"{name}.sinks"] if spec.sinks else None
    y = _attend(spec, _rotated(q, cos_sin), _rotated(k, cos_sin), v, layer, sinks)
    return _linear(tensors, f"{name}.o", y)


def _latent(
    spec: DecoderSpec, tensors: State, name: str, x: Tensor, cos_sin: Tensor, layer: int
) -> Tensor:
    latent = spec.latent
    assert latent is not None
    low = x
    if latent.q_rank is not None:
        low = _rms(
            _linear(tensors, f"{name}.q_a", x), tensors[f"{name}.q_a_norm.weight"], spec.norm_eps
        )
    nope = _linear(tensors, f"{name}.q_nope", low).unflatten(1, (spec.num_heads, -1))
    nope = torch.einsum("thn,hrn->thr", nope, tensors[f"{name}.k_b.weight"])
    rope = _linear(tensors, f"{name}.q_rope", low).unflatten(1, (spec.num_heads, -1))
    q = _rotated(_laid_out(latent, nope, rope), cos_sin)
    both = _linear(tensors, f"{name}.kv_a", x)
    vector = _rms(both[:, : latent.kv_rank], tensors[f"{name}.kv_a_norm.weight"], spec.norm_eps)[
        :, None
    ]
    k = _rotated(_laid_out(latent, vector, both[:, None, latent.kv_rank :]), cos_sin)
    found = _attend(spec, q, k, vector, layer, None).unflatten(1, (spec.num_heads, -1))
    y = torch.einsum("thr,hvr->thv", found, tensors[f"{name}.v_b.weight"])
    return _linear(tensors, f"{name}.o", y.flatten(1))


def _laid_out(latent: LatentSpec, vector: Tensor, rope: Tensor) -> Tensor:
    """The rotary halves at the start of each half of the channels, the latent in what is left."""
    half, turned = (latent.kv_rank + latent.rope_dim) // 2, latent.rope_dim // 2
    left = half - turned
    first, second = rope.chunk(2, -1)
    return torch.cat([first, vector[..., :left], second, vector[..., left:]], -1)


def _experts(experts: ExpertSpec, tensors: State, name: str, x: Tensor) -> Tensor:
    router = experts.router
    scores = _linear(tensors, f"{name}.router", x)
    correction = tensors.get(f"{name}.router.selection_bias")
    choose = _sparse_mixer if router.kind == "sparse_mixer" else _top_k
    weights = choose(router, experts.experts_per_token, scores, correction)
    y = torch.zeros_like(x)
    for e in range(experts.num_experts):
        both = x @ tensors[f"{name}.experts.gate_up.weight"][e].T
        if experts.bias:
            both = both + tensors[f"{name}.experts.gate_up.bias"][e]
        gate, up = both.chunk(2, -1)
        if experts.activation == "swiglu_oai":
            gate, up = gate.clamp(max=experts.limit), up.clamp(-experts.limit, experts.limit)
            inner = (up + 1) * gate * torch.sigmoid(experts.alpha * gate)
        else:
            inner = torch.nn.functional.silu(gate) * up
        out = inner @ tensors[f"{name}.experts.down.weight"][e].T
        if experts.bias:
            out = out + tensors[f"{name}.experts.down.bias"][e]
        y += weights[:, e, None] * out
    if experts.shared_size:
        shared = _gated(tensors, f"{name}.shared", x)
        if experts.shared_gate:
            shared = torch.sigmoid(x @ tensors[f"{name}.shared.gate.weight"].T) * shared
        y += shared
    return y


def _top_k(rule: RouterSpec, k: int, scores: Tensor, correction: Tensor | None) -> Tensor:
    """Weights [T, E], zero where an expert is not chosen."""
    if rule.over_chosen:
        chosen = scores.topk(k).indices
        return torch.zeros_like(scores).scatter(1, chosen, scores.gather(1, chosen).softmax(1))
    if rule.score == "softmax":
        worth = scores.softmax(-1)
    elif rule.score == "sigmoid":
        worth = torch.sigmoid(scores)
    else:
        worth = torch.nn.functional.softplus(scores).sqrt()
    ranked = worth if correction is None else worth + correction
    groups = ranked.unflatten(1, (rule.groups, -1))
    best = groups.topk(2 if rule.group_score == "sum2" else 1).values.sum(-1)
    kept = torch.zeros_like(best).scatter(1, best.topk(rule.top_groups).indices, 1).bool()
    ranked = groups.masked_fill(~kept[..., None], -torch.inf).flatten(1)
    chosen = ranked.topk(k).indices
    weights = worth.gather(1, chosen)
    if rule.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + rule.epsilon)
    return torch.zeros_like(scores).scatter(1, chosen, weights * rule.scale)


def _sparse_mixer(rule: RouterSpec, k: int, scores: Tensor, correction: Tensor | None) -> Tensor:
    weights, left = torch.zeros_like(scores), scores
    for _ in range(k):
        best, which = left.max(-1, keepdim=True)
        far = (best - scores) / scores.abs().clamp(min=best) > 2 * rule.epsilon
        gates = left.masked_fill(far, -torch.inf).softmax(-1)
        weights = weights.scatter(1, which, gates.gather(1, which))
        left = left.scatter(1, which, -torch.inf)
    return weights
