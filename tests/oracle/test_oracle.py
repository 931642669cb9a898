"""The runtime against an independent decoder that masks: same decisions, same logits (G15)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.gates.policy import ComputePolicy
from tests.models.session import gated, opened, random_tokens
from tests.oracle.gateskip import Oracle, Result

pytestmark = pytest.mark.usefixtures("one_thread")

VARIANTS: dict[str, dict[str, Any]] = {
    "vector": {},
    "scalar": {"gate_type": "scalar"},
    "mlp": {"gate_type": "mlp"},
    "mlp scalar": {"gate_type": "mlp", "mlp_scalar": True},
    "shared vector": {"shared": True},
    "shared scalar": {"gate_type": "scalar", "shared": True},
    "entry vector": {"gating_mode": "before_module"},
    "entry scalar": {"gate_type": "scalar", "gating_mode": "before_module"},
    "entry mlp": {"gate_type": "mlp", "gating_mode": "before_module"},
    "ranks only": {"actually_gate": False},
    "ranks only, scalar": {"gate_type": "scalar", "actually_gate": False},
    "ranks only, entry": {"actually_gate": False, "gating_mode": "before_module"},
    "attention only": {"gate_mlp": False},
    "mlp only": {"gate_attention": False, "gate_type": "scalar"},
    "official start": {"bias": 5.0, "std": 0.01},
}
BASES: dict[str, dict[str, Any]] = {
    "odd": {},
    "wide heads": {"hidden_size": 33, "head_dim": 10, "num_heads": 4, "num_kv_heads": 2},
    "biased": {"attention_bias": True, "mlp_bias": True, "tie": True, "num_kv_heads": 5},
}


def with_padding(tokens: torch.Tensor) -> torch.Tensor:
    """Some rows end in eos and padding, as a finished batch does (but one has none)."""
    tokens = tokens.clone()
    tokens[1, -3:] = torch.tensor([2, 0, 0])
    tokens[2, 0] = 1  # BOS is not protected
    return tokens


def compare(path: Path, oracle: Oracle, tokens: torch.Tensor, skip: float, backend: str) -> Result:
    runtime = opened(path, backend)
    expected = oracle.forward(tokens, skip)
    policy = ComputePolicy(budget=1.0 - skip, mode="batch_quantile")
    actual = runtime.forward(tokens, policy)
    assert isinstance(actual.logits, torch.Tensor)
    kept = actual.trace.kept.view(expected.kept.shape)
    assert torch.equal(kept, expected.kept)
    torch.testing.assert_close(actual.logits, expected.logits, atol=2e-5, rtol=1e-4)
    return expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_masks_as_the_paper(tmp_path: Path, variant: str) -> None:
    path, oracle = gated(tmp_path, **VARIANTS[variant])
    tokens = with_padding(random_tokens(1, 4, 17))
    for skip in (0.0, 0.15, 0.5, 1.0):
        result = compare(path, oracle, tokens, skip, "native")
        if skip > 0:
            assert not bool(result.kept.all())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_every_base(tmp_path: Path, base: str, backend: str) -> None:
    path, oracle = gated(tmp_path, BASES[base])
    for shape in ((1, 70), (3, 33)):
        compare(path, oracle, random_tokens(2, *shape), 0.4, backend)


@pytest.mark.parametrize("gate_type", ["vector", "scalar"])
@pytest.mark.parametrize("gating_mode", ["after_module", "before_module"])
def test_g15_physical_is_masked(tmp_path: Path, gate_type: str, gating_mode: str) -> None:
    """Forced decisions: none, all, ragged rows, one token, none in one row."""
    path, oracle = gated(tmp_path, gate_type=gate_type, gating_mode=gating_mode)
    runtime, tokens = opened(path), random_tokens(3, 3, 40)
    layers = runtime.spec.num_layers
    random = torch.rand(layers, 2, 3, 40, generator=torch.Generator().manual_seed(0))
    one, ragged, row = (torch.zeros(layers, 2, 3, 40, dtype=torch.bool) for _ in range(3))
    one[:, :, 1, 20] = True
    ragged[:, :, 0, :3] = ragged[:, :, 1, 5:39] = ragged[:, :, 2, ::2] = True
    row |= random < 0.5
    row[:, :, 1] = False
    for forced in (random < -1, random < 2, random < 0.5, random < 0.95, one, ragged, row):
        expected = oracle.forward(tokens, forced=forced)
        actual = runtime.forward(tokens, replay=forced.flatten(2).contiguous())
        assert torch.equal(actual.trace.kept.view(forced.shape), forced)
        torch.testing.assert_close(actual.logits, expected.logits, atol=1e-5, rtol=1e-4)


def test_the_oracle_can_disagree(tmp_path: Path) -> None:
    """It sees a wrong gate, a wrong rotation and a wrong mask: the tests above can fail."""
    path, oracle = gated(tmp_path)
    tokens = random_tokens(4, 1, 20)
    expected = oracle.forward(tokens, 0.3)
    actual = opened(path).forward(tokens, ComputePolicy(budget=0.7, mode="batch_quantile")).logits
    assert isinstance(actual, torch.Tensor)
    for name in (
        "self_attn.gate.gate.bias",
        "mlp.gate.gate.weight",
        "self_attn.module.k_proj.weight",
    ):
        key = f"model.layers.1.{name}"
        changed = Oracle(oracle.state | {key: oracle.state[key] * 1.01}, oracle.config)
        assert float((changed.forward(tokens, 0.3).logits - actual).abs().max()) > 1e-3
    turned = Oracle(oracle.state, oracle.config | {"rope_theta": 9000.0})
    assert float((turned.forward(tokens, 0.3).logits - actual).abs().max()) > 1e-4
    flipped = expected.kept.clone()
    flipped[0, 1, 0, 5] ^= True
    assert float((oracle.forward(tokens, forced=flipped).logits - actual).abs().max()) > 1e-3
