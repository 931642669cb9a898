"""The exact list of tensors that a folder of a model must hold, and how they lie in the file."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pyruntime.format.spec.decoder import DecoderSpec, LatentSpec
from pyruntime.format.spec.experts import ExpertSpec
from pyruntime.format.spec.gates import GateSpec

Layout = Literal["plain", "panel", "gate_up"]
Dtype = Literal["bfloat16", "float32", "int8"]
PANEL = 32  # output columns per panel; a gate_up panel is half gate, half up
DTYPE_BYTES: Mapping[str, int] = types.MappingProxyType({"bfloat16": 2, "float32": 4, "int8": 1})
# What safetensors calls them.
STORED_DTYPES: Mapping[str, str] = types.MappingProxyType(
    {"bfloat16": "BF16", "float32": "F32", "int8": "I8"}
)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a folder: logical `shape`, and how its numbers lie in the file.

    Matrices are [rows, columns], or [S, rows, columns] for the S experts (or heads) of a layer.
    """

    name: str
    shape: tuple[int, ...]
    layout: Layout
    dtype: Dtype

    @property
    def segments(self) -> int:
        """S of a matrix; 1 where there is one."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in the safetensors file: padded panels for matrices, else the logical one."""
        if self.layout == "plain":
            return self.shape
        rows, columns = self.shape[-2:]
        half = PANEL // 2
        panels = -(-(rows // 2) // half) if self.layout == "gate_up" else -(-rows // PANEL)
        if self.dtype == "float32":
            return (self.segments, panels, columns, PANEL)
        return (self.segments, panels, -(-columns // 2), PANEL, 2)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return DTYPE_BYTES[self.dtype] * math.prod(self.stored_shape)


def decoder_tensors(spec: DecoderSpec, gates: GateSpec | None) -> list[TensorSpec]:
    """Every tensor a folder of this model holds, no more and no less, in file order.

    Norm weights, biases and scales are float32; matrices are in the model dtype, or int8 with a
    `weight_scale` of every output row where the model is quantised. `kv` rows are the keys then the
    values; `gate_up` rows are the gate then the up projection, in biases and scales too.
    """
    return _Listing(spec, gates).found


class _Listing:
    def __init__(self, spec: DecoderSpec, gates: GateSpec | None) -> None:
        self.found: list[TensorSpec] = []
        self._spec = spec
        # A tied embedding serves the lookup and the head; only the head needs panels.
        self._matrix(
            "embed",
            (spec.vocab_size, spec.hidden_size),
            layout="panel" if spec.tie_embeddings else "plain",
            quantize=False,
        )
        for i in range(spec.num_layers):
            self._attention(f"layers.{i}.attn")
            self._feed_forward(f"layers.{i}.mlp", i)
            if gates is not None and not gates.shared:
                for branch in gates.branches:
                    self._gate(f"layers.{i}.{branch}.gate", gates)
        if gates is not None and gates.shared:
            for branch in gates.branches:
                self._gate(f"gates.{branch}", gates)
        self._norm("norm")
        if not spec.tie_embeddings:
            self._matrix("lm_head", (spec.vocab_size, spec.hidden_size))
        if spec.head_bias:
            self._vector("lm_head.bias", spec.vocab_size)

    def _attention(self, attn: str) -> None:
        spec, d = self._spec, self._spec.hidden_size
        self._norm(f"{attn}.norm")
        if spec.latent is not None:
            self._latent_attention(attn, spec.latent)
            return
        q_rows, kv_rows = spec.num_heads * spec.head_dim, 2 * spec.num_kv_heads * spec.head_dim
        self._linear(f"{attn}.q", (q_rows, d), spec.qkv_bias)
        self._linear(f"{attn}.kv", (kv_rows, d), spec.qkv_bias)
        self._linear(f"{attn}.o", (d, q_rows), spec.o_bias)
        if spec.qk_norm:
            whole = spec.qk_norm_span == "all"
            self._vector(f"{attn}.q_norm.weight", q_rows if whole else spec.head_dim)
            self._vector(f"{attn}.k_norm.weight", kv_rows // 2 if whole else spec.head_dim)
        if spec.sinks:
            self._vector(f"{attn}.sinks", spec.num_heads)

    def _latent_attention(self, attn: str, latent: LatentSpec) -> None:
        spec, d, heads = self._spec, self._spec.hidden_size, self._spec.num_heads
        columns = d
        if latent.q_rank is not None:
            self._linear(f"{attn}.q_a", (latent.q_rank, d), spec.qkv_bias)
            self._vector(f"{attn}.q_a_norm.weight", latent.q_rank)
            columns = latent.q_rank
        self._matrix(f"{attn}.q_nope", (heads * latent.nope_dim, columns))
        self._matrix(f"{attn}.q_rope", (heads * latent.rope_dim, columns))
        self._linear(f"{attn}.kv_a", (latent.kv_rank + latent.rope_dim, d), spec.qkv_bias)
        self._vector(f"{attn}.kv_a_norm.weight", latent.kv_rank)
        self._matrix(f"{attn}.k_b", (heads, latent.kv_rank, latent.nope_dim))
        self._matrix(f"{attn}.v_b", (heads, latent.value_dim, latent.kv_rank))
        self._linear(f"{attn}.o", (d, heads * latent.value_dim), spec.o_bias)

    def _feed_forward(self, mlp: str, layer: int) -> None:
        spec = self._spec
        self._norm(f"{mlp}.norm")
        experts = spec.experts
        if experts is not None and layer in experts.layers:
            self._experts(mlp, experts)
            return
        self._gated(mlp, spec.intermediate_size, spec.mlp_bias)

    def _experts(self, mlp: str, experts: ExpertSpec) -> None:
        d, count, inner = self._spec.hidden_size, experts.num_experts, experts.intermediate_size
        self._matrix(f"{mlp}.router", (count, d), quantize=False)
        if experts.router.bias:
            self._vector(f"{mlp}.router.bias", count)
        if experts.router.selection_bias:
            self._vector(f"{mlp}.router.selection_bias", count)
        self._linear(f"{mlp}.experts.gate_up", (count, 2 * inner, d), experts.bias, "gate_up")
        self._linear(f"{mlp}.experts.down", (count, d, inner), experts.bias)
        if experts.shared_size:
            self._gated(f"{mlp}.shared", experts.shared_size, bias=False)
        if experts.shared_gate:
            self.found.append(TensorSpec(f"{mlp}.shared.gate.weight", (1, d), "plain", "float32"))

    def _gated(self, name: str, inner: int, bias: bool) -> None:
        d = self._spec.hidden_size
        self._linear(f"{name}.gate_up", (2 * inner, d), bias, "gate_up")
        self._linear(f"{name}.down", (d, inner), bias)

    def _gate(self, prefix: str, kind: GateSpec) -> None:
        d = self._spec.hidden_size
        if kind.gate_type == "mlp":
            self._linear(f"{prefix}.up", (2 * d, d), bias=True, quantize=False)
            wide = 1 if kind.mlp_scalar else d
            self._linear(f"{prefix}.down", (wide, 2 * d), bias=True, quantize=False)
        elif kind.gate_type == "vector":
            self._linear(prefix, (d, d), bias=True, quantize=False)
        else:
            self.found.append(TensorSpec(f"{prefix}.weight", (1, d), "plain", "float32"))
            self._vector(f"{prefix}.bias", 1)

    def _norm(self, name: str) -> None:
        self._vector(f"{name}.weight", self._spec.hidden_size)
        if self._spec.norm == "layer":
            self._vector(f"{name}.bias", self._spec.hidden_size)

    def _vector(self, name: str, *shape: int) -> None:
        self.found.append(TensorSpec(name, shape, "plain", "float32"))

    def _matrix(
        self, name: str, shape: tuple[int, ...], layout: Layout = "panel", quantize: bool = True
    ) -> None:
        dtype: Dtype = self._spec.dtype
        if quantize and self._spec.quantization == "int8":
            dtype = "int8"
            self._vector(f"{name}.weight_scale", *shape[:-1])
        self.found.append(TensorSpec(f"{name}.weight", shape, layout, dtype))

    def _linear(
        self,
        name: str,
        shape: tuple[int, ...],
        bias: bool,
        layout: Layout = "panel",
        quantize: bool = True,
    ) -> None:
        self._matrix(name, shape, layout, quantize)
        if bias:
            self._vector(f"{name}.bias", *shape[:-1])
