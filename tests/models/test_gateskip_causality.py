"""Who may influence whom: specification G11 to G14, G17, R4, R5."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyruntime.engine.runtime import Runtime, full_batch
from pyruntime.format.load import write_calibration
from pyruntime.gates.policy import ComputePolicy
from pyruntime.gates.routing import Rule
from pyruntime.layers.kv import PagedKV
from tests.models.session import Session, calibration, gated, opened, random_tokens

pytestmark = pytest.mark.usefixtures("one_thread")
CALIBRATED = ComputePolicy(budget=0.6, mode="calibrated")
QUANTILE = ComputePolicy(budget=0.6, mode="batch_quantile")
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vector f32": ({}, {}),
    "scalar f32": ({}, {"gate_type": "scalar"}),
    "scalar bf16": ({"dtype": torch.bfloat16}, {"gate_type": "scalar", "dtype": torch.bfloat16}),
    "vector bf16": ({"dtype": torch.bfloat16, "num_kv_heads": 5}, {"dtype": torch.bfloat16}),
    "mlp bf16": ({"dtype": torch.bfloat16}, {"gate_type": "mlp", "dtype": torch.bfloat16}),
    "entry f32": ({}, {"gating_mode": "before_module"}),
    "qwen3": ({"family": "qwen3", "num_heads": 4, "num_kv_heads": 2}, {"gate_type": "scalar"}),
}
every_model = pytest.mark.parametrize("runtime", MODELS, indirect=True)
one_model = pytest.mark.parametrize("runtime", ["vector f32"], indirect=True)


@pytest.fixture(scope="module")
def runtime(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    base, gates = MODELS[request.param]
    path, _ = gated(tmp_path_factory.mktemp("model"), base, **gates)
    write_calibration(path, calibration(opened(path)))
    return opened(path)


def prompts(*lengths: int) -> dict[str, list[int]]:
    return {str(i): random_tokens(i, n).tolist() for i, n in enumerate(lengths)}


LENGTHS = (40, 7, 83, 1, 32, 64, 19, 33)


@every_model
def test_g11_batch_mates_do_not_matter(runtime: Runtime) -> None:
    """Alone, among seven others with other budgets, decoding beside prefilling: the same bits."""
    each = prompts(*LENGTHS)
    alone_tokens: dict[str, list[int]] = {}
    alone_logits: dict[str, Tensor] = {}
    for name, prompt in each.items():
        tokens, logits = Session(runtime).greedy({name: prompt}, 8, CALIBRATED)
        alone_tokens |= tokens
        alone_logits |= logits
    tokens, logits = Session(runtime).greedy(each, 8, CALIBRATED)
    assert tokens == alone_tokens
    for name in each:
        assert torch.equal(logits[name], alone_logits[name])
    # Mates of any budget, at any phase.
    mixed = Session(runtime)
    budgets = {
        name: ComputePolicy(budget=b)
        for name, b in zip(each, (0.6, 1, 0.3, 0, 0.9, 0.6, 0.6, 1), strict=True)
    }
    first = mixed.step({"0": each["0"], "1": each["1"]}, budgets)
    assert torch.equal(first["0"][-1], alone_logits["0"][0])
    for i in range(1, 8):
        last = [int(alone_logits["0"][i - 1].argmax())]
        mates = {str(n): each[str(n)][5 * i - 5 : 5 * i] for n in (2, 4, 5)}
        mates = {name: ids for name, ids in mates.items() if ids}
        step = mixed.step({**dict(list(mates.items())[:1]), "0": last, **mates}, budgets)
        assert torch.equal(step["0"][-1], alone_logits["0"][i])


@every_model
@pytest.mark.parametrize("size", [1, 7, 32, 50])
def test_g11_r05_chunked_prefill_takes_the_same_routes(runtime: Runtime, size: int) -> None:
    prompt = random_tokens(7, 83).tolist()
    whole = Session(runtime)
    expected = whole.step({"a": prompt}, CALIBRATED)["a"]
    logits, kept = Session(runtime).chunked("a", prompt, size, CALIBRATED)
    assert torch.equal(kept, whole.trace.kept)
    assert 0.3 < float(kept.float().mean()) < 0.9
    assert torch.equal(logits, expected)


@every_model
def test_g11_a_shared_prefix_is_as_good_as_ones_own(runtime: Runtime) -> None:
    """A prefix-cache hit: the second sequence starts on blocks the first one filled."""
    prefix, tails = random_tokens(1, 64).tolist(), random_tokens(2, 2, 13).tolist()
    shared = Session(runtime)
    shared.step({"a": prefix + tails[0]}, CALIBRATED)
    shared.fork("a", "b", 64)
    hit = shared.step({"b": tails[1]}, CALIBRATED)["b"]
    own = Session(runtime).step({"b": prefix + tails[1]}, CALIBRATED)["b"]
    assert torch.equal(hit, own[64:])


@every_model
def test_r05_a_preempted_request_recomputes_the_same_routes(runtime: Runtime) -> None:
    """Generated tokens become part of the prompt when a request starts over."""
    prompt = random_tokens(3, 20).tolist()
    session = Session(runtime)
    tokens, logits = session.greedy({"a": prompt}, 12, CALIBRATED)
    again = Session(runtime)
    recomputed = again.step({"a": prompt + tokens["a"][:-1]}, CALIBRATED)["a"]
    assert torch.equal(recomputed[19:], logits["a"])


@one_model
def test_r05_quantile_rules_do_not_survive_chunking(runtime: Runtime) -> None:
    """Why only causal modes may be chunked: the test above would notice."""
    prompt = random_tokens(7, 83).tolist()
    whole = Session(runtime)
    whole.step({"a": prompt}, QUANTILE)
    _, kept = Session(runtime).chunked("a", prompt, 32, QUANTILE)
    assert not torch.equal(kept, whole.trace.kept)


@one_model
def test_g11_batch_quantile_couples_the_batch(runtime: Runtime) -> None:
    prompt, mate = random_tokens(1, 30).tolist(), random_tokens(2, 30).tolist()

    def decisions(policy: ComputePolicy, *sequences: list[int]) -> Tensor:
        return runtime.forward(list(sequences), policy).trace.kept[..., :30]

    for mode, coupled in (("batch_quantile", True), ("exact_k", True), ("seq_quantile", False),
                          ("calibrated", False)):  # fmt: skip
        policy = ComputePolicy(budget=0.6, mode=mode)
        alone, together = decisions(policy, prompt), decisions(policy, prompt, mate)
        assert torch.equal(alone, together) != coupled, mode
        assert not bool(alone.all())


@every_model
def test_g12_batch_of_one_decodes_densely_under_a_batch_quantile(runtime: Runtime) -> None:
    session = Session(runtime)
    session.step({"a": random_tokens(0, 20).tolist()}, QUANTILE)
    assert not bool(session.trace.kept.all())
    for budget in (0.95, 0.6, 0.0):
        session.step({"a": [7]}, ComputePolicy(budget=budget, mode="batch_quantile"))
        assert bool(session.trace.kept.all())
    session.step({"a": [7], "b": [9]}, ComputePolicy(budget=0.95, mode="batch_quantile"))
    skipped = (~session.trace.kept).sum(-1)
    assert bool((skipped == 1).all())  # of two rows, "5 %" is one (§1.3)


@one_model
def test_seq_quantile_decodes_by_calibrated_thresholds(runtime: Runtime) -> None:
    kept = []
    for mode in ("seq_quantile", "calibrated"):
        session = Session(runtime)
        session.step({"a": random_tokens(0, 20).tolist()})
        for token in random_tokens(1, 12).tolist():
            session.step({"a": [token]}, ComputePolicy(budget=0.6, mode=mode))
            kept.append(session.trace.kept)
    assert all(torch.equal(a, b) for a, b in zip(kept[:12], kept[12:], strict=True))
    assert 0 < sum(int((~k).sum()) for k in kept)


@every_model
def test_g13_the_future_does_not_reach_back(runtime: Runtime) -> None:
    tokens = random_tokens(11, 1, 60)
    short = runtime.forward(tokens[:, :30], CALIBRATED)
    full = runtime.forward(tokens, CALIBRATED)
    assert isinstance(short.logits, Tensor) and isinstance(full.logits, Tensor)
    assert torch.equal(full.logits[:, :30], short.logits)
    assert torch.equal(full.trace.kept[..., :30], short.trace.kept)
    before, after = (
        runtime.forward(t, QUANTILE).trace.kept[..., :30] for t in (tokens[:, :30], tokens)
    )
    assert not torch.equal(before, after)  # the published rule looks ahead


# ---- keys and values of skipped tokens ----

WHERE, LENGTH = 10, 30


def perturbed(
    runtime: Runtime, layer: int, policy: ComputePolicy | None, skip_layers: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Residuals after every layer [L+1, T, d], of a run and of one whose token WHERE was changed
    at the entrance of `layer`; that token skips both branches in `skip_layers`."""
    tokens = random_tokens(5, LENGTH).tolist()
    forced = torch.ones(runtime.spec.num_layers, 2, LENGTH, dtype=torch.bool)
    forced[list(skip_layers), :, WHERE] = False
    results = []
    from pyruntime.layers.residual import Step

    model = runtime.model
    for change in (False, True):
        batch, blocks = full_batch([tokens])
        router = runtime.router(batch, [policy], forced)
        cos_sin = model._positions_to(batch)
        step = Step(model.ops, batch, PagedKV(runtime.spec, blocks), router, cos_sin)
        h = model._lookup(batch.tokens).clone()
        states = [h.clone()]
        with torch.inference_mode():
            for i, (attention, mlp) in enumerate(model.layers):
                if change and i == layer:
                    h[WHERE] += torch.linspace(-1, 1, h.shape[1]).to(h.dtype)
                attention(h, step)
                mlp(h, step)
                states.append(h.clone())
        results.append(torch.stack(states))
    return results[0], results[1]


