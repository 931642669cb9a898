"""attention_varlen: native against a float64 softmax, whose row's bits depend on what, refusals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pyruntime.ops.library  # noqa: F401 - registers torch.ops.pyruntime
from pyruntime import ops
from pyruntime.errors import InvalidInput
from pyruntime.ops import native, reference
from tests.ops.strategies import (
    BF16,
    F32,
    assert_same_bits,
    both_dtypes,
    generator,
    normal,
    seeds,
    several_threads,
)

pytestmark = pytest.mark.usefixtures("threads")
BACKENDS = [native, reference]


@dataclass(frozen=True)
class Case:
    """q, k and v of ragged sequences, columns of one wider matrix where ``wide``."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_q: Tensor
    cu_k: Tensor
    heads: int
    bias: Tensor | None

    def run(self, backend: Any = native, **changes: Any) -> Tensor:
        given = {**self.__dict__, **changes}
        args = [given[name] for name in ("q", "k", "v", "cu_q", "cu_k", "heads")]
        scale = (self.q.shape[1] // self.heads) ** -0.5
        out: Tensor = backend.attention_varlen(*args, scale, given["bias"])
        return out


def ends(lengths: list[int]) -> Tensor:
    """int32 [n + 1]."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def case(
    queries: list[int],
    keys: list[int],
    heads: int,
    dim: int,
    dtype: torch.dtype,
    seed: int = 0,
    biased: bool = False,
    wide: bool = False,
) -> Case:
    width, sizes = heads * dim, (sum(queries), sum(keys), sum(keys))
    if wide:  # other columns on both sides of each
        q, k, v = (
            normal(seed + i, n, 3 * width, dtype=dtype)[:, width : 2 * width]
            for i, n in enumerate(sizes)
        )
    else:
        q, k, v = (normal(seed + i, n, width, dtype=dtype) for i, n in enumerate(sizes))
    bias = normal(seed + 3, sum(keys)) if biased else None
    return Case(q, k, v, ends(queries), ends(keys), heads, bias)


def exact(x: Case) -> Tensor:
    """Float64."""
    out = torch.zeros(x.q.shape, dtype=torch.float64)
    for a, b, c, d in zip(x.cu_q[:-1], x.cu_q[1:], x.cu_k[:-1], x.cu_k[1:], strict=True):
        q, k, v = (
            t.double().unflatten(1, (x.heads, -1)).transpose(0, 1)
            for t in (x.q[a:b], x.k[c:d], x.v[c:d])
        )
        scores = q @ k.transpose(1, 2) * q.shape[2] ** -0.5
        if x.bias is not None:
            scores += x.bias[c:d].double()
        out[a:b] = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
    return out


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Within the rounding of sums in float32, or of weights and results in bfloat16."""
    size = 1.0 + expected.abs().max().item() if expected.numel() else 1.0
    slack = size * (2e-6 if actual.dtype is F32 else 2.0**-8)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=slack)


lengths = st.one_of(st.integers(0, 3), st.integers(0, 70), st.sampled_from([16, 32, 48, 197]))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    queries = draw(st.lists(lengths, max_size=4))
    same = draw(st.booleans())
    keys = queries if same else [draw(lengths) for _ in queries]
    heads, dim = draw(st.sampled_from([(1, 1), (2, 7), (3, 16), (1, 33), (2, 64), (1, 72)]))
    dtype = draw(st.sampled_from([F32, BF16]))
    return case(queries, keys, heads, dim, dtype, draw(seeds), draw(st.booleans()),
                draw(st.booleans()))  # fmt: skip


@given(cases())
def test_ragged_shapes(x: Case) -> None:
    for backend in BACKENDS:
        out = x.run(backend)
        assert out.dtype is x.q.dtype and out.is_contiguous()
        assert_near(out, exact(x))


