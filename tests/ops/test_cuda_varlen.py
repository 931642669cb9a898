"""attention_varlen on the device, emulated or real: against the reference, and whose bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import cuda_emulator
from pyruntime.errors import InvalidInput
from pyruntime.ops import cuda, reference
from pyruntime.ops.cuda import varlen as cuda_varlen
from tests.ops.device_cases import same_bits
from tests.ops.strategies import BF16, F32, dtypes, normal, seeds

few = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@dataclass(frozen=True)
class Ragged:
    """Arguments of attention_varlen."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_q: Tensor
    cu_k: Tensor
    heads: int
    scale: float
    key_bias: Tensor | None = None

    def run(self, ops: Any, device: str = "cpu", **changes: Tensor) -> Tensor:
        """In place: with the strides and addresses of columns of a wider matrix."""
        given = {**self.__dict__, **changes}
        for name in ("q", "k", "v"):
            rows = given[name]
            whole = rows if rows._base is None else rows._base
            shape, at = (rows.shape, rows.stride()), rows.storage_offset()
            given[name] = torch.as_strided(whole.to(device), *shape, at)
        for name in ("cu_q", "cu_k", "key_bias"):
            given[name] = None if given[name] is None else given[name].to(device)
        out = ops.attention_varlen(**given)
        assert isinstance(out, Tensor) and out.is_contiguous()
        return out.cpu()


