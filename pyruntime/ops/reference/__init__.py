"""The specification of every op, in a few lines of torch; runs on any device torch has.

Shapes: N source rows, R packed rows, H or K columns, S segments. Every count may be zero.
"""

from __future__ import annotations

from pyruntime.ops.reference.attention import BLOCK, append, attention, read_cache, rotate
from pyruntime.ops.reference.compute import segment_matmul
from pyruntime.ops.reference.embed import embed_patches, gather_patches
from pyruntime.ops.reference.exit import plan_exit
from pyruntime.ops.reference.move import combine, compact, gather
from pyruntime.ops.reference.norm import gate, layer_norm, rms_norm
from pyruntime.ops.reference.patches import patches
from pyruntime.ops.reference.plan import plan_partition, plan_threshold, plan_topk, quantile
from pyruntime.ops.reference.varlen import attention_varlen

__all__ = [
    "BLOCK",
    "append",
    "attention",
    "attention_varlen",
    "combine",
    "compact",
    "embed_patches",
    "gate",
    "gather",
    "gather_patches",
    "layer_norm",
    "patches",
    "plan_exit",
    "plan_partition",
    "plan_threshold",
    "plan_topk",
    "quantile",
    "read_cache",
    "rms_norm",
    "rotate",
    "segment_matmul",
]
