"""Residual gates: what a GateSkip model adds to its decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pyruntime.errors import FormatError


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