@several_threads
@both_dtypes
@pytest.mark.parametrize(("heads", "dim"), [(3, 64), (1, 80), (2, 34)])
def test_a_row_depends_on_its_sequence_alone(heads: int, dim: int, dtype: torch.dtype) -> None:
    sizes = [197, 5, 0, 64, 1, 130]
    x = case(sizes, sizes, heads, dim, dtype, biased=True)
    together = x.run()
    assert x.bias is not None
    for i, size in enumerate(sizes):
        mine = slice(int(x.cu_k[i]), int(x.cu_k[i + 1]))
        alone = {name: getattr(x, name)[mine] for name in ("q", "k", "v", "bias")}
        whole = x.run(**alone, cu_q=ends([size]), cu_k=ends([size]))
        assert_same_bits(whole, together[mine])
        for first, count in [(0, 1), (size // 2, 1), (size // 3, size // 4), (0, size - 1)]:
            if 0 <= first and 0 < count <= size - first:
                alone["q"] = x.q[mine][first : first + count]
                some = x.run(**alone, cu_q=ends([count]), cu_k=ends([size]))
                assert_same_bits(some, together[mine][first : first + count])


@both_dtypes
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    for sizes in ([197], [300, 20, 197, 0, 100], [37] * 9):
        x = case(sizes, sizes, 3, 64, dtype, biased=True, wide=True)
        found = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(x.run())
        torch.set_num_threads(before)
        for other in found[1:]:
            assert_same_bits(other, found[0])


@both_dtypes
def test_class_rows_alone(dtype: torch.dtype) -> None:
    """cu_q cut differently from cu_k: the first row of every image asks, or the first two do."""
    sizes = [50, 197, 1, 33]
    x = case(sizes, sizes, 2, 64, dtype)
    firsts = x.cu_q[:-1].long()
    expected = x.run()[firsts]
    assert_same_bits(x.run(q=x.q[firsts], cu_q=ends([1] * 4)), expected)
    every = torch.cat([x.q[firsts], x.q[firsts]]).view(2, 4, -1).transpose(0, 1).flatten(0, 1)
    twice = x.run(q=every, cu_q=ends([2] * 4))
    assert_same_bits(twice[::2], expected)
    assert_same_bits(twice[1::2], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@both_dtypes
def test_a_key_bias_is_as_many_keys(backend: Any, dtype: torch.dtype) -> None:
    """log(m) counts a key m times, -inf hides it: what stands there no longer matters."""
    x = case([9], [20], 2, 32, dtype)
    times = torch.randint(1, 4, (20,), generator=generator(0))
    many = {"k": x.k.repeat_interleave(times, 0), "v": x.v.repeat_interleave(times, 0)}
    repeated = exact(Case(x.q, many["k"], many["v"], x.cu_q, ends([int(times.sum())]), 2, None))
    assert_near(x.run(backend, bias=times.float().log()), repeated)
    hidden = torch.zeros(20)
    hidden[3:7] = -torch.inf
    seen = hidden == 0
    shown = x.run(backend, bias=hidden)
    assert_near(shown, exact(Case(x.q, x.k[seen], x.v[seen], x.cu_q, ends([16]), 2, None)))
    x.k[3:7], x.v[3:7] = 1e4, -1e4
    assert_same_bits(x.run(backend, bias=hidden), shown)


@pytest.mark.parametrize("backend", BACKENDS)
@both_dtypes
def test_extremes(backend: Any, dtype: torch.dtype) -> None:
    x = case([4, 3, 2], [5, 0, 40], 2, 16, dtype)
    out = x.run(backend)
    assert_same_bits(out[4:7], torch.zeros(3, 32, dtype=dtype))  # nothing to see
    sharp = x.run(backend, q=x.q * 1e4)  # one key takes all; a weight of exactly one, or zero
    for row, head in ((0, 0), (8, 1)):
        mine = slice(16 * head, 16 * head + 16)
        keys = slice(0, 5) if row < 4 else slice(5, 45)
        best = (x.k[keys, mine].double() @ x.q[row, mine].double()).argmax()
        assert_same_bits(sharp[row, mine], x.v[keys, mine][best])
    k = x.k.clone()
    k[2, 0] = torch.nan
    broken = x.run(backend, k=k)
    assert broken[:4, :16].isnan().all() and not broken[:4, 16:].isnan().any()
    assert_same_bits(broken[4:], out[4:])
    assert case([], [], 2, 16, dtype).run(backend).shape == (0, 32)
    assert case([0], [7], 2, 16, dtype).run(backend).shape == (0, 32)


@both_dtypes
def test_nothing_beyond_the_columns_of_a_head_is_read_into_it(dtype: torch.dtype) -> None:
    """Views of a matrix whose other columns, and the rows of other sequences, are NaN."""
    for dim in (1, 7, 16, 33, 72):
        full = torch.full((3, 60, 3 * dim), torch.nan, dtype=dtype)
        x = case([21], [21], 1, dim, dtype)
        full[:, 20:41, dim : 2 * dim] = torch.stack([x.q, x.k, x.v])
        q, k, v = full[:, :, dim : 2 * dim]
        bounds = torch.tensor([0, 20, 41, 60], dtype=torch.int32)
        out = x.run(q=q, k=k, v=v, cu_q=bounds, cu_k=bounds)
        assert_same_bits(out[20:41], x.run())


def test_refusals() -> None:
    x = case([3, 4], [5, 2], 2, 8, F32)
    bad: list[tuple[str, dict[str, Any]]] = [
        ("q must be a CPU float32 or bfloat16 matrix", {"q": x.q.double()}),
        ("q must be", {"q": x.q[0]}),
        ("k must be .*float32 \\[rows, 16\\]", {"k": x.k.bfloat16()}),
        ("k must be", {"k": x.k[:, :8]}),
        ("v must be .*contiguous rows, got strided", {"v": x.v.T.contiguous().T}),
        ("v must be \\[7, 16\\], one row a key", {"v": x.v[:6]}),
        ("16 columns are not 3 equal heads", {"heads": 3}),
        ("16 columns are not 0 equal heads", {"heads": 0}),
        ("cu_q must be a contiguous CPU torch.int32", {"cu_q": x.cu_q.long()}),
        ("cu_k must be \\[3\\], as long as cu_q", {"cu_k": x.cu_k[:2]}),
        ("cu_k must be \\[1\\]", {"cu_q": x.cu_q[:0], "cu_k": x.cu_k[:0]}),
        ("cu_q must rise from 0 to the 7 rows", {"cu_q": ends([3, 5])}),
        ("cu_q must rise", {"cu_q": ends([8, -1])}),
        ("cu_q must rise", {"cu_q": ends([3, 4]) + 1}),
        ("cu_k must rise from 0 to the 7 rows", {"cu_k": ends([5, 1])}),
        ("key_bias must be \\[7\\]", {"bias": torch.zeros(6)}),
        ("key_bias must be a contiguous CPU torch.float32", {"bias": torch.zeros(7).double()}),
    ]
    for message, change in bad:
        with pytest.raises(InvalidInput, match=f"attention_varlen: {message}"):
            x.run(**change)


@both_dtypes
def test_torch_sees_it(dtype: torch.dtype) -> None:
    x = case([3, 40], [5, 20], 2, 8, dtype, biased=True, wide=True)
    assert_same_bits(x.run(ops), x.run())
    op = torch.ops.pyruntime.attention_varlen
    for bias in (None, x.bias):
        args = (x.q, x.k, x.v, x.cu_q, x.cu_k, 2, 0.25, bias)
        torch.library.opcheck(op.default, args)
        assert_same_bits(op(*args), native.attention_varlen(*args))
