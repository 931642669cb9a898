"""Rotary tables: what each rule does to which frequency (transformers itself: test_moe_parity)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pyruntime.errors import FormatError
from pyruntime.format.spec import DecoderSpec, LatentSpec
from pyruntime.layers.rope import cos_sin_table

SPEC = DecoderSpec(
    source_family="llama", vocab_size=300, hidden_size=40, num_layers=2, num_heads=5,
    num_kv_heads=1, head_dim=32, intermediate_size=52, max_positions=64, norm_eps=1e-5,
    rope_theta=10000.0, rope_scaling=None, tie_embeddings=True, qkv_bias=False, o_bias=False,
    mlp_bias=False, qk_norm=False, bos_token_id=None, eos_token_ids=(), pad_token_id=None,
    dtype="float32",
)  # fmt: skip
YARN: dict[str, Any] = {
    "rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True,
    "original_max_position_embeddings": 4096, "attention_factor": 1.0,
}  # fmt: skip


def table(positions: int = 40, **changes: Any) -> tuple[Tensor, Tensor]:
    cos, sin = cos_sin_table(dataclasses.replace(SPEC, **changes), positions).chunk(2, -1)
    return cos, sin


def frequencies(**changes: Any) -> Tensor:
    """The angles of position 1, which the slowest rules keep below one turn."""
    cos, sin = table(2, **changes)
    return torch.atan2(sin[1], cos[1])


def test_plain() -> None:
    expected = torch.tensor([10000.0 ** (-j / 16) for j in range(16)])
    torch.testing.assert_close(frequencies(), expected)
    cos, sin = table()
    torch.testing.assert_close(cos.square() + sin.square(), torch.ones(40, 16))


def test_yarn_keeps_fast_frequencies_and_slows_slow_ones() -> None:
    plain, scaled = frequencies(), frequencies(rope_scaling=YARN)
    turns = 4096 * plain / (2 * math.pi)
    # The ramp is rounded outwards to whole frequencies: one more on each side may be in it.
    fast, slow = turns > 32 * 10000 ** (1 / 16), turns < 10000 ** (-1 / 16)
    assert fast.any() and slow.any() and not (fast | slow).all()
    torch.testing.assert_close(scaled[fast], plain[fast])
    torch.testing.assert_close(scaled[slow], plain[slow] / 8)
    share = (plain / scaled - 1) / 7
    assert bool((share.diff() >= -1e-6).all())


def test_yarn_truncates_only_when_it_is_told() -> None:
    exact = frequencies(rope_scaling={**YARN, "truncate": False})
    assert not torch.equal(exact, frequencies(rope_scaling=YARN))
    # In the middle of the ramp of [2.2..., 8.2...] the plain frequency is the same, but its share
    # is the index within the ramp, exactly.
    low, high = (16 * math.log(4096 / (n * 2 * math.pi)) / math.log(10000) for n in (32, 1))
    ramp = (8 - low) / (high - low)
    expected = 10000.0**-0.5 * (1 - ramp + ramp / 8)
    assert float(exact[8]) == pytest.approx(expected, rel=1e-5)


def test_longrope_divides_every_frequency() -> None:
    factors = [1.0 + j / 4 for j in range(16)]
    scaling = {"rope_type": "longrope", "factors": factors, "attention_factor": 1.0}
    scaled = frequencies(rope_scaling=scaling)
    torch.testing.assert_close(scaled, frequencies() / torch.tensor(factors))
    with pytest.raises(FormatError, match="15 rope factors, expected 16"):
        table(rope_scaling={**scaling, "factors": factors[1:]})


def test_the_attention_factor_is_in_the_table() -> None:
    cos, sin = table(rope_scaling={**YARN, "attention_factor": 1.25})
    torch.testing.assert_close(cos.square() + sin.square(), torch.full((40, 16), 1.25**2))


@pytest.mark.parametrize("scaling", [None, {**YARN, "attention_factor": 1.5}])
def test_latent_channels_stand_still(scaling: dict[str, Any] | None) -> None:
    narrow = table(head_dim=8, rope_scaling=scaling)
    latent = LatentSpec(q_rank=None, kv_rank=12, nope_dim=6, rope_dim=8, value_dim=4)
    wide = table(head_dim=20, latent=latent, rope_scaling=scaling)
    for part, expected, still in zip(wide, narrow, (1.0, 0.0), strict=True):
        assert part.shape == (40, 10)
        assert torch.equal(part[:, :4], expected)
        assert torch.equal(part[:, 4:], torch.full((40, 6), still))
