"""Channel masks fold exactly: what is dropped never reached the output."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pyruntime.errors import ConversionError
from pyruntime.format.convert.compression import fold_channel_mask


@pytest.mark.parametrize("act", [torch.relu, torch.square, lambda x: (x > 3).double() - 2])
@given(
    seed=st.integers(0, 2**31), width=st.integers(1, 9), hidden=st.integers(1, 33),
    bias=st.booleans(), share=st.floats(0, 1),
)  # fmt: skip
def test_fold(
    act: Callable[[Tensor], Tensor], seed: int, width: int, hidden: int, bias: bool, share: float
) -> None:
    """On whole numbers, where sums are exact in any order, the results are equal."""
    random = torch.Generator().manual_seed(seed)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape, generator=random).double()

    mask = torch.rand(hidden, generator=random) < share
    mask[int(torch.randint(hidden, (1,), generator=random))] = True
    x, up, down = whole(5, width), whole(hidden, width), whole(width, hidden)
    up_bias = whole(hidden) if bias else None
    wanted = F.linear(mask * act(F.linear(x, up, up_bias)), down)
    folded = fold_channel_mask(mask, up, up_bias, down)
    assert torch.equal(F.linear(act(F.linear(x, folded[0], folded[1])), folded[2]), wanted)
    assert folded[0].shape == (int(mask.sum()), width)
    assert (folded[1] is None) == (not bias)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.ones(4)}, "mask: is torch.float32 [4], expected bool"),
        ({"mask": torch.zeros(4, dtype=torch.bool)}, "passes no channel"),
        ({"up": torch.ones(3, 2)}, "up: is [3, 2], expected 4 channels on axis 0 of 2"),
        ({"up_bias": torch.ones(4, 1)}, "up_bias: is [4, 1], expected 4 channels on axis 0 of 1"),
        ({"down": torch.ones(4, 2)}, "down: is [4, 2], expected 4 channels on axis 1 of 2"),
    ],
)
def test_refusals(change: dict[str, Tensor], message: str) -> None:
    parts = {"mask": torch.ones(4, dtype=torch.bool), "up": torch.ones(4, 2),
             "up_bias": torch.ones(4), "down": torch.ones(2, 4)}  # fmt: skip
    with pytest.raises(ConversionError) as caught:
        fold_channel_mask(**{**parts, **change})
    assert message in str(caught.value)
