"""G22: what is counted, against the numbers of the specification and against counting by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch

from pyruntime.format.spec import DecoderSpec, GateSpec
from pyruntime.gates.policy import ComputePolicy
from pyruntime.models.cost import Cost
from tests.models.session import gated, opened, random_tokens

pytestmark = pytest.mark.usefixtures("one_thread")


def decoder(
    hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, inner: int
) -> DecoderSpec:
    return DecoderSpec(
        "llama", 128256, hidden, layers, heads, kv_heads, head_dim, inner, 131072, 1e-5, 5e5, None,
        True, False, False, False, False, 128000, (128001,), None, "bfloat16",
    )  # fmt: skip


def gates(gate_type: Literal["scalar", "vector", "mlp"]) -> GateSpec:
    return GateSpec(
        "gateskip", gate_type, False, False, "after_module", True, True, True, "calibrated", 0.0,
        "dense",
    )  # fmt: skip


LLAMA = {
    "1B": decoder(2048, 16, 32, 8, 64, 8192),
    "3B": decoder(3072, 28, 24, 8, 128, 8192),
    "8B": decoder(4096, 32, 32, 8, 128, 14336),
}


def net_saved(spec: DecoderSpec, kind: GateSpec | None, skip: float) -> float:
    """Percent of linear MACs saved when `skip` of 20 rows skip both branches of every layer."""
    cost, rows = Cost.of(spec, kind), 20
    ran = torch.ones(spec.num_layers, 2, rows, dtype=torch.bool)
    ran[..., : round(skip * rows)] = False
    nothing = torch.zeros(rows, dtype=torch.int64)  # no context: linear layers only
    dense = cost.dense(spec.num_layers, nothing).sum()
    return 100 * float(1 - cost.executed(ran, nothing).sum() / dense)


@pytest.mark.parametrize(
    ("name", "skip", "saved"),
    [
        ("1B", 0.15, 0.7), ("1B", 0.25, 10.3), ("1B", 0.50, 34.5),
        ("3B", 0.15, -4.7), ("3B", 0.25, 4.7), ("3B", 0.50, 28.1),
        ("8B", 0.15, -1.0), ("8B", 0.25, 8.7), ("8B", 0.50, 32.7),
    ],
)  # fmt: skip
def test_g22_net_savings_of_vector_gates(name: str, skip: float, saved: float) -> None:
    assert round(net_saved(LLAMA[name], gates("vector"), skip), 1) == saved


@pytest.mark.parametrize(("name", "share"), [("1B", 13.8), ("3B", 18.8), ("8B", 15.4)])
def test_g22_gate_cost(name: str, share: float) -> None:
    assert round(-net_saved(LLAMA[name], gates("vector"), 0.0), 1) == share
    assert 0.003 <= round(-net_saved(LLAMA[name], gates("scalar"), 0.0), 3) <= 0.007
    assert net_saved(LLAMA[name], None, 0.0) == 0.0


def test_g22_without_gate_cost() -> None:
    low, high = ([net_saved(spec, None, skip) for spec in LLAMA.values()] for skip in (0.15, 0.5))
    assert all(14.1 <= round(value, 1) <= 14.5 for value in low)
    assert all(46.9 <= round(value, 1) <= 48.3 for value in high)


@pytest.mark.parametrize("gate_type", ["vector", "scalar", "mlp"])
def test_g22_a_trace_counts_what_ran(tmp_path: Path, gate_type: str) -> None:
    """Every row by hand: gates and K/V always, then the branches it ran, and the head."""
    path, oracle = gated(tmp_path, gate_type=gate_type)
    runtime, tokens = opened(path), random_tokens(0, 2, 21)
    for skip in (0.0, 0.3, 1.0):
        trace = runtime.forward(tokens, ComputePolicy(budget=1 - skip, mode="batch_quantile")).trace
        kept = oracle.forward(tokens, skip).kept.flatten(2)
        d, inner, heads, kv_heads, dim, vocab = 40, 52, 5, 1, 8, 300
        gate = {"scalar": d, "vector": d * d, "mlp": d * 2 * d + 2 * d * d}[gate_type]
        for n in range(42):
            context, macs, dense = n % 21 + 1, vocab * d, vocab * d
            for layer in range(3):
                attention = 2 * d * heads * dim + 2 * heads * dim * context
                fixed = 2 * d * kv_heads * dim
                macs += 2 * gate + fixed
                macs += int(kept[layer, 0, n]) * attention + int(kept[layer, 1, n]) * 3 * d * inner
                dense += fixed + attention + 3 * d * inner
            assert int(trace.macs_per_row[n]) == macs
            assert int(trace.macs_dense_per_row[n]) == dense
        assert trace.macs_executed == int(trace.macs_per_row.sum())
        assert trace.macs_dense == int(trace.macs_dense_per_row.sum())
        share = trace.per_token_compute()
        assert torch.equal(share, trace.macs_per_row.float() / trace.macs_dense_per_row.float())
        # The official figure: skipped rows, every branch counting the same.
        assert trace.skipped_share == pytest.approx(1 - float(kept.float().mean()), abs=1e-6)
