"""rms_norm and gate: native against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyruntime.ops import native, reference
from tests.ops.strategies import assert_close, dtypes, few, normal, seeds, widths

pytestmark = pytest.mark.usefixtures("threads")


@few
@given(seeds, st.integers(0, 40), widths, dtypes, st.booleans())
def test_rms_norm(seed: int, rows: int, width: int, dtype: torch.dtype, probed: bool) -> None:
    x, weight = normal(seed, rows, width, dtype=dtype), normal(seed + 1, width)
    probe = normal(seed + 2, width) if probed else None
    out, logits = native.rms_norm(x, weight, 1e-5, probe, 0.75)
    expected, _ = reference.rms_norm(x, weight, 1e-5)
    assert_close(out, expected, expected.double().abs())
    assert (logits is None) == (probe is None)
    if logits is not None and probe is not None:  # it reads the row as rounded
        exact = (out.double() @ probe.double() + 0.75).sigmoid()
        assert_close(logits, exact.float(), (out.double().abs() @ probe.double().abs()))


def test_rms_norm_of_zeros_is_zero() -> None:
    out, _ = native.rms_norm(torch.zeros(2, 33), torch.ones(33), 1e-6)
    assert torch.equal(out, torch.zeros(2, 33))


@few
@given(seeds, st.integers(0, 40), widths, st.sampled_from([0.1, 3.0, 40.0]))
def test_gate(seed: int, rows: int, width: int, scale: float) -> None:
    logits = normal(seed, rows, width) * scale
    expected = logits.double().sigmoid()
    means = native.gate(logits)
    assert_close(logits, expected.float(), 1.0)
    assert_close(means, expected.mean(1).float(), 1.0)


def test_gate_at_its_limits() -> None:
    """G1 rests on sigmoid(40) being exactly 1."""
    logits = torch.tensor([[40.0, -100.0, 0.0, torch.inf, -torch.inf] * 7])
    native.gate(logits)
    assert logits[0, [0, 2, 3]].tolist() == [1.0, 0.5, 1.0]
    assert 0 <= float(logits[0, [1, 4]].max()) < 1e-37
    broken = torch.tensor([[torch.nan, 1.0]])
    assert bool(native.gate(broken).isnan())