@one_model
def test_g14_skipped_tokens_keep_their_keys_and_values(runtime: Runtime) -> None:
    before, after = perturbed(runtime, 1, ComputePolicy(), (1,))
    # Its own branches add nothing: what was put in comes out.
    assert torch.equal(before[2][WHERE], before[1][WHERE])
    moved = after[2] - before[2]
    assert bool((moved[WHERE + 1 :].abs().amax(1) > 1e-6).all())  # seen by all later tokens
    assert not bool(moved[:WHERE].any())


@one_model
def test_g14_copied_keys_and_values_are_those_of_the_layer_below(runtime: Runtime) -> None:
    copy = ComputePolicy(kv_mode="copy")
    # Skipped at layer 1, changed on the way in: layer 1 attends to layer 0's entries, made before.
    before, after = perturbed(runtime, 1, copy, (1,))
    assert not bool((after[2] - before[2])[torch.arange(LENGTH) != WHERE].any())
    # Changed before layer 0 made them: it acts, through them alone.
    before, after = perturbed(runtime, 0, copy, (0, 1))
    moved = (after - before)[2].abs().amax(1)
    assert bool((moved[WHERE + 1 :] > 1e-6).all())
    dense, copied = (perturbed(runtime, 1, p, (1,))[0][2] for p in (ComputePolicy(), copy))
    assert not torch.equal(dense, copied)


