"""What holds for every gate: specification 6.1, invariants 1, 2, 5, 6 and 10."""

from __future__ import annotations

import dataclasses
import hashlib
from types import ModuleType

import pytest
import torch
from hypothesis import given as hypothesis_given
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from pyruntime.errors import InvalidInput
from pyruntime.format.spec.experts import ExpertSpec, RouterSpec
from pyruntime.gates.experts import Gate, constructor_of, gate_of, split_identity
from pyruntime.gates.experts.topk import TopKGate
from pyruntime.ops import Weight, native, reference
from pyruntime.ops.topk import TopK
from tests.gates.experts.cases import (
    GATES,
    SIZES,
    SKEWS,
    E,
    Given,
    K,
    assert_same_choices,
    backends,
    context,
    every_gate,
    given,
    logits_of,
    plan_of,
    real_gates,
    rows_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")
seeds = st.integers(0, 2**31 - 1)
REAL = real_gates()
SUMS = {  # the weights of a row add up to this, or to at most this
    "switch": (None, 1.0),
    "topk": (None, 1.0),
    "topk, normalized": (1.5, 1.5),
    "softmax_of_chosen": (1.0, 1.0),
    "adaptive": (None, 1.0),
    "adaptive, renormalized": (1.0, 1.0),
    "grouped, v2": (None, 16.0),
    "grouped, v3": (2.5, 2.5),
    "ktop1": (None, 2.0),
    "sam": (None, 1.0),
    "hash": (2.0, 2.0),
    "hash, learned": (1.5, 1.5),
    "dts": (None, 1.0),
    "dselect_k": (1.0, 1.0),  # 8 experts have all the codes there are
    "dselect_k, hard": (1.0, 1.0),
    "sparse_mixer": (None, 2.0),
}
USED = {  # slots of a row that are used: at least, at most
    "switch": (1, 1), "topk": (K, K), "topk, normalized": (K, K), "topk, longcat": (K, K),
    "softmax_of_chosen": (K, K), "sigmoid_of_chosen": (2, 2), "adaptive": (1, 2),
    "adaptive, renormalized": (1, 2), "grouped, v2": (K, K), "grouped, v3": (K, K), "ktop1": (2, 2),
    "sam": (K, K), "base_auction": (1, 1), "hash": (2, 2), "hash, learned": (2, 2), "dts": (1, E),
    "dselect_k": (1, E), "dselect_k, hard": (1, 2), "dselect_static": (1, E),
    "sparse_mixer": (2, 2), "expert_choice": (0, E),
}  # fmt: skip
SHIFTED = [name for name in GATES if not name.startswith(("dsel", "sig", "hash, l", "grouped, v3"))]
SHIFTED.remove("sparse_mixer")  # its distances are relative to the logits


@every_gate
@backends
@pytest.mark.parametrize("skew", SKEWS)
@pytest.mark.parametrize("rows", SIZES)
def test_plans_are_canonical(ops: ModuleType, name: str, rows: int, skew: str) -> None:
    gate = GATES[name](given)
    rows = rows_of(gate, rows)
    plan = plan_of(gate, ops, logits_of(rows, rows, skew))
    plan.validate()
    assert (plan.num_rows, plan.num_segments) == (rows, gate.num_experts)
    assert plan.inverse.shape == (rows, gate.choices)
    ids = plan.choices().flatten().long()
    taken = torch.nonzero(ids >= 0)[:, 0]
    packed = taken[(ids[taken] * ids.numel() + taken).argsort()]
    assert torch.equal(plan.inverse.flatten()[packed], torch.arange(len(packed)).int())
    assert torch.equal(plan.offsets.diff().long(), ids[taken].bincount(minlength=gate.num_experts))
    used = (plan.choices() >= 0).sum(1)
    if name in USED and rows:
        low, high = USED[name]
        assert low <= int(used.min()) and int(used.max()) <= high
    weights = plan.slot_weights()
    assert bool(weights.isfinite().all()) and bool((weights >= 0).all())
    assert bool((weights[plan.choices() < 0] == 0).all())


@every_gate
@hypothesis_given(seeds, st.integers(0, 60))
@settings(max_examples=10)
def test_identity_experts_give_every_row_as_often_as_it_runs(name: str, seed: int, n: int) -> None:
    gate = GATES[name](given)
    n = rows_of(gate, n)
    plan = dataclasses.replace(plan_of(gate, reference, logits_of(seed, n)), weights=None)
    payload = torch.stack([torch.arange(n), torch.arange(n) % 17, torch.full((n,), 3)], 1)
    for dtype in (torch.float32, torch.bfloat16):
        x = (payload % 100).to(dtype)
        out = reference.combine(reference.gather(x, plan), plan, torch.zeros_like(x))
        kept = (plan.choices() >= 0).sum(1, keepdim=True)
        assert torch.equal(out.float(), kept * x.float())


@pytest.mark.parametrize("name", SUMS)
@hypothesis_given(seeds, st.sampled_from([0.1, 1.0, 5.0]))
@settings(max_examples=10)
def test_weights_add_up(name: str, seed: int, spread: float) -> None:
    exact, most = SUMS[name]
    plan = plan_of(GATES[name](given), reference, logits_of(seed, 40) * spread)
    total = plan.slot_weights().sum(1)
    assert bool((total <= most * (1 + 1e-6)).all()) and bool((total > 0).all())
    if exact is not None:
        assert torch.allclose(total, torch.full((40,), exact))


@pytest.mark.parametrize("name", SHIFTED)
@hypothesis_given(seeds, st.floats(-20, 20, width=32))
@settings(max_examples=10)
def test_a_constant_added_to_all_logits_changes_nothing(
    name: str, seed: int, constant: float
) -> None:
    gate = GATES[name](given)
    x = (logits_of(seed, 40) * 64).round() / 64  # so that the sum is exact
    moved = plan_of(gate, reference, x + round(constant))
    plan = plan_of(gate, reference, x)
    if name != "base_auction":
        assert torch.equal(moved.choices(), plan.choices())
        assert torch.allclose(moved.slot_weights(), plan.slot_weights(), atol=1e-6)
    else:
        assert torch.equal(moved.choices(), plan.choices())  # its weight is a sigmoid


@pytest.mark.parametrize("name", ["switch", "topk", "softmax_of_chosen", "adaptive", "dts",
                                  "sparse_mixer", "base_auction", "sigmoid_of_chosen"])  # fmt: skip
@hypothesis_given(seeds)
@settings(max_examples=10)
def test_renamed_experts_are_chosen_alike(name: str, seed: int) -> None:
    gate = GATES[name](given)
    x = logits_of(seed, 40)[:, :E]
    names = torch.randperm(E, generator=torch.Generator().manual_seed(seed))
    plan, renamed = plan_of(gate, reference, x), plan_of(gate, reference, x[:, names])
    ids = renamed.choices().long()
    assert torch.equal(torch.where(ids >= 0, names[ids], -1).int(), plan.choices())
    assert torch.allclose(renamed.slot_weights(), plan.slot_weights(), atol=1e-6)


def part(x: Tensor, rows: Tensor, gate: Gate) -> object:
    everything = context(0, len(x))
    tokens, sequences = everything["tokens"][rows], everything["sequences"][rows]
    return gate.plan(native, x[rows], tokens=tokens, sequences=sequences)


@pytest.mark.parametrize("name", REAL)
@hypothesis_given(seeds, st.sampled_from([1, 2, 9, 40]))
@settings(max_examples=10)
def test_what_a_gate_says_of_other_rows_is_true(name: str, seed: int, count: int) -> None:
    """Real routers: nothing depends on the rows around, or on the rows after, bit for bit."""
    gate, rows = REAL[name], 64
    x = logits_of(seed, rows)
    whole = plan_of(gate, native, x)
    shuffled = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    if gate.batch_invariant:
        some = shuffled[:count]
        alone = part(x, some, gate)
        assert torch.equal(alone.choices(), whole.choices()[some])
        assert torch.equal(alone.slot_weights(), whole.slot_weights()[some])
    if gate.causal:
        before = part(x, torch.arange(count), gate)
        assert torch.equal(before.choices(), whole.choices()[:count])
        assert torch.equal(before.slot_weights(), whole.slot_weights()[:count])


@pytest.mark.parametrize("name", [name for name, gate in REAL.items() if not gate.causal])
def test_a_gate_that_is_called_not_causal_is_not(name: str) -> None:
    gate, x = REAL[name], logits_of(5, 64, "zipf")
    first = torch.arange(32)
    assert not torch.equal(part(x, first, gate).choices(), plan_of(gate, native, x).choices()[:32])


@pytest.mark.parametrize("name", [name for name, gate in REAL.items() if not gate.batch_invariant])
def test_a_gate_that_is_called_not_invariant_is_not(name: str) -> None:
    gate, x = REAL[name], logits_of(5, 64, "zipf")
    some = torch.arange(1, 64, 2)[: rows_of(gate, 32)]
    assert not torch.equal(part(x, some, gate).choices(), plan_of(gate, native, x).choices()[some])


@pytest.mark.parametrize("name", REAL)
def test_repeats_are_equal(name: str) -> None:
    x, hashes = logits_of(1, 256), set()
    for _ in range(100):
        plan = plan_of(REAL[name], native, x)
        assert plan.weights is not None
        data = b"".join(t.numpy().tobytes() for t in (plan.rows, plan.offsets, plan.inverse))
        hashes.add(hashlib.sha256(data + plan.weights.numpy().tobytes()).hexdigest())
    assert len(hashes) == 1


@every_gate
@backends
def test_a_row_without_numbers_chooses_nothing(ops: ModuleType, name: str) -> None:
    gate = GATES[name](given)
    x = logits_of(0, 16)
    x[3], x[7] = torch.nan, -torch.inf
    plan = plan_of(gate, ops, x)
    plan.validate()
    assert bool(plan.slot_weights().isfinite().all())
    if name not in ("hash", "dselect_static"):  # these do not read x
        assert plan.choices()[3].tolist() == [-1] * gate.choices
        if not name.startswith("dselect"):  # -inf is a 0 for a bit
            assert plan.choices()[7].tolist() == [-1] * gate.choices
    if gate.batch_invariant:
        clean = x.clone()
        clean[3] = clean[7] = 0.0
        others = [n for n in range(16) if n not in (3, 7)]
        expected = plan_of(gate, ops, clean)
        assert torch.equal(plan.choices()[others], expected.choices()[others])


@pytest.mark.parametrize("name", ["switch", "topk", "softmax_of_chosen", "grouped, v3", "sam",
                                  "sparse_mixer", "dts", "ktop1", "expert_choice"])  # fmt: skip
@backends
def test_an_expert_without_a_number_is_not_chosen(ops: ModuleType, name: str) -> None:
    gate = GATES[name](given)
    x = logits_of(0, 24)
    x[:, 2] = torch.nan
    x[:, 5] = -torch.inf
    ids = plan_of(gate, ops, x).choices()
    assert not bool(((ids == 2) | (ids == 5)).any()) and bool((ids >= 0).any())


@pytest.mark.parametrize("name", ["switch", "topk", "softmax_of_chosen", "adaptive", "dts", "sam",
                                  "sparse_mixer", "grouped, v2", "sigmoid_of_chosen"])  # fmt: skip
@backends
def test_ties_go_to_the_lower_expert(ops: ModuleType, name: str) -> None:
    gate = GATES[name](given)
    plan = plan_of(gate, ops, torch.zeros(3, E))
    used = int((plan.choices()[0] >= 0).sum())
    assert plan.choices()[:, :used].tolist() == [list(range(used))] * 3


def test_the_sigmoid_of_large_logits_still_tells_them_apart() -> None:
    """float32 sigmoids of 30 and 40 are both 1."""
    for kind, settings_ in (("sigmoid_of_chosen", {"k": 1}), ("sigmoid_of_chosen", {"k": 2})):
        gate = constructor_of(kind)(Given(3), **settings_)
        plan = gate.plan(reference, torch.tensor([[30.0, 40.0, 20.0]]))
        assert plan.choices().tolist() == [[1, 0][: gate.choices]]
        assert gate.weights_input


def test_what_the_gates_say_of_themselves() -> None:
    assert not constructor_of("topk")(Given(8), 2).weights_input
    longcat = GATES["topk, longcat"](given)
    assert longcat.identity_experts == 2 and longcat.num_experts == 8


@backends
@pytest.mark.parametrize("seed", range(5))
def test_identity_experts_are_split_off(ops: ModuleType, seed: int) -> None:
    gate = GATES["topk, longcat"](given)
    plan = plan_of(gate, ops, logits_of(seed, 40))
    rest, own = split_identity(ops, plan, gate.identity_experts)
    rest.validate()
    assert rest.num_segments == E - 2
    ids, weights = plan.choices(), plan.slot_weights()
    assert torch.equal(rest.choices(), ids.masked_fill(ids >= E - 2, -1))
    assert torch.allclose(own + rest.slot_weights().sum(1), weights.sum(1))
    assert bool((own > 0).any()) and bool((own == 0).any())


# ---- the registry ----


def spec(**router: object) -> ExpertSpec:
    return ExpertSpec(E, 2, 16, (0,), RouterSpec(**router))  # type: ignore[arg-type]


def test_the_format_names_gates() -> None:
    weight = Weight.pack(torch.eye(E))
    x = logits_of(0, 20)[:, :E].contiguous()
    bias = torch.randn(E, generator=torch.Generator().manual_seed(0))
    gate = gate_of(spec(normalize=True, bias=True), weight, bias, None)
    assert_same_choices(
        gate.plan(reference, x), constructor_of("topk")(Given(E), 2).plan(reference, x + bias)
    )
    mixer = gate_of(spec(kind="sparse_mixer", epsilon=0.1), weight, None, None)
    expected = constructor_of("sparse_mixer")(Given(E), 0.1).plan(reference, x)
    assert_same_choices(mixer.plan(reference, x), expected)
    fields = {"score": "sigmoid", "normalize": True, "scale": 2.5, "groups": 4, "top_groups": 2,
              "group_score": "sum2", "epsilon": 1e-20, "selection_bias": True}  # fmt: skip
    grouped = gate_of(spec(**fields), weight, None, bias)
    expected = constructor_of("grouped")(Given(E), 2, 4, 2, 2.5, bias).plan(reference, x)
    assert_same_choices(grouped.plan(reference, x), expected)


def test_every_field_of_the_spec_arrives() -> None:
    fields = {"score": "sigmoid", "normalize": True, "epsilon": 0.5, "scale": 3.0, "groups": 4,
              "top_groups": 3, "group_score": "sum2", "round_weights": True}  # fmt: skip
    gate = gate_of(spec(**fields), Weight.pack(torch.eye(E).bfloat16()), None, None)
    assert isinstance(gate, TopKGate) and gate.rule == TopK(2, **fields)  # type: ignore[arg-type]
    chosen = gate_of(spec(over_chosen=True), Weight.pack(torch.eye(E)), None, None)
    assert isinstance(chosen, TopKGate) and chosen.rule == TopK(2, "softmax", over_chosen=True)


def test_weights_are_rounded_where_the_model_is_bfloat16() -> None:
    for dtype, rounds in ((torch.float32, False), (torch.bfloat16, True)):
        gate = gate_of(spec(round_weights=True), Weight.pack(torch.eye(E).to(dtype)), None, None)
        assert isinstance(gate, TopKGate) and gate.rule.round_weights is rounds


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: constructor_of("top2"), "unknown kind 'top2'; known are .*switch"),
        (lambda: gate_of(spec(kind="soft"), Weight.pack(torch.eye(E)), None, None), "known are"),
        (lambda: gate_of(spec(), Weight.pack(torch.eye(4)), None, None), "4 rows for 8 experts"),
        (lambda: gate_of(spec(bias=True), Weight.pack(torch.eye(E)), None, None), "bias is miss"),
        (
            lambda: gate_of(spec(), Weight.pack(torch.eye(E)), None, torch.ones(E)),
            "selection_bias is given",
        ),
        (lambda: constructor_of("ktop1")(Given(8), 3), "8 experts do not form 3"),
        (lambda: constructor_of("sam")(Given(8), 3, 1), "8 experts do not form 3"),
        (lambda: constructor_of("sam")(Given(8), 4, 3), "k must lie in"),
        (lambda: constructor_of("topk")(Given(8), 9), "9 of 8"),
        (lambda: constructor_of("topk")(Given(8), 2, identity_experts=8), "leave none"),
        (lambda: constructor_of("dts")(Given(8), 1.0), "threshold must lie"),
        (lambda: constructor_of("sparse_mixer")(Given(1)), "two experts"),
        (lambda: constructor_of("expert_choice")(Given(8), 9), "k must lie in"),
        (lambda: constructor_of("dselect_k")(Given(5), Given(2), 8), "need 6 bits, got 5"),
        (lambda: constructor_of("hash")(torch.tensor([0, 9]), 8), "must lie in"),
        (lambda: constructor_of("hash")(torch.tensor([0.5]), 8), "must be integer"),
        (lambda: constructor_of("hash")(torch.tensor([0]), 8, Given(4)), "4 experts, not 8"),
        (
            lambda: constructor_of("hash")(torch.tensor([0]), 8).plan(native, torch.ones(1, 8)),
            "no tokens were given",
        ),
        (
            lambda: constructor_of("hash")(torch.tensor([0]), 8).plan(
                native, torch.ones(1, 8), tokens=torch.tensor([-1])
            ),
            "tokens must lie in",
        ),
        (
            lambda: constructor_of("base_auction")(Given(8)).plan(native, torch.ones(9, 8)),
            "9 tokens cannot",
        ),
    ],
)
def test_refusals(make: object, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        make()  # type: ignore[operator]
