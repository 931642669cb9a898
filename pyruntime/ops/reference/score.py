"""Router scores in single float32 operations, each rounded once and none fused.

`plan_topk` compares scores, so that a last bit can decide which expert runs. Every backend computes
these very operations in this very order: equal logits are equal plans on every machine, where the
exponentials of torch, of the C library and of CUDA are three.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LANES = 32  # partial sums of a softmax: a warp, or two vectors of AVX-512
_EXP = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)  # Cephes, expf
_ATANH = tuple(1.0 / n for n in range(15, 2, -2))
_SPLIT = 1.4140625  # near the root of 2: log of a part is small on either side
_ROUND = 12582912.0  # 1.5 * 2^23: the sum has no room for a fraction


def score(kind: str, logits: Tensor) -> Tensor:
    """Scores of ``logits`` float32 [N, S] without NaN; ``kind`` as `TopK.score` names it."""
    if kind == "softmax":
        return softmax(logits)
    if kind == "sigmoid":
        return 1.0 / (1.0 + exp(-logits))
    if kind == "sqrt_softplus":
        softplus = logits.clamp(min=0.0) + _log1p(exp(-logits.abs()))
        return softplus.double().sqrt().float()  # MKL's float32 root is not the rounded one
    return logits


def softmax(logits: Tensor) -> Tensor:
    """Softmax of float32 [N, S] over S; infinite logits share all of it."""
    values = exp(below_largest(logits))
    return values / lane_sum(values)


def below_largest(logits: Tensor) -> Tensor:
    """``logits`` minus the largest of the row, which is 0 even when it is infinite."""
    largest = logits.amax(1, keepdim=True)
    return torch.where(logits == largest, 0.0, logits - largest)


def exp(x: Tensor) -> Tensor:
    """e^x to 2 ulp; exactly 0 below -87, e^88 above 88; x is no NaN."""
    clamped = x.clamp(-88.0, 88.0)
    n = (clamped * 1.44269504088896341 + _ROUND) - _ROUND
    r = clamped - n * 0.693359375
    r = r - n * -2.12194440e-4
    p = torch.full_like(r, _EXP[0])
    for coefficient in _EXP[1:]:
        p = p * r + coefficient
    p = p * (r * r) + r + 1.0
    scaled = (p.view(torch.int32) + (n.int() << 23)).view(torch.float32)
    return torch.where(x < -87.0, 0.0, scaled)


def lane_sum(x: Tensor) -> Tensor:
    """Sum of float32 [N, S] over S, [N, 1]: lane l adds l, l + 32, …; then halves fold."""
    steps = F.pad(x, (0, -x.shape[1] % LANES)).split(LANES, dim=1)
    total = torch.zeros_like(steps[0])
    for step in steps:
        total = total + step
    while total.shape[1] > 1:
        low, high = total.chunk(2, dim=1)
        total = low + high
    return total


def _log1p(u: Tensor) -> Tensor:
    """log(1 + u) of u in [0, 1]."""
    return _twice_atanh(u / (2.0 + u))


def log(x: Tensor) -> Tensor:
    """Natural logarithm of finite x >= 1 to 2 ulp."""
    exponent = (x.view(torch.int32) >> 23) - 127
    part = (x.view(torch.int32) - (exponent << 23)).view(torch.float32)  # in [1, 2)
    high = part > _SPLIT
    part = torch.where(high, part * 0.5, part)
    n = (exponent + high.int()).float()
    p = _twice_atanh((part - 1.0) / (part + 1.0)) + n * -2.12194440e-4
    return p + n * 0.693359375


def _twice_atanh(w: Tensor) -> Tensor:
    """2 atanh(w) of |w| <= 1/3."""
    q = w * w
    p = torch.full_like(q, _ATANH[0])
    for coefficient in (*_ATANH[1:], 1.0):
        p = p * q + coefficient
    return (w + w) * p
