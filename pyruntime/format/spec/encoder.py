"""An encoder of the T5 line: relative positions, no causal mask, plain feed-forward networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pyruntime.errors import FormatError
from pyruntime.format.spec.tensors import Layout, TensorSpec


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """The encoder of a Switch Transformer (arXiv 2101.03961).

    Attributes:
        intermediate_size: width of a feed-forward network, and of an expert.
        buckets, max_distance: of the relative position bias, which all layers share.
        num_experts: of every layer in `expert_layers`; each token runs the most probable one.
        capacity: tokens of one sequence that an expert took in training; off by default.
        router_bias: the router matrix has a bias.
    """

    source_family: Literal["switch_transformers"]
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    buckets: int
    max_distance: int
    num_experts: int
    expert_layers: tuple[int, ...]
    capacity: int
    router_bias: bool
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    dtype: Literal["bfloat16", "float32"]

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be at least 1, is {getattr(self, name)}"
            for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "head_dim",
                         "intermediate_size", "num_experts", "capacity")
            if getattr(self, name) < 1
        ]  # fmt: skip
        if self.buckets < 4 or self.max_distance <= self.buckets // 4:
            problems.append(
                f"{self.buckets} position buckets do not reach a distance of {self.max_distance}"
            )
        problems += [
            f"layer {layer} is named, but there are {self.num_layers}"
            for layer in self.expert_layers
            if not 0 <= layer < self.num_layers
        ]
        if problems:
            raise FormatError("architecture: " + "; ".join(problems))


def encoder_tensors(spec: EncoderSpec) -> list[TensorSpec]:
    """Every tensor a folder of this model holds, no more and no less, in file order."""
    found: list[TensorSpec] = []
    d, heads = spec.hidden_size, spec.num_heads * spec.head_dim

    def matrix(name: str, *shape: int, layout: Layout = "panel") -> None:
        found.append(TensorSpec(f"{name}.weight", shape, layout, spec.dtype))

    def vector(name: str, *shape: int) -> None:
        found.append(TensorSpec(name, shape, "plain", "float32"))

    matrix("embed", spec.vocab_size, d, layout="plain")
    vector("position_bias.weight", spec.buckets, spec.num_heads)
    for i in range(spec.num_layers):
        attn, mlp = f"layers.{i}.attn", f"layers.{i}.mlp"
        vector(f"{attn}.norm.weight", d)
        matrix(f"{attn}.q", heads, d)
        matrix(f"{attn}.kv", 2 * heads, d)
        matrix(f"{attn}.o", d, heads)
        vector(f"{mlp}.norm.weight", d)
        experts: tuple[int, ...] = ()
        if i in spec.expert_layers:
            matrix(f"{mlp}.router", spec.num_experts, d)
            if spec.router_bias:
                vector(f"{mlp}.router.bias", spec.num_experts)
            mlp, experts = f"{mlp}.experts", (spec.num_experts,)
        matrix(f"{mlp}.up", *experts, spec.intermediate_size, d)
        matrix(f"{mlp}.down", *experts, d, spec.intermediate_size)
    vector("norm.weight", d)
    return found
