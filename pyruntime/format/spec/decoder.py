"""A decoder of the Llama line and its relatives: what differs between families is data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pyruntime.errors import FormatError
from pyruntime.format.spec.experts import ExpertSpec
from pyruntime.format.spec.rope import rope_scaling_problems

Family = Literal[
    "llama", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2",
    "deepseek_v3", "gpt_oss", "granitemoe", "phimoe",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """Multi-head latent attention (DeepSeek-V2): keys and values are one vector of `kv_rank`.

    The cache holds that vector and `rope_dim` rotated channels; queries are brought into its space
    (`k_b`), results out of it (`v_b`). `q_rank` None: queries have no low-rank form.
    """

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A pre-norm decoder. `rope_scaling` is None or an object described in `rope`.

    Attributes:
        norm: root-mean-square norms, or layer norms with a bias.
        head_bias: the output head has a bias.
        qk_norm_span: what one norm of queries or keys covers: a head, or all heads together.
        sinks: every head has a logit that takes part in the softmax and contributes nothing.
        window: tokens that a row of `window_layers` sees, itself included; other layers see all.
        embedding_multiplier, residual_multiplier: scale embeddings and branch outputs (Granite).
        attention_scale: of the scores; None is 1 / sqrt(head_dim).
        logits_scaling: logits are divided by it.
        latent: multi-head latent attention; then `head_dim` is the width of what the cache holds,
            kv_rank + rope_dim, and there is one KV head.
        experts: mixture-of-experts feed-forward layers.
        quantization: "int8" where matrices are stored as int8 with one scale per output channel.
    """

    source_family: Family
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    dtype: Literal["bfloat16", "float32"]
    norm: Literal["rms", "layer"] = "rms"
    head_bias: bool = False
    qk_norm_span: Literal["head", "all"] = "head"
    sinks: bool = False
    window: int | None = None
    window_layers: tuple[int, ...] = ()
    embedding_multiplier: float = 1.0
    attention_scale: float | None = None
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    latent: LatentSpec | None = None
    experts: ExpertSpec | None = None
    quantization: Literal["int8"] | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be at least 1, is {getattr(self, name)}"
            for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads",
                         "head_dim", "intermediate_size", "max_positions")
            if getattr(self, name) < 1
        ]  # fmt: skip
        if self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads:
            problems.append(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            problems.append(f"head_dim must be even for rotary positions, is {self.head_dim}")
        if not (self.norm_eps >= 0 and self.rope_theta > 0):
            problems.append(f"norm_eps {self.norm_eps} or rope_theta {self.rope_theta} is negative")
        if self.rope_scaling is not None:
            problems += rope_scaling_problems(self.rope_scaling)
            width = self.latent.rope_dim if self.latent else self.head_dim
            factors = self.rope_scaling.get("factors")
            if isinstance(factors, list) and len(factors) != width // 2:
                problems.append(f"{len(factors)} rope factors, expected {width // 2}")
        if self.window is not None and self.window < 1:
            problems.append(f"window must be at least 1, is {self.window}")
        layers = (*self.window_layers, *(self.experts.layers if self.experts else ()))
        problems += [
            f"layer {layer} is named, but there are {self.num_layers}"
            for layer in dict.fromkeys(layers)
            if not 0 <= layer < self.num_layers
        ]
        latent = self.latent
        if latent is not None and (
            self.head_dim != latent.kv_rank + latent.rope_dim or self.num_kv_heads != 1
        ):
            problems.append(
                f"latent attention needs one KV head of {latent.kv_rank + latent.rope_dim}, "
                f"has {self.num_kv_heads} of {self.head_dim}"
            )
        for field in ("bos_token_id", "pad_token_id"):
            token = getattr(self, field)
            if token is not None and not 0 <= token < self.vocab_size:
                problems.append(f"{field} {token} is outside the vocabulary of {self.vocab_size}")
        problems += [
            f"eos_token_ids holds {token}, outside the vocabulary of {self.vocab_size}"
            for token in self.eos_token_ids
            if not 0 <= token < self.vocab_size
        ]
        if problems:
            raise FormatError("architecture: " + "; ".join(problems))
