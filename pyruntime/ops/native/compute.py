"""Matmul."""

from __future__ import annotations

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.ops.native.binding import CODES, F32, check, check_float, check_out, cpu, refuse
from pyruntime.ops.weight import PAIRED, Weight
from pyruntime.plan import Plan

# Epilogue of csrc/ops.h
_EPILOGUES = {"none": 0, "gelu": 1, "silu": 2, "relu": 3, "silu_mul": 4, "swiglu_oai": 5}


def segment_matmul(
    x: Tensor,
    weight: Weight,
    plan: Plan | None = None,
    *,
    gather: bool = False,
    epilogue: str = "none",
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    alpha: float = 1.702,
    limit: float = 7.0,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """Grouped matmul; see `pyruntime.ops.reference.segment_matmul`."""
    code = check_float("segment_matmul", "x", x, 2)
    data = weight.data
    quantized = data.dtype is torch.int8
    if (
        (data.dtype is not x.dtype and not quantized)
        or x.shape[1] != weight.in_features
        or weight.layout != "panel"
        or not data.is_contiguous()
    ):
        raise InvalidInput(
            f"segment_matmul: x {x.dtype} {list(x.shape)} needs contiguous panels of that dtype "
            f"or int8 with K={x.shape[1]}, got {weight.layout} {data.dtype} K={weight.in_features}"
        )
    mode = _EPILOGUES.get(epilogue)
    paired = epilogue in PAIRED
    if mode is None or paired != weight.interleaved:
        raise InvalidInput(
            f"segment_matmul: epilogue must be one of {sorted(_EPILOGUES)}, one of {PAIRED} "
            f"exactly for interleaved weights, got {epilogue!r} with "
            f"interleaved={weight.interleaved}"
        )
    rows = offsets = 0
    kept = x.shape[0]
    if plan is not None:
        if gather and kept != plan.num_rows:
            raise refuse("segment_matmul", "x", f"[{plan.num_rows}, K] to gather from", x)
        if not gather and kept != plan.rows.shape[0]:
            raise refuse("segment_matmul", "x", f"[{plan.rows.shape[0]}, K] packed rows", x)
        if plan.num_segments != weight.segments:
            raise InvalidInput(
                f"segment_matmul: the plan has {plan.num_segments} segments, the weight "
                f"{weight.segments}"
            )
        offsets = plan.offsets.data_ptr()
        if gather:
            kept = plan.rows.shape[0]
            rows = plan.rows.data_ptr()
    elif weight.segments != 1:
        raise InvalidInput(f"segment_matmul: {weight.segments} matrices need a plan")
    width = weight.out_features // 2 if paired else weight.out_features
    to = out_dtype or (x.dtype if out is None else out.dtype)
    if to not in CODES:
        raise InvalidInput(f"segment_matmul: out_dtype must be float32 or bfloat16, got {to}")
    if out is None:
        if accumulate:
            raise InvalidInput("segment_matmul: accumulate needs out, got None")
        out = torch.empty(kept, width, dtype=to)
    else:
        check_out("segment_matmul", out, to, kept, width)
    scale_address = bias_address = 0
    if quantized:
        scale = weight.scale
        if scale is None:
            raise InvalidInput("segment_matmul: int8 weights need a scale, got None")
        check("segment_matmul", "scale", scale, F32, 2)
        if scale.shape != (weight.segments, weight.out_features):
            raise refuse(
                "segment_matmul", "scale", f"[{weight.segments}, {weight.out_features}]", scale
            )
        scale_address = scale.data_ptr()
    if bias is not None:
        check("segment_matmul", "bias", bias, F32, bias.dim())
        if bias.numel() != weight.segments * weight.out_features:
            raise refuse(
                "segment_matmul", "bias", f"[{weight.segments}, {weight.out_features}]", bias
            )
        bias_address = bias.data_ptr()
    if kept:
        cpu.segment_matmul(
            x.data_ptr(),
            data.data_ptr(),
            scale_address,
            bias_address,
            out.data_ptr(),
            rows,
            offsets,
            weight.segments,
            kept,
            weight.in_features,
            weight.out_features,
            code,
            2 if quantized else code,
            CODES[to],
            mode,
            alpha,
            limit,
            accumulate,
        )
    return out
