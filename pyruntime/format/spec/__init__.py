"""What a model is: its shapes, its gates, and the exact list of tensors a folder must hold.

A leaf package of plain records: models, engine and profile build from them without importing the
loader.
"""

from __future__ import annotations

from pyruntime.format.spec.decoder import DecoderSpec, LatentSpec
from pyruntime.format.spec.encoder import EncoderSpec, encoder_tensors
from pyruntime.format.spec.experts import ExpertSpec, RouterSpec
from pyruntime.format.spec.gates import GateSpec
from pyruntime.format.spec.model import FAMILIES, ModelSpec, family_of, model_tensors
from pyruntime.format.spec.record import from_dict, to_dict
from pyruntime.format.spec.reduction import ReductionSpec
from pyruntime.format.spec.rope import ROPE_SCALING_KEYS, rope_scaling_problems
from pyruntime.format.spec.scales import ScaleGateSpec, ScaleSpec
from pyruntime.format.spec.tensors import PANEL, STORED_DTYPES, TensorSpec, decoder_tensors
from pyruntime.format.spec.vision import ExitSpec, Preprocess, VisionSpec, WidthSpec
from pyruntime.format.spec.vision_tensors import vision_tensors

__all__ = [
    "FAMILIES",
    "PANEL",
    "ROPE_SCALING_KEYS",
    "STORED_DTYPES",
    "DecoderSpec",
    "EncoderSpec",
    "ExitSpec",
    "ExpertSpec",
    "GateSpec",
    "LatentSpec",
    "ModelSpec",
    "Preprocess",
    "ReductionSpec",
    "RouterSpec",
    "ScaleGateSpec",
    "ScaleSpec",
    "TensorSpec",
    "VisionSpec",
    "WidthSpec",
    "decoder_tensors",
    "encoder_tensors",
    "family_of",
    "from_dict",
    "model_tensors",
    "rope_scaling_problems",
    "to_dict",
    "vision_tensors",
]
