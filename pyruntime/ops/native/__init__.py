"""The native CPU ops: check, allocate, and hand addresses to ``pyruntime._cpu``.

Same names, signatures and meaning as `pyruntime.ops.reference`.
"""

from __future__ import annotations

from pyruntime.ops.native.attention import append, attention, rotate
from pyruntime.ops.native.binding import isa
from pyruntime.ops.native.compute import segment_matmul
from pyruntime.ops.native.embed import embed_patches, gather_patches
from pyruntime.ops.native.exit import plan_exit
from pyruntime.ops.native.move import combine, compact, gather
from pyruntime.ops.native.norm import gate, layer_norm, rms_norm
from pyruntime.ops.native.patches import patches
from pyruntime.ops.native.plan import plan_partition, plan_threshold, plan_topk, quantile
from pyruntime.ops.native.varlen import attention_varlen

__all__ = [
    "append",
    "attention",
    "attention_varlen",
    "combine",
    "compact",
    "embed_patches",
    "gate",
    "gather",
    "gather_patches",
    "isa",
    "layer_norm",
    "patches",
    "plan_exit",
    "plan_partition",
    "plan_threshold",
    "plan_topk",
    "quantile",
    "rms_norm",
    "rotate",
    "segment_matmul",
]
