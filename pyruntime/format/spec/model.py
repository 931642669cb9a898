"""The architectures a folder may hold."""

from __future__ import annotations

import types
from collections.abc import Mapping

from pyruntime.format.spec.decoder import DecoderSpec
from pyruntime.format.spec.encoder import EncoderSpec, encoder_tensors
from pyruntime.format.spec.gates import GateSpec
from pyruntime.format.spec.tensors import TensorSpec, decoder_tensors
from pyruntime.format.spec.vision import VisionSpec
from pyruntime.format.spec.vision_tensors import vision_tensors

ModelSpec = DecoderSpec | EncoderSpec | VisionSpec
# What runtime.json calls the family of an architecture.
FAMILIES: Mapping[str, type[ModelSpec]] = types.MappingProxyType(
    {"decoder": DecoderSpec, "encoder": EncoderSpec, "vision": VisionSpec}
)


def family_of(spec: ModelSpec) -> str:
    """ "decoder", "encoder" or "vision"."""
    return next(name for name, kind in FAMILIES.items() if isinstance(spec, kind))


def model_tensors(spec: ModelSpec, gates: GateSpec | None) -> list[TensorSpec]:
    """Every tensor a folder of this model holds, no more and no less, in file order."""
    if isinstance(spec, EncoderSpec):
        return encoder_tensors(spec)
    if isinstance(spec, VisionSpec):
        return vision_tensors(spec)
    return decoder_tensors(spec, gates)
