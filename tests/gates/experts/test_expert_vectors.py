"""The vectors of the specification, 6.2, through the gates."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from hypothesis import given as hypothesis_given
from hypothesis import strategies as st
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.gates.experts import Cosine, Linear, constructor_of, fold_temperature
from pyruntime.gates.experts.base import balanced_assignment
from pyruntime.gates.experts.dselect import StaticGate, mixture
from pyruntime.ops import Weight, reference
from pyruntime.plan import Plan
from tests.gates.experts.cases import Given, backends

pytestmark = pytest.mark.usefixtures("one_thread")
seeds = st.integers(0, 2**31 - 1)


def plan(kind: str, ops: ModuleType, logits: Tensor, *settings: object, **more: object) -> Plan:
    gate = constructor_of(kind)(Given(logits.shape[1]), *settings, **more)
    return gate.plan(ops, logits)


@backends
def test_v1_ties(ops: ModuleType) -> None:
    scores = torch.tensor([[1.0, 2, 2, 0, 2, 1]])
    for kind in ("topk", "softmax_of_chosen", "sigmoid_of_chosen"):
        assert plan(kind, ops, scores, 2).choices().tolist() == [[1, 2]]


@backends
def test_v4_deepseek_v3(ops: ModuleType) -> None:
    z = torch.tensor([[1, -1, 0.5, 0.4, 2, 0, -0.5, 0.2]])
    bias = torch.tensor([0, 0.3, 0, 0, -0.2, 0, 0.1, 0])
    found = plan("grouped", ops, z, 2, 4, 2, 2.5, bias)
    assert found.choices().tolist() == [[0, 2]]
    expected = torch.tensor([[1.350293, 1.149707]])
    assert torch.allclose(found.slot_weights(), expected, atol=1e-6)


@backends
def test_v5_sparse_mixer(ops: ModuleType) -> None:
    found = plan("sparse_mixer", ops, torch.tensor([[2, 1.99, 1, 1.97, -3, 0.5]]), 0.01)
    assert found.choices().tolist() == [[0, 1]]
    assert torch.allclose(found.slot_weights(), torch.tensor([[0.337781, 0.505]]), atol=1e-6)


V6_BITS = torch.tensor([[0.6, -0.7], [0.25, 0.9]])
V6_SHARES = torch.tensor([0.2, -0.3])
V6 = {False: [0.0, 0.058991, 0.622459, 0.318550], True: [0.0, 0.0, 0.622459, 0.377541]}


@backends
@pytest.mark.parametrize("hard", [False, True])
def test_v6_dselect(ops: ModuleType, hard: bool) -> None:
    gate = constructor_of("dselect_k")(Given(4), Given(2, 4), 4, hard=hard)
    found = gate.plan(ops, torch.cat([V6_BITS.flatten(), V6_SHARES])[None])
    weights = torch.zeros(4)
    ids = found.choices()[0]
    weights[ids[ids >= 0].long()] = found.slot_weights()[0, ids >= 0]
    assert torch.allclose(weights, torch.tensor(V6[hard]), atol=1e-6)
    assert ids.tolist() == ([2, 3] if hard else [2, 3, 1, -1])


@pytest.mark.parametrize("hard", [False, True])
def test_v6_static_selectors_prune_at_load(hard: bool) -> None:
    gate = constructor_of("dselect_static")(V6_BITS, V6_SHARES, 4, hard=hard)
    assert isinstance(gate, StaticGate)
    assert gate.kept.tolist() == ([2, 3] if hard else [1, 2, 3])
    assert gate.num_experts == gate.choices == len(gate.kept)
    found = gate.plan(reference, torch.zeros(3, 5))
    weights = torch.zeros(3, 4)
    weights.scatter_(1, gate.kept[found.choices().long()], found.slot_weights())
    assert torch.allclose(weights, torch.tensor(V6[hard]).expand(3, 4), atol=1e-6)
    with pytest.raises(InvalidInput, match="no code"):
        StaticGate.dselect(torch.ones(1, 2), torch.ones(1), 3)  # the code of expert 3


def test_a_bit_whose_logit_is_zero_is_zero() -> None:
    weights = mixture(torch.zeros(1, 1, 2), torch.ones(1, 1), 4, 1.0, hard=True)
    assert weights.tolist() == [[1.0, 0.0, 0.0, 0.0]]


@hypothesis_given(seeds, st.integers(2, 11), st.integers(1, 4), st.booleans())
def test_dselect_is_its_definition(seed: int, experts: int, k: int, hard: bool) -> None:
    """Bit by bit in Python; codes that name no expert lose their mass."""
    random = torch.Generator().manual_seed(seed)
    length = math.ceil(math.log2(experts))
    bits = torch.randn(3, k, length, generator=random).double()
    shares = torch.softmax(torch.randn(3, k, generator=random).double(), 1)

    def step(v: float) -> float:
        if hard:
            return float(v > 0)
        return 0.0 if v <= -0.5 else 1.0 if v >= 0.5 else -2 * v**3 + 1.5 * v + 0.5

    expected = torch.zeros(3, experts)
    for n in range(3):
        for j in range(k):
            for e in range(experts):
                r = float(shares[n, j])
                for b, digit in enumerate(format(e, f"0{length}b")):
                    s = step(float(bits[n, j, b]))
                    r *= s if digit == "1" else 1 - s
                expected[n, e] += r
    found = mixture(bits.float(), shares.float(), experts, 1.0, hard)
    assert torch.allclose(found, expected, atol=1e-6)


@backends
def test_v8_adaptive(ops: ModuleType) -> None:
    p = torch.tensor([[0.55, 0.30, 0.15], [0.42, 0.40, 0.18]])
    for renormalize in (False, True):
        found = plan("adaptive", ops, p.log(), 0.1, renormalize)
        assert found.choices().tolist() == [[0, -1], [0, 1]]
        raw = torch.tensor([[0.55, 0.0], [0.42, 0.40]])
        expected = raw / raw.sum(1, keepdim=True) if renormalize else raw
        assert torch.allclose(found.slot_weights(), expected, atol=1e-6)


@backends
def test_v8_a_gap_of_the_threshold_keeps_both(ops: ModuleType) -> None:
    """A threshold that is the gap to the last bit; one bit less and the second expert goes."""
    logits = torch.tensor([[1.0, 0.5, -1.0]])
    p = plan("topk", ops, logits, 2, normalize=False).slot_weights()[0]
    gap = p[0] - p[1]
    less = torch.nextafter(gap, torch.zeros(()))
    assert plan("adaptive", ops, logits, float(gap), False).choices().tolist() == [[0, 1]]
    assert plan("adaptive", ops, logits, float(less), False).choices().tolist() == [[0, -1]]


# ---- BASE ----

V10 = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.35]])


def test_v10_auction() -> None:
    assert balanced_assignment(V10).tolist() == [[0, 1], [3, 2]]
    assert plan("base_auction", reference, V10).choices().flatten().tolist() == [0, 0, 1, 1]


def test_v10_greedy() -> None:
    gate = constructor_of("base_greedy")(Weight.pack(torch.eye(2)))
    found = gate.plan(reference, V10)
    assert found.choices().flatten().tolist() == [0] * 4
    assert torch.allclose(found.slot_weights(), V10[:, :1].sigmoid())


def auction(table: list[list[float]], share: int) -> list[set[int]]:
    """The specification, 1.5, one bid at a time: table[e][t] is what token t is worth to e."""
    experts, tokens = range(len(table)), range(len(table[0]))
    flat = [score for row in table for score in row]
    epsilon = max((max(flat) - min(flat)) / 50, 1e-4)
    cost, owner, worth = [0.0] * len(tokens), dict[int, int](), [list(row) for row in table]
    for turn in range(10_000):
        offers: dict[int, dict[int, float]] = {t: {} for t in tokens}
        held = []
        for e in experts:
            ranked = sorted(tokens, key=lambda t, e=e: (-worth[e][t], t))  # type: ignore[misc]
            held.append(set(ranked[:share]))
            for t in held[e]:
                offers[t][e] = worth[e][t] - worth[e][ranked[share]] + epsilon
        if 0 < turn < 100:
            for t, e in owner.items():
                offers[t][e] = epsilon
        if all(offers.values()):
            return held
        owner = {t: min(o, key=lambda e, o=o: (-o[e], e)) for t, o in offers.items() if o}  # type: ignore[misc]
        for t, e in owner.items():
            cost[t] += offers[t][e]
        worth = [[table[e][t] - cost[t] for t in tokens] for e in experts]
        for t, e in owner.items():
            worth[e][t] = max(flat) if turn < 100 else table[e][t]
    raise AssertionError("no assignment")


@hypothesis_given(seeds, st.integers(2, 6), st.integers(1, 9), st.sampled_from([0.0, 2.0]))
def test_the_auction_is_its_definition(seed: int, experts: int, share: int, skew: float) -> None:
    random = torch.Generator().manual_seed(seed)
    scores = torch.randn(experts * share, experts, generator=random)
    scores -= skew * torch.arange(experts)
    found = balanced_assignment(scores)
    assert torch.equal(found.flatten().sort().values, torch.arange(experts * share))
    # In float64: what bids differ by is far above the rounding of float32.
    lifted = (scores - scores.min()).double().T.tolist()
    assert [set(row) for row in found.tolist()] == auction(lifted, share)


def test_the_auction_ends() -> None:
    assert balanced_assignment(torch.zeros(0, 4)).shape == (4, 0)
    assert balanced_assignment(torch.full((8, 4), 1e9)).shape == (4, 2)
    assert balanced_assignment(torch.ones(5, 1)).tolist() == [[0, 1, 2, 3, 4]]
    for scores in (torch.zeros(8, 4), torch.full((8, 4), torch.nan)):
        assert balanced_assignment(scores).flatten().sort().values.tolist() == list(range(8))


# ---- rules without a vector: their definitions in a few lines ----


@backends
@hypothesis_given(seeds)
def test_hierarchical_is_its_definition(ops: ModuleType, seed: int) -> None:
    z = torch.randn(20, 12, generator=torch.Generator().manual_seed(seed))
    p = torch.softmax(z, 1)
    group = p.view(20, 3, 4).sum(2).argmax(1)
    found = plan("sam", ops, z, 3, 2)
    for n in range(20):
        inside = p[n, 4 * group[n] : 4 * group[n] + 4]
        best = inside.topk(2)
        assert found.choices()[n].tolist() == (best.indices + 4 * group[n]).tolist()
        assert torch.allclose(found.slot_weights()[n], best.values)


@backends
@hypothesis_given(seeds)
def test_prototypes_are_their_definition(ops: ModuleType, seed: int) -> None:
    z = torch.randn(20, 12, generator=torch.Generator().manual_seed(seed))
    best = [torch.softmax(part, 1).max(1) for part in z.split(4, dim=1)]
    found = plan("ktop1", ops, z, 3)
    ids = torch.stack([b.indices + 4 * i for i, b in enumerate(best)], 1)
    assert torch.equal(found.choices(), ids.int())
    assert torch.allclose(found.slot_weights(), torch.stack([b.values for b in best], 1))


@backends
@hypothesis_given(seeds, st.sampled_from([0.0, 0.02, 0.1, 0.3, 0.6]), st.sampled_from([2, 8, 80]))
def test_dense_to_sparse_is_its_definition(
    ops: ModuleType, seed: int, threshold: float, experts: int
) -> None:
    z = torch.randn(20, experts, generator=torch.Generator().manual_seed(seed)) * 2
    p = torch.softmax(z, 1)
    found = plan("dts", ops, z, threshold)
    close = ((p - threshold).abs() < 1e-7).any(1)
    for n in torch.nonzero(~close)[:, 0].tolist():
        ids = found.choices()[n]
        expected = set(torch.nonzero(p[n] > threshold)[:, 0].tolist()) | {int(p[n].argmax())}
        assert set(ids[ids >= 0].tolist()) == expected
        kept = ids[ids >= 0].long()
        assert torch.allclose(found.slot_weights()[n, ids >= 0], p[n, kept], atol=1e-7)


@backends
def test_a_probability_of_the_threshold_does_not_pass(ops: ModuleType) -> None:
    even = torch.zeros(1, 4)
    assert plan("dts", ops, even, 0.25).choices().tolist() == [[0, -1, -1, -1]]
    assert plan("dts", ops, even, 0.2499).choices().tolist() == [[0, 1, 2, 3]]


@backends
@hypothesis_given(seeds, st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 4))
def test_expert_choice_is_its_definition(
    ops: ModuleType, seed: int, lengths: list[int], k: int
) -> None:
    z = torch.randn(sum(lengths), 4, generator=torch.Generator().manual_seed(seed))
    p = torch.softmax(z, 1)
    names = torch.tensor(lengths).argsort(stable=True)  # a sequence may have any number
    sequences = torch.repeat_interleave(names, torch.tensor(lengths)).int()
    found = constructor_of("expert_choice")(Given(4), k).plan(ops, z, sequences=sequences)
    expected = torch.full((len(z), 4), -1)
    first = 0
    for length in lengths:
        for e in range(4):
            best = p[first : first + length, e].argsort(descending=True, stable=True)
            expected[first + best[: k * length // 4], e] = e
        first += length
    assert torch.equal(found.choices(), expected.int())
    assert torch.allclose(found.slot_weights(), p * (expected >= 0))


@backends
@hypothesis_given(seeds, st.booleans())
def test_hash_is_its_definition(ops: ModuleType, seed: int, learned: bool) -> None:
    random = torch.Generator().manual_seed(seed)
    table = torch.randint(0, 6, (30, 3), generator=random)
    tokens = torch.randint(0, 30, (17,), generator=random)
    z = torch.randn(17, 6, generator=random)
    gate = constructor_of("hash")(table, 6, Given(6) if learned else None, scale=1.5)
    found = gate.plan(ops, z, tokens=tokens)
    ids = table[tokens]
    s = torch.nn.functional.softplus(z).sqrt().gather(1, ids)
    weights = s / s.sum(1, keepdim=True) * 1.5 if learned else torch.ones(17, 3)
    if learned:  # the best first
        weights, order = weights.sort(dim=1, descending=True, stable=True)
        ids = ids.gather(1, order)
    assert torch.equal(found.choices(), ids.int())
    assert torch.allclose(found.slot_weights(), weights)
    single = constructor_of("hash")(table[:, 0].contiguous(), 6).plan(ops, z, tokens=tokens)
    assert single.choices().shape == (17, 1)


@backends
def test_cosine_is_its_definition(ops: ModuleType) -> None:
    random = torch.Generator().manual_seed(0)
    x, w = torch.randn(20, 16, generator=random), torch.randn(6, 16, generator=random)
    b, s = torch.randn(6, generator=random), torch.randn(6, 8, generator=random)
    for temperature in (math.log(2.0), 3.0, 7.0):
        y = torch.nn.functional.normalize(x @ w.T + b, dim=1)
        z = y @ torch.nn.functional.normalize(s, dim=0) * min(math.exp(temperature), 100.0)
        expected = torch.softmax(z, 1).topk(2)
        gate = constructor_of("topk")(Cosine.of(Linear(Weight.pack(w), b), s, temperature), 2)
        found = gate.plan(ops, x)
        assert torch.equal(found.choices(), expected.indices.int())
        weights = expected.values / expected.values.sum(1, keepdim=True)
        assert torch.allclose(found.slot_weights(), weights, atol=1e-5)


def test_temperature_is_folded_into_the_router() -> None:
    random = torch.Generator().manual_seed(0)
    x, w = torch.randn(20, 16, generator=random), torch.randn(8, 16, generator=random)
    b = torch.randn(8, generator=random)
    folded, bias = fold_temperature(w, b, 1.7)
    gate = constructor_of("topk")(Linear(Weight.pack(folded), bias), 2, normalize=False)
    expected = torch.softmax((x @ w.T + b) / 1.7, 1).topk(2)
    found = gate.plan(reference, x)
    assert torch.equal(found.choices(), expected.indices.int())
    assert torch.allclose(found.slot_weights(), expected.values, atol=1e-6)
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InvalidInput, match="temperature"):
            fold_temperature(w, None, wrong)


@backends
def test_a_float32_router_reads_bfloat16_rows(ops: ModuleType) -> None:
    """DeepSeek's routers multiply in float32, whatever the model's dtype."""
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    w = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    logits = Linear(Weight.pack(w)).logits(ops, x)
    assert torch.allclose(logits, x.float() @ w.T, atol=1e-5)