@one_model
def test_g14_layer_0_is_never_copied(runtime: Runtime) -> None:
    """With everything skipped at layer 0 only, copy and dense are the same model."""
    dense, copied = (
        perturbed(runtime, 0, ComputePolicy(kv_mode=kv), (0,))[0] for kv in ("dense", "copy")
    )
    assert torch.equal(dense, copied)


@one_model
def test_g14_copied_entries_are_the_same_bits(runtime: Runtime) -> None:
    from pyruntime.ops import reference

    session = Session(runtime)
    ids = random_tokens(5, LENGTH).tolist()
    forced = torch.rand(3, 2, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5
    session.step({"a": ids}, ComputePolicy(kv_mode="copy"), replay=forced)
    blocks = torch.tensor(session.blocks["a"])
    caches = [
        torch.cat(reference.read_cache(k, v, blocks, 8), -1)[:LENGTH]
        for k, v in zip(session.kv.keys, session.kv.values, strict=True)
    ]
    for layer in (1, 2):
        same = (caches[layer] == caches[layer - 1]).flatten(1).all(1)
        assert torch.equal(same, ~forced[layer, 0])
    assert session.trace.kv_mode == "copy"
    # The projections that did not run are not counted.
    dense = Session(runtime)
    dense.step({"a": ids}, replay=forced)
    kv = 2 * 40 * 8
    saved = dense.trace.macs_executed - session.trace.macs_executed
    assert saved == kv * int((~forced[1:, 0]).sum())


@every_model
def test_g17_decode_with_recorded_decisions_is_one_forward_pass(runtime: Runtime) -> None:
    ids = random_tokens(6, 50).tolist()
    forced = torch.rand(3, 2, 50, generator=torch.Generator().manual_seed(1)) < 0.6
    whole = runtime.forward([ids], replay=forced)
    session, logits = Session(runtime), []
    for begin, end in [(0, 33), *((i, i + 1) for i in range(33, 50))]:
        part = forced[..., begin:end].contiguous()
        logits.append(session.step({"a": ids[begin:end]}, replay=part)["a"])
        assert torch.equal(session.trace.kept, part)
    assert isinstance(whole.logits, Tensor)
    assert torch.equal(torch.cat(logits), whole.logits[0])
    # Every layer's cache holds every token, skipped or not, and nothing else.
    slots = sum(len(blocks) for blocks in session.blocks.values()) * 32
    for keys, values in zip(session.kv.keys, session.kv.values, strict=True):
        from pyruntime.ops import reference

        blocks = torch.tensor(session.blocks["a"])
        key, value = reference.read_cache(keys, values, blocks, runtime.spec.head_dim)
        for cache in (key, value):
            assert torch.equal(cache.float().abs().amax((1, 2)) > 0, torch.arange(slots) < 50)


# ---- nobody waits ----


class CountReads(TorchDispatchMode):
    """Counts the calls that bring a tensor's value to Python: a GPU would wait at each."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))

    def reads(self) -> int:
        names = ("aten.item.", "aten._local_scalar_dense.", "aten.nonzero.", "aten.is_nonzero.")
        return sum(n for name, n in self.calls.items() if name.startswith(names))


@one_model
@pytest.mark.parametrize("policy", [None, CALIBRATED])
def test_r04_no_value_is_read_per_layer(runtime: Runtime, policy: ComputePolicy | None) -> None:
    batch, blocks = full_batch([random_tokens(0, 40).tolist()])
    router = runtime.router(batch, [policy])
    with CountReads() as counted:
        runtime.model.forward(batch, PagedKV(runtime.spec, blocks), router)
    assert counted.reads() <= 1, counted.calls  # the newest position, once a step; not per branch
    if policy is None:
        return

    def reading(rule: Rule) -> Rule:
        return lambda layer, branch, scores: rule(layer, branch, scores) + 0 * float(scores[0])

    assert router.rule is not None
    slow = runtime.router(batch, [policy])
    slow.rule = reading(router.rule)
    with CountReads() as counted:
        runtime.model.forward(batch, PagedKV(runtime.spec, blocks), slow)
    assert counted.reads() >= 6  # the counter can see
