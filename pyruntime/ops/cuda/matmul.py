"""segment_matmul on the device: our kernels for small and ragged segments, torch's for large."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pyruntime.errors import InvalidInput
from pyruntime.ops.cuda import move
from pyruntime.ops.cuda.check import (
    FLOATS,
    THREADS,
    alignment,
    ceil_div,
    check,
    check_device,
    refuse,
    result,
)
from pyruntime.ops.cuda.kernels import kernels_of
from pyruntime.ops.reference.compute import activate
from pyruntime.ops.weight import PAIRED, Weight
from pyruntime.plan import Plan

EPILOGUES = {"none": 0, "gelu": 1, "silu": 2, "relu": 3, "silu_mul": 4, "swiglu_oai": 5}
SMALL_ROWS = 16  # one mma tile: each weight is read once
TILE_64_ROWS = 64
GROUPED_ROWS = 256  # the ridge of an H200: more rows a segment are bound by arithmetic
WIDE = 8192  # weight rows from which 32 a block still fill the device
MAX_GRID_Y = 65_535


def choose_kernel(x: Tensor, weight: Weight, capacity: int, planned: bool) -> str:
    """What multiplies: the suffix of a kernel of ours, "linear" (cuBLAS) or "grouped" (torch).

    Chosen by ``capacity / S``, the host's estimate of the rows a segment has; every choice is right
    for every count. The bounds come from the limits of performance alone and wait for measurement.

    ============  ===================================================================
    linear        no plan (every row runs) and more than 16 rows
    simt_*        float32, or a K or address that 16-byte loads cannot take
    small_*       <= 16 rows: bound by reading each weight once
    grouped       >= 256 rows and sm_90: torch's kernel uses wgmma, ours mma.sync
    tile_64       <= 64 rows
    tile_128      the rest
    ============  ===================================================================
    """
    rows = ceil_div(capacity, weight.segments)
    if rows > SMALL_ROWS and not planned:
        return "linear"
    loads = weight.in_features % 8 == 0 and alignment(16, x, weight.data) == 16
    if x.dtype is torch.float32 or not loads:
        return f"simt_{FLOATS[x.dtype]}"
    if rows <= SMALL_ROWS:
        return "small_32" if weight.out_features >= WIDE else "small_16"
    grouped = weight.out_features % 8 == 0 and hasattr(functional, "grouped_mm")
    if rows >= GROUPED_ROWS and grouped and torch.cuda.get_device_capability(x.device)[0] == 9:
        return "grouped"
    return "tile_64" if rows <= TILE_64_ROWS else "tile_128"


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
    """Grouped matmul [capacity, N]; see `pyruntime.ops.reference.segment_matmul`.

    ``weight`` has layout "dense" [S, N, K]; for an epilogue of a pair gate rows, then up rows.
    What runs is chosen by `choose_kernel`. torch's matmuls round to bfloat16 before the epilogue,
    our kernels round once, after it.
    """
    if accumulate:  # a pass of its own; no kernel adds to what is there
        if out is None:
            raise InvalidInput("segment_matmul: accumulate needs out, got None")
        y = segment_matmul(
            x, weight, plan, gather=gather, epilogue=epilogue, bias=bias, out_dtype=torch.float32,
            alpha=alpha, limit=limit,
        )  # fmt: skip
        return result("segment_matmul", x, out, out_dtype or out.dtype, *y.shape).copy_(y.add_(out))
    capacity = _check(x, weight, plan, gather, epilogue, bias)
    to = out_dtype or (x.dtype if out is None else out.dtype)
    if to not in FLOATS:
        raise InvalidInput(f"segment_matmul: out_dtype must be one of {list(FLOATS)}, got {to}")
    columns = weight.out_features // 2 if epilogue in PAIRED else weight.out_features
    out = result("segment_matmul", x, out, to, capacity, columns)
    if capacity == 0 or columns == 0:
        return out
    form = choose_kernel(x, weight, capacity, planned=plan is not None)
    if form == "linear" or (form == "grouped" and plan is not None):
        if plan is None:
            product = functional.linear(x, weight.data[0])
        else:
            packed = move.gather(x, plan) if gather else x
            matrices = weight.data.transpose(1, 2)
            product = functional.grouped_mm(packed, matrices, offs=plan.offsets[1:])
        return out.copy_(activate(_biased(product, bias, plan), epilogue, alpha, limit))
    grid, shared = _launch_shape(form, weight, capacity, columns)
    kernels_of(x.device.index).launch(
        f"segment_matmul_{form}",
        grid,
        (THREADS, 1),
        x.data_ptr(),
        weight.data.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        plan.rows.data_ptr() if plan is not None and gather else 0,
        0 if plan is None else plan.offsets.data_ptr(),
        out.data_ptr(),
        *(capacity, weight.segments, weight.out_features, weight.in_features),
        *(EPILOGUES[epilogue], int(to is torch.float32), alpha, limit),
        shared=shared,
    )
    return out


def _check(
    x: Tensor,
    weight: Weight,
    plan: Plan | None,
    gather: bool,
    epilogue: str,
    bias: Tensor | None,
) -> int:
    """Refuse what the kernels cannot run; returns the capacity."""
    op, segments, width = "segment_matmul", weight.segments, weight.out_features
    check(op, "x", x, tuple(FLOATS), (-1, -1))
    if weight.layout != "dense":
        raise InvalidInput(f"{op}: CUDA weights must have layout dense, got {weight.layout}")
    check(op, "weight", weight.data, (x.dtype,), (segments, width, x.shape[1]))
    if epilogue not in EPILOGUES or (epilogue in PAIRED) != weight.interleaved:
        raise InvalidInput(
            f"{op}: epilogue must be one of {sorted(EPILOGUES)}, one of {PAIRED} exactly for pairs "
            f"of gate and up, got {epilogue!r} with interleaved={weight.interleaved}"
        )
    if bias is not None:
        check(op, "bias", bias, (torch.float32,), (-1,) * bias.dim())
        if bias.numel() != segments * width:
            raise refuse(op, "bias", f"[{segments}, {width}]", bias)
    check_device(op, x, weight=weight.data, bias=bias)
    if plan is None:
        if segments != 1 or gather:
            raise InvalidInput(f"{op}: {segments} matrices with gather={gather} need a plan")
        return x.shape[0]
    check_device(op, x, plan=plan.rows)
    capacity = plan.rows.shape[0]
    if x.shape[0] != (plan.num_rows if gather else capacity):
        raise refuse(op, "x", f"[{plan.num_rows if gather else capacity}, K]", x)
    if plan.num_segments != segments:
        raise InvalidInput(
            f"{op}: the plan has {plan.num_segments} segments, the weight {segments} matrices"
        )
    return capacity


def _launch_shape(
    form: str, weight: Weight, capacity: int, columns: int
) -> tuple[tuple[int, int], int]:
    """Grid and dynamic shared memory of a kernel of segment_matmul.cu."""
    kind, _, size = form.partition("_")
    if kind == "small":
        grid, shared = (ceil_div(weight.out_features, int(size)), weight.segments), 0
    else:
        side = int(size) if kind == "tile" else 64
        across = ceil_div(weight.out_features, 128) if kind == "tile" else ceil_div(columns, 64)
        # Every segment may end in a tile that is not full.
        grid = (capacity // side + min(weight.segments, capacity), across)
        shared = 3 * (side + 128) * 128 if kind == "tile" else 0  # stages of 64 bfloat16 columns
    if grid[1] > MAX_GRID_Y:
        raise InvalidInput(f"segment_matmul: {form} cannot launch a grid of {list(grid)} blocks")
    return grid, shared


def _biased(product: Tensor, bias: Tensor | None, plan: Plan | None) -> Tensor:
    """A product [rows, N] that torch made, in float32, plus its segments' bias."""
    value = product.float()
    if bias is None:
        return value
    bias = bias.view(-1, product.shape[1])
    if plan is not None:
        packed = torch.arange(len(product), device=product.device, dtype=torch.int32)
        segment = torch.searchsorted(plan.offsets[1:], packed, right=True)
        bias = bias[segment.clamp_(max=len(bias) - 1)]
    return value + bias
