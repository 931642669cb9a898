"""layer_norm on the device: launches of ``csrc/cuda/norm.cu``."""

from __future__ import annotations

import torch
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.ops.cuda.check import FLOATS, THREADS, WARP, alignment, ceil_div, check, check_device
from pyruntime.ops.cuda.kernels import kernels_of

EPILOGUES = ("none", "gelu")


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    rows: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    epilogue: str = "none",
) -> Tensor:
    """Centred norm with a bias; see `pyruntime.ops.reference.layer_norm`.

    ``rows`` are not checked, reporting one that x does not have would mean waiting for the device;
    a row of -1 (those of a plan beyond its count) is left unspecified.
    """
    check("layer_norm", "x", x, tuple(FLOATS), (-1, -1))
    count, width = x.shape
    check("layer_norm", "weight", weight, (torch.float32,), (width,))
    check("layer_norm", "bias", bias, (torch.float32,), (width,))
    if rows is not None:
        check("layer_norm", "rows", rows, (torch.int32,), (-1,))
        count = rows.shape[0]
    check_device("layer_norm", x, weight=weight, bias=bias, rows=rows)
    to = out_dtype or x.dtype
    if to not in FLOATS or epilogue not in EPILOGUES:
        raise InvalidInput(
            f"layer_norm: out_dtype must be one of {list(FLOATS)} and epilogue one of {EPILOGUES}, "
            f"got {to} and {epilogue!r}"
        )
    out = torch.empty(count, width, dtype=to, device=x.device)
    if count and width:
        vector = 8 if width % 8 == 0 and alignment(16, x, weight, bias, out) == 16 else 1
        kernels_of(x.device.index).launch(
            f"layer_norm_{FLOATS[x.dtype]}_v{vector}",
            (ceil_div(count, THREADS // WARP), 1),
            (THREADS, 1),
            x.data_ptr(),
            0 if rows is None else rows.data_ptr(),
            *(weight.data_ptr(), bias.data_ptr(), out.data_ptr()),
            *(width, count, epilogue == "gelu", to is torch.float32, eps),
        )
    return out
