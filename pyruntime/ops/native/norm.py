"""Norms and the vector gate."""

from __future__ import annotations

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.ops.native.binding import CODES, F32, I32, check, check_float, cpu, refuse


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, probe: Tensor | None = None, probe_bias: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """RMS norm and a scalar gate on it; see `pyruntime.ops.reference.rms_norm`."""
    code = check_float("rms_norm", "x", x, 2)
    rows, width = x.shape
    check("rms_norm", "weight", weight, F32, 1)
    if weight.shape[0] != width:
        raise refuse("rms_norm", "weight", f"[{width}]", weight)
    out = torch.empty_like(x)
    scores = None
    if probe is not None:
        check("rms_norm", "probe", probe, F32, 1)
        if probe.shape[0] != width:
            raise refuse("rms_norm", "probe", f"[{width}]", probe)
        scores = torch.empty(rows, dtype=F32)
    cpu.rms_norm(
        x.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        0 if probe is None else probe.data_ptr(),
        probe_bias,
        0 if scores is None else scores.data_ptr(),
        rows,
        width,
        eps,
        code,
    )
    return out, scores


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    rows: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    epilogue: str = "none",
) -> Tensor:
    """Centred norm with a bias; see `pyruntime.ops.reference.layer_norm`."""
    code = check_float("layer_norm", "x", x, 2)
    count, width = x.shape
    for name, vector in (("weight", weight), ("bias", bias)):
        check("layer_norm", name, vector, F32, 1)
        if vector.shape[0] != width:
            raise refuse("layer_norm", name, f"[{width}]", vector)
    if rows is not None:
        check("layer_norm", "rows", rows, I32, 1)
        count = rows.shape[0]
    to = out_dtype or x.dtype
    if to not in CODES:
        raise InvalidInput(f"layer_norm: out_dtype must be float32 or bfloat16, got {to}")
    if epilogue not in ("none", "gelu"):
        raise InvalidInput(f"layer_norm: epilogue must be none or gelu, got {epilogue!r}")
    out = torch.empty(count, width, dtype=to)
    cpu.layer_norm(
        x.data_ptr(),
        0 if rows is None else rows.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        out.data_ptr(),
        count,
        width,
        eps,
        code,
        CODES[to],
        epilogue == "gelu",
    )
    return out


def gate(logits: Tensor) -> Tensor:
    """Sigmoid in place and row means; see `pyruntime.ops.reference.gate`."""
    check("gate", "logits", logits, F32, 2)
    means = torch.empty(logits.shape[0], dtype=F32)
    cpu.gate(logits.data_ptr(), means.data_ptr(), logits.shape[0], logits.shape[1])
    return means
