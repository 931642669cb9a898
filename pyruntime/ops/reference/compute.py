"""Matmul, norm and gate."""

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

    Returns:
        [R, N_out], or [R, N_out / 2] for an epilogue of a pair.

    Raises:
        InvalidInput: unknown epilogue; out of another shape or dtype.
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
    if out is None:
        return torch.cat(parts).to(out_dtype or x.dtype)
    if out_dtype not in (None, out.dtype):
        raise InvalidInput(f"segment_matmul: out is {out.dtype}, out_dtype {out_dtype}")
    return fill("segment_matmul", out, torch.cat(parts), out.dtype)


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


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, probe: Tensor | None = None, probe_bias: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """Root-mean-square norm of x [N, H], computed in float32 and rounded once.

    Args:
        weight: float32 [H].
        probe: float32 [H]: the second result is ``sigmoid(out @ probe + probe_bias)``, float32
            [N]: a scalar gate at no extra pass. It reads the rounded row, as a gate after the norm
            would.
    """
    wide = x.float()
    out = (wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + eps) * weight).to(x.dtype)
    return out, None if probe is None else torch.sigmoid(out.float() @ probe + probe_bias)


def gate(logits: Tensor) -> Tensor:
    """Sigmoid of float32 [N, H] in place (mutated); returns the mean of every row, float32 [N]."""
    return logits.sigmoid_().mean(1)
