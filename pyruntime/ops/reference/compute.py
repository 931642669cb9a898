"""Matmul and its epilogues."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.ops.reference.move import fill
from pyruntime.ops.weight import PAIRED, Weight
from pyruntime.plan import Plan


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
    """Each packed row times its segment's matrix: x @ W[s]^T + bias[s], then the epilogue.

    Args:
        x: packed rows [R, K], or source rows [N, K] with ``gather``.
        weight: S matrices [N_out, K] of x's dtype, or int8.
        plan: None for one matrix over all rows.
        gather: read row ``plan.rows[r]`` of x instead of row r.
        epilogue: none, gelu (erf), silu, relu; or of an interleaved pair, gate being the first
            half of the columns and up the second: silu_mul, ``silu(gate) * up``; swiglu_oai
            (gpt-oss), ``(up + 1) * gate * sigmoid(alpha * gate)`` of gate cut at ``limit`` from
            above and up at +-``limit``.
        bias: float32 [S, N_out], or [N_out].
        out_dtype: of the result, x's by default; accumulation is float32.
        alpha, limit: of swiglu_oai.
        out: memory for the result (mutated and returned), contiguous and apart from x.
        accumulate: the result is added to what ``out`` holds, in float32 and rounded once, instead
            of replacing it: the residual connection at no extra pass.

    Returns:
        [R, N_out], or [R, N_out / 2] for an epilogue of a pair.

    Raises:
        InvalidInput: unknown epilogue; out of another shape or dtype, or none to accumulate to.
    """
    if gather and plan is not None:
        x = x[plan.rows.long()]
    sizes = [x.shape[0]] if plan is None else plan.offsets.diff().tolist()
    matrices = weight.dense().float()
    parts = []
    for s, rows in enumerate(x.float().split(sizes)):
        y = rows @ matrices[s].T
        if bias is not None:
            y = y + bias.view(-1, weight.out_features)[s]
        parts.append(activate(y, epilogue, alpha, limit))
    result = torch.cat(parts)
    if out is None:
        if accumulate:
            raise InvalidInput("segment_matmul: accumulate needs out, got None")
        return result.to(out_dtype or x.dtype)
    if out_dtype not in (None, out.dtype):
        raise InvalidInput(f"segment_matmul: out is {out.dtype}, out_dtype {out_dtype}")
    if accumulate and out.shape == result.shape:
        result = out.float() + result
    return fill("segment_matmul", out, result, out.dtype)


def activate(y: Tensor, epilogue: str, alpha: float, limit: float) -> Tensor:
    """The epilogue of float32 [R, N]; raises InvalidInput for an unknown one."""
    if epilogue in PAIRED:
        gate, up = y.chunk(2, dim=1)
        if epilogue == "silu_mul":
            return F.silu(gate) * up
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(alpha * gate)
    if epilogue == "gelu":
        return F.gelu(y)
    if epilogue == "silu":
        return F.silu(y)
    if epilogue == "relu":
        return F.relu(y)
    if epilogue == "none":
        return y
    raise InvalidInput(f"segment_matmul: unknown epilogue {epilogue!r}")
