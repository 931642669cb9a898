"""G10: bfloat16 models rank tokens as float32 would, because the gate path is float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyruntime.gates.budget import batch_quantile
from pyruntime.gates.token_gate import TokenGate
from pyruntime.ops import Weight, native

BF16 = torch.bfloat16
TOKENS = 4096


def decisions(scores: Tensor, skip: float) -> Tensor:
    return ~(scores <= batch_quantile(native, scores, None, skip))


def agreement(a: Tensor, b: Tensor) -> float:
    """Smallest share of equal decisions over the published skip ratios."""
    return min(
        float((decisions(a, q) == decisions(b, q)).float().mean()) for q in (0.05, 0.15, 0.25, 0.5)
    )


@pytest.mark.parametrize("kind", ["vector", "scalar", "mlp", "mlp_scalar"])
def test_g10_precision(kind: str) -> None:
    """Trained-looking gates near 0.99, and the same bfloat16 input and weights on both sides."""
    d = 256
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=random) * std).to(BF16)

    h, norm = normal(TOKENS, d), torch.ones(d)
    if kind == "scalar":
        probe = normal(d, std=0.3 / d**0.5).float()
        gate = TokenGate(probe=probe, probe_bias=5.0)
    elif kind == "vector":
        weight, bias = normal(d, d, std=0.02), torch.full((d,), 5.0)
        gate = TokenGate(weight=Weight.pack(weight), bias=bias)
    else:
        rows = 1 if kind == "mlp_scalar" else d
        up, down = normal(2 * d, d, std=0.05), normal(rows, 2 * d, std=0.05)
        up_bias, bias = torch.zeros(2 * d), torch.full((rows,), 5.0)
        gate = TokenGate(
            weight=Weight.pack(down.float()), bias=bias, up=Weight.pack(up), up_bias=up_bias
        )
    x, logits = native.rms_norm(h, norm, 1e-5, gate.probe, gate.probe_bias)
    scores = gate.evaluate(native, x, logits).scores
    assert scores.dtype == torch.float32

    wide = x.double()
    if kind == "scalar":
        exact = wide @ probe.double()[:, None] + 5.0
    elif kind == "vector":
        exact = wide @ weight.double().T + 5.0
    else:
        exact = torch.relu(wide @ up.double().T) @ down.double().T + 5.0
    expected = exact.sigmoid().mean(1).float()
    assert agreement(scores, expected) > 0.999
    # The trap: the same means, rounded to bfloat16 once.
    assert agreement(scores.to(BF16).float(), expected) < 0.999
