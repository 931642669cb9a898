"""The native CPU ops: checks, allocates, and hands addresses to ``pyruntime._cpu``.

This module is the only caller of the binding. The checks are plain attribute comparisons so that a
checked call costs a few microseconds; what they refuse is reported by the slow path `_refuse`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyruntime import _cpu
from pyruntime.errors import InvalidInput
from pyruntime.ops.weight import Weight
from pyruntime.plan import Plan

_CODES = {torch.float32: 0, torch.bfloat16: 1}
_EPILOGUES = {"none": 0, "gelu": 1, "silu": 2, "silu_mul": 3}
_F32 = torch.float32
_I32 = torch.int32
_ONE = Plan.all(1)
_NONE_OF_ONE = Plan(
    torch.empty(0, dtype=_I32),
    torch.zeros(2, dtype=_I32),
    None,
    torch.full((1, 1), -1, dtype=_I32),
    1,
    0,
)
_NO_WEIGHTS = torch.empty(0, dtype=_F32)


def isa() -> str:
    """Instruction set the kernels run with; raises InvalidInput for a bad PYRUNTIME_CPU_ISA."""
    try:
        return str(_cpu.isa())
    except ValueError as error:
        raise InvalidInput(str(error)) from None


def _refuse(op: str, name: str, expected: str, actual: Tensor) -> InvalidInput:
    kind = "contiguous" if actual.is_contiguous() else "strided"
    return InvalidInput(
        f"{op}: {name} must be {expected}, got {kind} {actual.dtype} {list(actual.shape)} "
        f"on {actual.device}"
    )


def _check(op: str, name: str, tensor: Tensor, dtype: torch.dtype, dims: int) -> None:
    if (
        tensor.dtype is not dtype
        or tensor.dim() != dims
        or not tensor.is_contiguous()
        or not tensor.is_cpu
    ):
        raise _refuse(op, name, f"a contiguous CPU {dtype} tensor of rank {dims}", tensor)


def _check_float(op: str, name: str, tensor: Tensor, dims: int) -> int:
    code = _CODES.get(tensor.dtype)
    if code is None or tensor.dim() != dims or not tensor.is_contiguous() or not tensor.is_cpu:
        expected = f"a contiguous CPU float32 or bfloat16 tensor of rank {dims}"
        raise _refuse(op, name, expected, tensor)
    return code


# ---- planners ------------------------------------------------------------------------------------


def plan_threshold(scores: Tensor, tau: Tensor, weighted: bool = False) -> Plan:
    """Keep row n unless ``scores[n] <= tau``; see `pyruntime.ops.reference.plan_threshold`."""
    _check("plan_threshold", "scores", scores, _F32, 1)
    count = scores.shape[0]
    single = tau.dim() == 0
    _check("plan_threshold", "tau", tau, _F32, 0 if single else 1)
    if not single and tau.shape[0] != count:
        raise InvalidInput(f"plan_threshold: tau has {tau.shape[0]} rows, scores {count}")
    if count == 1:
        # Decoding one sequence: the answer is yes or no, and both plans exist already.
        plan = _NONE_OF_ONE if scores.item() <= tau.item() else _ONE
        if not weighted:
            return plan
        weights = scores if plan is _ONE else _NO_WEIGHTS
        return Plan(plan.rows, plan.offsets, weights, plan.inverse, 1, plan.capacity)
    rows = torch.empty(count, dtype=_I32)
    offsets = torch.empty(2, dtype=_I32)
    inverse = torch.empty(count, 1, dtype=_I32)
    weights = torch.empty(count, dtype=_F32) if weighted else None
    kept = _cpu.plan_threshold(
        scores.data_ptr(),
        tau.data_ptr(),
        0 if single else 1,
        count,
        rows.data_ptr(),
        offsets.data_ptr(),
        inverse.data_ptr(),
        0 if weights is None else weights.data_ptr(),
    )
    if kept != count:
        rows.resize_(kept)  # shrinks in place: cheaper than a view, and this code runs per token
        if weights is not None:
            weights.resize_(kept)
    return Plan(rows, offsets, weights, inverse, count, kept)


def plan_topk(scores: Tensor, k: int, renormalize: bool = False) -> Plan:
    """The k best segments of every row; see `pyruntime.ops.reference.plan_topk`."""
    _check("plan_topk", "scores", scores, _F32, 2)
    count, experts = scores.shape
    if not 1 <= k <= experts:
        raise InvalidInput(f"plan_topk: k must lie in [1, {experts}], got {k}")
    rows = torch.empty(count * k, dtype=_I32)
    offsets = torch.empty(experts + 1, dtype=_I32)
    weights = torch.empty(count * k, dtype=_F32)
    inverse = torch.empty(count, k, dtype=_I32)
    _cpu.plan_topk(
        scores.data_ptr(),
        count,
        experts,
        k,
        renormalize,
        rows.data_ptr(),
        offsets.data_ptr(),
        weights.data_ptr(),
        inverse.data_ptr(),
    )
    return Plan(rows, offsets, weights, inverse, count, count * k)


def plan_partition(labels: Tensor, segments: int) -> Plan:
    """Rows grouped by label; see `pyruntime.ops.reference.plan_partition`."""
    _check("plan_partition", "labels", labels, _I32, 1)
    count = labels.shape[0]
    rows = torch.empty(count, dtype=_I32)
    offsets = torch.empty(segments + 1, dtype=_I32)
    inverse = torch.empty(count, 1, dtype=_I32)
    kept = _cpu.plan_partition(
        labels.data_ptr(),
        count,
        segments,
        rows.data_ptr(),
        offsets.data_ptr(),
        inverse.data_ptr(),
    )
    if kept < 0:
        row = -1 - kept
        raise InvalidInput(
            f"plan_partition: label of row {row} must lie in [-1, {segments}), "
            f"got {int(labels[row])}"
        )
    return Plan(rows[:kept], offsets, None, inverse, count, kept)


def quantile(scores: Tensor, q: float) -> Tensor:
    """Linearly interpolated quantile; see `pyruntime.ops.reference.quantile`."""
    _check("quantile", "scores", scores, _F32, 1)
    if not 0.0 <= q <= 1.0 or scores.shape[0] == 0:
        raise InvalidInput(
            f"quantile: needs q in [0, 1] and at least one score, got q={q} of {scores.shape[0]}"
        )
    scratch = torch.empty_like(scores)
    value = _cpu.quantile(scores.data_ptr(), scores.shape[0], q, scratch.data_ptr())
    return torch.tensor(value, dtype=_F32)


# ---- movement ------------------------------------------------------------------------------------


def gather(x: Tensor, plan: Plan) -> Tensor:
    """Source rows to packed rows; see `pyruntime.ops.reference.gather`."""
    if x.dim() != 2 or not x.is_contiguous() or not x.is_cpu or x.shape[0] != plan.num_rows:
        raise _refuse("gather", "x", f"a contiguous CPU tensor [{plan.num_rows}, H]", x)
    width = x.shape[1]
    kept = plan.rows.shape[0]
    out = torch.empty(kept, width, dtype=x.dtype)
    _cpu.gather(x.data_ptr(), plan.rows.data_ptr(), kept, width * x.itemsize, out.data_ptr())
    return out


def compact(x: Tensor, plan: Plan) -> Tensor:
    """Kept rows moved to the front of x; see `pyruntime.ops.reference.compact`."""
    if not x.is_contiguous() or not x.is_cpu or x.dim() < 1 or x.shape[0] != plan.num_rows:
        raise _refuse("compact", "x", f"a contiguous CPU tensor [{plan.num_rows}, ...]", x)
    if plan.num_segments != 1:
        raise InvalidInput(f"compact: the plan must have one segment, has {plan.num_segments}")
    kept = plan.rows.shape[0]
    if x.numel():
        row_bytes = x.numel() // x.shape[0] * x.itemsize
        _cpu.compact(x.data_ptr(), plan.rows.data_ptr(), kept, row_bytes)
    return x[:kept]


def combine(
    packed: Tensor, plan: Plan, out: Tensor, channel_weights: Tensor | None = None
) -> Tensor:
    """Packed rows added back to source rows; see `pyruntime.ops.reference.combine`."""
    code = _check_float("combine", "packed", packed, 2)
    kept, width = packed.shape
    _check("combine", "out", out, packed.dtype, 2)
    if kept != plan.rows.shape[0] or out.shape[0] != plan.num_rows or out.shape[1] != width:
        raise InvalidInput(
            f"combine: a plan of {plan.kept} of {plan.num_rows} rows needs packed "
            f"[{plan.kept}, H] and out [{plan.num_rows}, H], got {list(packed.shape)} and "
            f"{list(out.shape)}"
        )
    channel = 0
    if channel_weights is not None:
        _check("combine", "channel_weights", channel_weights, _F32, 2)
        if channel_weights.shape != out.shape:
            raise _refuse("combine", "channel_weights", f"{list(out.shape)}", channel_weights)
        channel = channel_weights.data_ptr()
    _cpu.combine(
        packed.data_ptr(),
        plan.rows.data_ptr(),
        0 if plan.weights is None else plan.weights.data_ptr(),
        plan.inverse.data_ptr(),
        plan.num_rows,
        plan.inverse.shape[1],
        kept,
        channel,
        out.data_ptr(),
        width,
        code,
    )
    return out


# ---- compute -------------------------------------------------------------------------------------


def segment_matmul(
    x: Tensor,
    weight: Weight,
    plan: Plan | None = None,
    *,
    gather: bool = False,
    epilogue: str = "none",
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Grouped matmul; see `pyruntime.ops.reference.segment_matmul`."""
    code = _check_float("segment_matmul", "x", x, 2)
    data = weight.data
    if (
        data.dtype is not x.dtype
        or x.shape[1] != weight.in_features
        or weight.layout != "panel"
        or not data.is_contiguous()
    ):
        raise InvalidInput(
            f"segment_matmul: x {x.dtype} {list(x.shape)} needs contiguous panels of that dtype "
            f"with K={x.shape[1]}, got {weight.layout} {data.dtype} K={weight.in_features}"
        )
    mode = _EPILOGUES.get(epilogue)
    if mode is None or (mode == 3) != weight.interleaved:
        raise InvalidInput(
            f"segment_matmul: epilogue must be one of {sorted(_EPILOGUES)}, silu_mul exactly for "
            f"interleaved weights, got {epilogue!r} with interleaved={weight.interleaved}"
        )
    rows = offsets = 0
    kept = x.shape[0]
    if plan is not None:
        if gather and kept != plan.num_rows:
            raise _refuse("segment_matmul", "x", f"[{plan.num_rows}, K] to gather from", x)
        if not gather and kept != plan.rows.shape[0]:
            raise _refuse("segment_matmul", "x", f"[{plan.rows.shape[0]}, K] packed rows", x)
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
    width = weight.out_features // 2 if mode == 3 else weight.out_features
    to = x.dtype if out_dtype is None else out_dtype
    if to not in _CODES:
        raise InvalidInput(f"segment_matmul: out_dtype must be float32 or bfloat16, got {to}")
    out = torch.empty(kept, width, dtype=to)
    bias_address = 0
    if bias is not None:
        _check("segment_matmul", "bias", bias, _F32, bias.dim())
        if bias.numel() != weight.segments * weight.out_features:
            raise _refuse(
                "segment_matmul", "bias", f"[{weight.segments}, {weight.out_features}]", bias
            )
        bias_address = bias.data_ptr()
    if kept:
        _cpu.segment_matmul(
            x.data_ptr(),
            data.data_ptr(),
            bias_address,
            out.data_ptr(),
            rows,
            offsets,
            weight.segments,
            kept,
            weight.in_features,
            weight.out_features,
            code,
            _CODES[to],
            mode,
        )
    return out


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, probe: Tensor | None = None, probe_bias: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """RMS norm and a scalar gate on it; see `pyruntime.ops.reference.rms_norm`."""
    code = _check_float("rms_norm", "x", x, 2)
    rows, width = x.shape
    _check("rms_norm", "weight", weight, _F32, 1)
    if weight.shape[0] != width:
        raise _refuse("rms_norm", "weight", f"[{width}]", weight)
    out = torch.empty_like(x)
    scores = None
    if probe is not None:
        _check("rms_norm", "probe", probe, _F32, 1)
        if probe.shape[0] != width:
            raise _refuse("rms_norm", "probe", f"[{width}]", probe)
        scores = torch.empty(rows, dtype=_F32)
    _cpu.rms_norm(
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


def gate(logits: Tensor) -> Tensor:
    """Sigmoid in place and row means; see `pyruntime.ops.reference.gate`."""
    _check("gate", "logits", logits, _F32, 2)
    means = torch.empty(logits.shape[0], dtype=_F32)
    _cpu.gate(logits.data_ptr(), means.data_ptr(), logits.shape[0], logits.shape[1])
    return means


def rotate(
    q: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    rows: Tensor | None,
    head_dim: int,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Rotary embedding of queries in place; see `pyruntime.ops.reference.rotate`."""
    code = _check_float("rotate", "q", q, 2)
    _cpu.rotate(
        q.data_ptr(),
        cos_sin.data_ptr(),
        0 if norm is None else norm.data_ptr(),
        positions.data_ptr(),
        0 if rows is None else rows.data_ptr(),
        q.shape[0],
        q.shape[1] // head_dim,
        head_dim,
        eps,
        code,
    )
    return q


def append(
    kv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    head_dim: int,
    key_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """New keys and values into the cache; see `pyruntime.ops.reference.append`."""
    code = _check_float("append", "kv", kv, 2)
    _cpu.append(
        kv.data_ptr(),
        cos_sin.data_ptr(),
        0 if key_norm is None else key_norm.data_ptr(),
        positions.data_ptr(),
        slots.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        kv.shape[0],
        kv.shape[1] // (2 * head_dim),
        head_dim,
        eps,
        code,
    )


def attention(
    q: Tensor,
    rows: Tensor | None,
    positions: Tensor,
    sequences: Tensor,
    block_tables: Tensor,
    keys: Tensor,
    values: Tensor,
    head_dim: int,
    scale: float,
) -> Tensor:
    """Causal attention over the paged cache; see `pyruntime.ops.reference.attention`."""
    code = _check_float("attention", "q", q, 2)
    out = torch.empty_like(q)
    _cpu.attention(
        q.data_ptr(),
        0 if rows is None else rows.data_ptr(),
        positions.data_ptr(),
        sequences.data_ptr(),
        block_tables.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        out.data_ptr(),
        q.shape[0],
        q.shape[1] // head_dim,
        keys.shape[1],
        head_dim,
        block_tables.shape[1],
        scale,
        code,
    )
    return out
