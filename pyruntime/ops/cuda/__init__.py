"""The CUDA ops: check, allocate, and launch the kernels of ``csrc/cuda``.

Same names and signatures as `pyruntime.ops.reference`. A plan made here never visits the host: its
``rows`` and ``weights`` have ``capacity`` entries of which the first ``offsets[S]`` count (the
others are -1 and 0), outputs have ``capacity`` rows of which those beyond are unspecified, kernels
read R themselves and nothing synchronises. Zero rows launch nothing. patches is the reference's:
torch's own kernels.
"""

from __future__ import annotations

from pyruntime.ops.cuda.embed import embed_patches, gather_patches
from pyruntime.ops.cuda.exit import plan_exit
from pyruntime.ops.cuda.matmul import choose_kernel, segment_matmul
from pyruntime.ops.cuda.move import combine, compact, gather
from pyruntime.ops.cuda.norm import layer_norm
from pyruntime.ops.cuda.plan import plan_partition, plan_threshold, plan_topk, quantile
from pyruntime.ops.cuda.varlen import attention_varlen
from pyruntime.ops.reference import patches

__all__ = [
    "attention_varlen",
    "choose_kernel",
    "combine",
    "compact",
    "embed_patches",
    "gather",
    "gather_patches",
    "layer_norm",
    "patches",
    "plan_exit",
    "plan_partition",
    "plan_threshold",
    "plan_topk",
    "quantile",
    "segment_matmul",
]
