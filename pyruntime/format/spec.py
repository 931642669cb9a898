"""What a model is: its shapes, its gates, and the exact list of tensors a folder must hold.

A leaf module: models, engine and profile build from these records without importing the loader.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pyruntime.errors import FormatError

Layout = Literal["plain", "panel", "gate_up"]
PANEL = 32  # output columns per panel; a gate_up panel is half gate, half up
DTYPE_BYTES: Mapping[str, int] = types.MappingProxyType({"bfloat16": 2, "float32": 4})
ROPE_SCALING_KEYS: Mapping[str, frozenset[str]] = types.MappingProxyType({
    "linear": frozenset({"rope_type", "factor"}),
    "llama3": frozenset({
        "rope_type", "factor", "low_freq_factor", "high_freq_factor",
        "original_max_position_embeddings",
    }),
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A pre-norm decoder of the Llama line. `rope_scaling` keeps Hugging Face's key names.

    `rope_scaling` is None, {"rope_type": "linear", "factor"} or {"rope_type": "llama3", "factor",
    "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}.
    """

    source_family: Literal["llama", "qwen2", "qwen3"]
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


@dataclass(frozen=True, slots=True)
class GateSpec:
    """GateSkip gates. `skip_ratio` in [0, 1] and `rule` are the defaults of a request."""

    kind: Literal["gateskip"]
    gate_type: Literal["scalar", "vector", "mlp"]
    mlp_scalar: bool
    shared: bool
    gating_mode: Literal["after_module", "before_module"]
    actually_gate: bool
    gate_attention: bool
    gate_mlp: bool
    rule: Literal["calibrated", "batch_quantile", "seq_quantile", "exact_k"]
    skip_ratio: float
    kv_mode: Literal["dense", "copy"]

    def __post_init__(self) -> None:
        if self.mlp_scalar and self.gate_type != "mlp":
            raise FormatError(f"gates: mlp_scalar needs gate_type 'mlp', not {self.gate_type!r}")
        if not (self.gate_attention or self.gate_mlp):
            raise FormatError("gates: neither gate_attention nor gate_mlp is true")
        if not 0 <= self.skip_ratio <= 1:
            raise FormatError(f"gates: skip_ratio must be in [0, 1], is {self.skip_ratio}")

    @property
    def branches(self) -> tuple[str, ...]:
        """The gated branches, "attn" before "mlp"."""
        gated = {"attn": self.gate_attention, "mlp": self.gate_mlp}
        return tuple(branch for branch, on in gated.items() if on)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a folder: logical `shape`, and how its numbers lie in the file."""

    name: str
    shape: tuple[int, ...]
    layout: Layout
    dtype: Literal["bfloat16", "float32"]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in the safetensors file: padded panels for matrices, else the logical one."""
        if self.layout == "plain":
            return self.shape
        rows, columns = self.shape
        half = PANEL // 2
        panels = -(-(rows // 2) // half) if self.layout == "gate_up" else -(-rows // PANEL)
        if self.dtype == "bfloat16":
            return (1, panels, -(-columns // 2), PANEL, 2)
        return (1, panels, columns, PANEL)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        size = DTYPE_BYTES[self.dtype]
        for extent in self.stored_shape:
            size *= extent
        return size


def rope_scaling_problems(scaling: Mapping[str, Any]) -> list[str]:
    """Why the runtime cannot apply this scaling; empty when it can."""
    kind = scaling.get("rope_type")
    if not isinstance(kind, str) or kind not in ROPE_SCALING_KEYS:
        known = ", ".join(sorted(ROPE_SCALING_KEYS))
        return [f"rope scaling type {kind!r} is not implemented (implemented: default, {known})"]
    problems = [f"rope scaling {kind} lacks {key}"
                for key in sorted(ROPE_SCALING_KEYS[kind] - scaling.keys())]  # fmt: skip
    for key, value in scaling.items():
        if key == "rope_type":
            continue
        if not (_fits(value, float) and value > 0):
            problems.append(f"rope scaling {key} must be a positive number, is {value!r}")
    return problems


def decoder_tensors(spec: DecoderSpec, gates: GateSpec | None) -> list[TensorSpec]:
    """Every tensor a folder of this model holds, no more and no less, in file order.

    Norm weights and biases are float32; matrices are in the model dtype. `kv` rows are the keys
    then the values; `gate_up` rows are the gate then the up projection, in the bias too.
    """
    d, inter = spec.hidden_size, spec.intermediate_size
    q_rows, kv_rows = spec.num_heads * spec.head_dim, 2 * spec.num_kv_heads * spec.head_dim
    found: list[TensorSpec] = []

    def matrix(name: str, rows: int, columns: int, layout: Layout = "panel") -> None:
        found.append(TensorSpec(f"{name}.weight", (rows, columns), layout, spec.dtype))

    def vector(name: str, size: int) -> None:
        found.append(TensorSpec(name, (size,), "plain", "float32"))

    def linear(name: str, rows: int, columns: int, bias: bool, layout: Layout = "panel") -> None:
        matrix(name, rows, columns, layout)
        if bias:
            vector(f"{name}.bias", rows)

    def gate(prefix: str, kind: GateSpec) -> None:
        if kind.gate_type == "mlp":
            linear(f"{prefix}.up", 2 * d, d, bias=True)
            linear(f"{prefix}.down", 1 if kind.mlp_scalar else d, 2 * d, bias=True)
        elif kind.gate_type == "vector":
            linear(prefix, d, d, bias=True)
        else:
            found.append(TensorSpec(f"{prefix}.weight", (1, d), "plain", "float32"))
            vector(f"{prefix}.bias", 1)

    # A tied embedding serves the lookup and the head; only the head needs panels.
    matrix("embed", spec.vocab_size, d, "panel" if spec.tie_embeddings else "plain")
    for i in range(spec.num_layers):
        attn, mlp = f"layers.{i}.attn", f"layers.{i}.mlp"
        vector(f"{attn}.norm.weight", d)
        linear(f"{attn}.q", q_rows, d, spec.qkv_bias)
        linear(f"{attn}.kv", kv_rows, d, spec.qkv_bias)
        linear(f"{attn}.o", d, q_rows, spec.o_bias)
        if spec.qk_norm:
            vector(f"{attn}.q_norm.weight", spec.head_dim)
            vector(f"{attn}.k_norm.weight", spec.head_dim)
        vector(f"{mlp}.norm.weight", d)
        linear(f"{mlp}.gate_up", 2 * inter, d, spec.mlp_bias, layout="gate_up")
        linear(f"{mlp}.down", d, inter, spec.mlp_bias)
        if gates is not None and not gates.shared:
            for branch in gates.branches:
                gate(f"layers.{i}.{branch}.gate", gates)
    if gates is not None and gates.shared:
        for branch in gates.branches:
            gate(f"gates.{branch}", gates)
    vector("norm.weight", d)
    if not spec.tie_embeddings:
        matrix("lm_head", spec.vocab_size, d)
    return found


Record = TypeVar("Record", DecoderSpec, GateSpec)


def to_dict(record: DecoderSpec | GateSpec) -> dict[str, Any]:
    """Plain JSON types, one key per field."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(record).items()
    }


def from_dict(kind: type[Record], data: object, where: str) -> Record:
    """Inverse of `to_dict`. Unknown keys, missing keys and wrong types are one FormatError."""
    if not isinstance(data, dict):
        raise FormatError(f"{where}: expected an object, is {type(data).__name__}")
    hints = typing.get_type_hints(kind)
    problems = [f"unknown key {key!r}" for key in sorted(data.keys() - hints.keys())]
    problems += [f"missing key {key!r}" for key in hints if key not in data]
    values: dict[str, Any] = {}
    for key, hint in hints.items():
        if key not in data:
            continue
        value = data[key]
        values[key] = tuple(value) if isinstance(value, list) else value
        if not _fits(values[key], hint):
            problems.append(f"{key} must be {_words(hint)}, is {value!r}")
    if problems:
        raise FormatError(f"{where}: " + "; ".join(problems))
    try:
        return kind(**values)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None


def _fits(value: object, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in args and not isinstance(value, bool)
    if origin is types.UnionType:
        return any(_fits(value, arg) for arg in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint is types.NoneType:
        return value is None
    if hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and math.isfinite(value)  # type: ignore[arg-type]
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) else str(hint)