def ends(lengths: list[int]) -> Tensor:
    """int32 [n + 1]."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def ragged(
    queries: list[int],
    keys: list[int],
    heads: int,
    dim: int,
    dtype: torch.dtype,
    seed: int = 0,
    biased: bool = False,
    wide: bool = True,
) -> Ragged:
    """Columns of one wider matrix, or rows that lie end to end."""
    width = heads * dim
    q, k, v = (
        normal(seed + i, sum(lengths), (3 if wide else 1) * width, dtype=dtype)
        for i, lengths in enumerate((queries, keys, keys))
    )
    if wide:
        q, k, v = q[:, :width], k[:, width : 2 * width], v[:, 2 * width :]
    bias = normal(seed + 3, sum(keys)) if biased else None
    return Ragged(q, k, v, ends(queries), ends(keys), heads, dim**-0.5, bias)


def near(actual: Tensor, expected: Tensor) -> None:
    """Within what the sums round in float32, or the weights and results in bfloat16."""
    assert actual.shape == expected.shape and actual.dtype is expected.dtype
    size = 1.0 + expected.abs().max().item() if expected.numel() else 1.0
    slack = size * (1e-5 if actual.dtype is F32 else 2.0**-7)
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=slack, equal_nan=True)


lengths = st.one_of(st.integers(0, 3), st.integers(0, 90), st.sampled_from([16, 63, 64, 65]))


@st.composite
def raggeds(draw: st.DrawFn) -> Ragged:
    queries = draw(st.lists(lengths, max_size=4))
    keys = queries if draw(st.booleans()) else [draw(lengths) for _ in queries]
    heads, dim = draw(
        st.sampled_from([(1, 1), (2, 7), (3, 16), (1, 33), (2, 64), (1, 72), (1, 96), (1, 128)])
    )
    return ragged(queries, keys, heads, dim, draw(dtypes), draw(seeds), draw(st.booleans()),
                  draw(st.booleans()))  # fmt: skip


@few
@given(x=raggeds())
@example(x=ragged([], [], 1, 8, BF16))
@example(x=ragged([0], [5], 1, 8, BF16))
@example(x=ragged([5], [0], 1, 8, BF16))
@example(x=ragged([5], [0], 1, 8, F32))
def test_attention_varlen(device: str, x: Ragged) -> None:
    near(x.run(cuda, device), x.run(reference))


# more keys than the slots hold, many query rows, more heads than one, more sequences than a warp
LONG = [
    ([300], [300], 1, 64),
    ([70, 3], [260, 600], 1, 64),
    ([130], [200], 2, 128),
    ([1, 257], [129, 257], 1, 96),
    ([65, 197], [65, 197], 3, 32),
    ([i % 3 for i in range(70)], [1 + i % 5 for i in range(70)], 1, 16),
    ([1] * 1100, [1] * 1100, 1, 8),
]


@pytest.mark.parametrize("many", [1, 1 << 20])
@pytest.mark.parametrize(("queries", "keys", "heads", "dim"), LONG)
def test_every_cut_of_the_work(
    device: str,
    queries: list[int],
    keys: list[int],
    heads: int,
    dim: int,
    many: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks of 256 query rows, or of 64: the same bits, near those of the reference."""
    monkeypatch.setattr(cuda_varlen, "MANY", many)
    x = ragged(queries, keys, heads, dim, BF16, biased=True)
    out = x.run(cuda, device)
    near(out, x.run(reference))
    monkeypatch.setattr(cuda_varlen, "MANY", 1 if many > 1 else 1 << 20)
    same_bits(x.run(cuda, device), out)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_attention_of_a_row_depends_on_its_sequence_alone(device: str, dtype: torch.dtype) -> None:
    sizes = [70, 5, 0, 64, 1]
    x = ragged(sizes, sizes, 2, 32, dtype, biased=True)
    together = x.run(cuda, device)
    assert x.key_bias is not None
    for i, size in enumerate(sizes):
        mine = slice(int(x.cu_k[i]), int(x.cu_k[i + 1]))
        for first, count in {(0, size), (0, min(size, 1)), (size // 2, size - size // 2)}:
            rows = slice(mine.start + first, mine.start + first + count)
            alone = x.run(
                cuda, device, q=x.q[rows], k=x.k[mine], v=x.v[mine], key_bias=x.key_bias[mine],
                cu_q=ends([count]), cu_k=ends([size]),
            )  # fmt: skip
            same_bits(alone, together[rows])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_hidden_keys_and_numbers_that_are_none(device: str, dtype: torch.dtype) -> None:
    x = ragged([4, 3, 2], [90, 0, 40], 2, 16, dtype)
    hidden = torch.zeros(130)
    hidden[:70], hidden[100:] = -torch.inf, -torch.inf  # among them the first keys of all
    shown = x.run(cuda, device, key_bias=hidden)
    near(shown, x.run(reference, key_bias=hidden))
    k, v = x.k.clone(), x.v.clone()
    k[:70], v[:70] = 1e4, -1e4
    same_bits(x.run(cuda, device, k=k, v=v, key_bias=hidden), shown)
    out = x.run(cuda, device)
    same_bits(out[4:7], torch.zeros(3, 32, dtype=dtype))  # nothing to see
    sharp = x.run(cuda, device, q=x.q * 1e4)  # one key takes all; a weight of exactly one, or zero
    best = (x.k[:90, :16].double() @ x.q[0, :16].double()).argmax()
    same_bits(sharp[0, :16], x.v[best, :16])
    k = x.k.clone()
    k[2, 0] = torch.nan
    broken = x.run(cuda, device, k=k)
    assert bool(broken[:4, :16].isnan().all()) and not bool(broken[:4, 16:].isnan().any())
    same_bits(broken[4:], out[4:])
    every = torch.full((130,), -torch.inf)
    assert bool(x.run(cuda, device, key_bias=every)[7:].isnan().all())  # as of a softmax of none


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("dim", [8, 24, 72])
def test_nothing_beyond_a_head_is_read_into_it(device: str, dtype: torch.dtype, dim: int) -> None:
    """Other columns, and the rows of other sequences, are NaN."""
    x = ragged([21], [21], 1, dim, dtype, wide=False)
    full = torch.full((3, 60, 3 * dim), torch.nan, dtype=dtype)
    full[:, 20:41, dim : 2 * dim] = torch.stack([x.q, x.k, x.v])
    q, k, v = full[:, :, dim : 2 * dim]
    bounds = torch.tensor([0, 20, 41, 60], dtype=torch.int32)
    out = x.run(cuda, device, q=q, k=k, v=v, cu_q=bounds, cu_k=bounds)
    same_bits(out[20:41], x.run(cuda, device))


def test_rows_beyond_the_last_sequence_are_left(device: str) -> None:
    """A plan on the device has capacity for rows that no sequence has."""
    x = ragged([40, 9], [40, 9], 2, 16, BF16)
    more = ragged([80], [80], 2, 16, BF16, seed=9)
    longer = {name: torch.cat([getattr(x, name), getattr(more, name)]) for name in ("q", "k", "v")}
    same_bits(x.run(cuda, device, **longer)[:49], x.run(cuda, device))


def test_forms_of_attention(
    monkeypatch: pytest.MonkeyPatch, emulator: cuda_emulator.EmulatedKernels
) -> None:
    cuda_emulator.install(monkeypatch, emulator)
    whole = torch.zeros(5, 51, dtype=BF16)
    for x, form in (
        (ragged([3], [3], 2, 16, BF16), "mma_32"),
        (ragged([3], [3], 2, 72, BF16), "mma_96"),
        (ragged([3], [3], 2, 104, BF16), "mma_128"),
        (ragged([3], [3], 1, 12, BF16), "plain_bf16_64"),
        (ragged([3], [3], 1, 100, F32), "plain_f32_128"),
        (replace(ragged([5], [5], 1, 16, BF16), q=whole[:, :16]), "plain_bf16_64"),
        (replace(ragged([5], [5], 1, 16, BF16), v=normal(0, 5, 17, dtype=BF16)[:, 1:]),
         "plain_bf16_64"),
        (ragged([], [], 1, 16, BF16), None),
        (ragged([0], [5], 1, 16, BF16), None),
    ):  # fmt: skip
        before = len(emulator.launched)
        x.run(cuda)
        names = [] if form is None else [f"attention_varlen_{form}"]
        assert emulator.launched[before:] == names


def test_wrong_arguments_of_attention_are_named(device: str) -> None:
    x = ragged([3, 4], [5, 2], 2, 8, F32)
    bad: list[tuple[str, dict[str, Any]]] = [
        ("q must be a CUDA torch.float32 or torch.bfloat16 matrix", {"q": x.q.double()}),
        ("q must be", {"q": x.q[0]}),
        ("k must be .*float32 matrix \\[\\?, 16\\]", {"k": x.k.bfloat16()}),
        ("k must be", {"k": x.k[:, :8]}),
        ("v must be .*contiguous rows, got strided", {"v": x.v.T.contiguous().T}),
        ("v must be \\[7, 16\\], one row a key", {"v": x.v[:6]}),
        ("16 columns are not 3 equal heads of at most 128", {"heads": 3}),
        ("16 columns are not 0 equal heads", {"heads": 0}),
        ("cu_q must be a contiguous CUDA torch.int32", {"cu_q": x.cu_q.long()}),
        ("cu_k must be .* \\[3\\]", {"cu_k": x.cu_k[:2]}),
        ("cu_k must be .* \\[1\\]", {"cu_q": x.cu_q[:0], "cu_k": x.cu_k[:0]}),
        ("key_bias must be .* \\[7\\]", {"key_bias": torch.zeros(6)}),
    ]
    for message, change in bad:
        with pytest.raises(InvalidInput, match=f"attention_varlen: {message}"):
            x.run(cuda, device, **change)
    with pytest.raises(InvalidInput, match="are not 1 equal heads of at most 128"):
        ragged([1], [1], 1, 136, BF16).run(cuda, device)
