"""What a conversion did."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyruntime.format.spec import DecoderSpec, GateSpec, ModelSpec, VisionSpec


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did, or with `dry_run` would do. Sizes are bytes, time is seconds."""

    source: Path
    destination: Path
    spec: ModelSpec
    gates: GateSpec | None
    tensors: int
    bytes: int
    shards: int
    resumed: int
    seconds: float
    dry_run: bool
    notes: tuple[str, ...]

    def __str__(self) -> str:
        done = "would convert" if self.dry_run else "converted"
        spec = self.spec
        gated = f" with {self.gates.gate_type} gates" if self.gates else ""
        if isinstance(spec, VisionSpec) and spec.exits:
            gated = f" with {len(spec.exits)} exits by {spec.exits[0].criterion}"
        elif isinstance(spec, VisionSpec) and spec.scales is not None:
            gated = f" with {len(spec.scales.ratios) + 1} scales"
        elif isinstance(spec, VisionSpec) and spec.reduction is not None:
            gated = f" with token reduction by {spec.reduction.method}"
        stored = (isinstance(spec, DecoderSpec) and spec.quantization) or spec.dtype
        resumed = f", {self.resumed} of them from an earlier run" if self.resumed else ""
        first = (
            f"{done} {self.source} ({self.spec.source_family}{gated}, {stored}) to "
            f"{self.destination}: {self.tensors} tensors, {self.bytes / 1e6:.1f} MB in "
            f"{self.shards} shards{resumed}, {self.seconds:.1f} s"
        )
        return "\n".join([first, *(f"note: {note}" for note in self.notes)])
