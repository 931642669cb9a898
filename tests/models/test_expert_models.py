"""Expert models: what is counted, replayed and promised; that a row is the same in any batch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from pyruntime.errors import InvalidInput
from pyruntime.format.spec import RouterSpec
from pyruntime.gates.policy import ComputePolicy, ExpertPolicy
from tests.models.expert_models import LATENT, SINKS, experts, runtime_of, spec_of
from tests.models.session import Session, logits_of, random_tokens

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = random_tokens(5, 2, 37)
MODELS: dict[str, dict[str, Any]] = {
    "shared": {},
    "latent": LATENT,
    "latent without query rank": {
        **LATENT, "latent": dataclasses.replace(LATENT["latent"], q_rank=None),
    },
    "sinks and window": SINKS,
    "bfloat16": {"dtype": "bfloat16"},
    "latent bfloat16": {**LATENT, "dtype": "bfloat16"},
    "sinks bfloat16": {**SINKS, "dtype": "bfloat16"},
    "multipliers": {
        "residual_multiplier": 0.22, "embedding_multiplier": 12.0, "logits_scaling": 6.0,
        "attention_scale": 0.1,
    },
    "layer norm": {"norm": "layer", "head_bias": True, "o_bias": True, "qkv_bias": True},
    "norm of all heads": {"qk_norm": True, "qk_norm_span": "all"},
    "grouped": {
        "experts": experts(
            num_experts=60, experts_per_token=8,
            router=RouterSpec(
                score="sigmoid", normalize=True, scale=2.5, selection_bias=True, groups=6,
                top_groups=3, group_score="sum2", epsilon=1e-20,
            ),
        )
    },
}  # fmt: skip
every_model = pytest.mark.parametrize("changes", MODELS.values(), ids=list(MODELS))


@every_model
def test_a_row_is_the_same_bits_in_any_batch_and_any_chunks(changes: dict[str, Any]) -> None:
    runtime = runtime_of(spec_of(**changes))
    together = logits_of(runtime.forward(TOKENS))
    assert bool(together.isfinite().all())
    for row, tokens in enumerate(TOKENS.tolist()):
        assert torch.equal(logits_of(runtime.forward([tokens]))[0], together[row])
        for size in (1, 7, 36):
            chunked, _ = Session(runtime).chunked("a", tokens, size)
            assert torch.equal(chunked, together[row])


# In bfloat16 choices may differ where activations tie: only float32 models compare logits.
@pytest.mark.parametrize("name", [name for name in MODELS if "bfloat16" not in name])
def test_native_agrees_with_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = MODELS[name]
    spec = spec_of(**changes)
    native = logits_of(runtime_of(spec).forward(TOKENS))
    monkeypatch.setattr("pyruntime.models.decoder.backend", lambda *_: _reference())
    slow = logits_of(runtime_of(spec).forward(TOKENS))
    assert float((native - slow).abs().max()) <= 1e-4 * max(1.0, float(slow.abs().max()))


def _reference() -> Any:
    from pyruntime.ops import reference

    return reference


@pytest.mark.parametrize("changes", [{}, LATENT, SINKS], ids=["shared", "latent", "sinks"])
def test_a_trace_counts_what_ran(changes: dict[str, Any]) -> None:
    """Every row by hand: attention, router, shared network, and the experts it used."""
    spec = spec_of(**changes)
    runtime = runtime_of(spec)
    assert spec.experts is not None
    d, heads, layers, inner = 40, 5, 3, spec.experts.intermediate_size
    for policy in (None, ComputePolicy(experts=1), ComputePolicy(experts=ExpertPolicy(mass=0.6))):
        trace = runtime.forward(TOKENS, policy).trace
        assert trace.experts is not None
        used = (trace.experts >= 0).sum(2).sum(0)
        assert trace.experts_per_token == pytest.approx(
            float((trace.experts >= 0).sum(2).float().mean())
        )
        for n in range(74):
            context, macs = n % 37 + 1, 0
            for layer in range(layers):
                seen = min(context, 9) if layer in spec.window_layers else context
                if spec.latent is None:
                    macs += 2 * d * 8 + 2 * d * heads * 8 + 2 * heads * 8 * seen
                else:
                    macs += d * 24 + d * 12 + 12 * heads * 14 + heads * 6 * 16 + heads * 16 * 10
                    macs += heads * 10 * d + heads * seen * (24 + 16)
                if layer not in spec.experts.layers:
                    macs += 3 * d * 52
                else:
                    macs += d * 5 + 3 * d * spec.experts.shared_size
                    macs += d if spec.experts.shared_gate else 0
            macs += 300 * d
            chosen = 2 * len(spec.experts.layers)
            assert int(trace.macs_per_row[n]) == macs + int(used[n]) * 3 * d * inner
            assert int(trace.macs_dense_per_row[n]) == macs + chosen * 3 * d * inner


def test_a_trace_can_be_replayed() -> None:
    runtime = runtime_of(spec_of())
    first = runtime.forward(TOKENS, ComputePolicy(experts=ExpertPolicy(mass=0.7)))
    again = runtime.forward(TOKENS, replay=first.trace)
    assert torch.equal(logits_of(again), logits_of(first))
    full = runtime.forward(TOKENS)
    assert not torch.equal(logits_of(full), logits_of(first))
    repeated = runtime.forward(TOKENS, ComputePolicy(experts=1), replay=full.trace)
    assert torch.equal(logits_of(repeated), logits_of(full))
    assert torch.equal(repeated.trace.macs_per_row, full.trace.macs_per_row)


def test_policies_share_a_batch() -> None:
    """Each sequence gets what it would get alone under its own policy."""
    runtime = runtime_of(spec_of())
    policies = [ComputePolicy(experts=1), ComputePolicy(experts=ExpertPolicy(gap=0.05))]
    together = runtime.forward(TOKENS, policies)
    for row, policy in enumerate(policies):
        alone = runtime.forward(TOKENS[row : row + 1], policy)
        assert torch.equal(logits_of(alone)[0], logits_of(together)[row])
    ids = together.trace.experts
    assert ids is not None
    assert bool((ids[:, :37, 1] == -1).all()) and bool((ids[:, :37, 0] >= 0).all())


def test_limits_that_cut_nothing_change_nothing() -> None:
    runtime = runtime_of(spec_of())
    full = logits_of(runtime.forward(TOKENS))
    for limit in (2, ExpertPolicy(mass=1.0), ExpertPolicy(gap=1.0)):
        assert torch.equal(logits_of(runtime.forward(TOKENS, ComputePolicy(experts=limit))), full)


def test_calibrated_budgets_cut_layer_by_layer() -> None:
    record = {
        "kind": "experts", "budgets": [1.0, 0.5], "thresholds": [[None, None], [1e-6, None]],
        "kept": [1.0, 0.75], "tokens": 64, "data_sha256": "0" * 64, "default_budget": 1.0,
    }  # fmt: skip
    runtime = runtime_of(spec_of(), calibration=record)
    ids = runtime.forward(TOKENS, ComputePolicy(budget=0.5)).trace.experts
    assert ids is not None
    assert bool((ids[0, :, 1] == -1).all()) and bool((ids[1] >= 0).all())


def test_policies_a_model_cannot_honour_are_refused() -> None:
    runtime = runtime_of(spec_of())
    with pytest.raises(InvalidInput, match="3 per token asked for, this model runs at most 2"):
        runtime.forward(TOKENS, ComputePolicy(experts=3))
    with pytest.raises(InvalidInput, match="calibrate"):
        runtime.forward(TOKENS, ComputePolicy(budget=0.5))
    with pytest.raises(InvalidInput, match="none to choose from"):
        runtime_of(spec_of(experts=None)).forward(TOKENS, ComputePolicy(experts=1))


def test_nan_and_equal_logits_are_defined() -> None:
    """A router without an opinion sends everyone to the lowest experts; NaN chooses nothing."""
    spec = spec_of(experts=experts(shared_size=0, shared_gate=False))
    runtime = runtime_of(spec)
    for layer in (1, 2):
        runtime.container.tensors[f"layers.{layer}.mlp.router.weight"].data.zero_()  # type: ignore[union-attr]
    ids = runtime.forward(TOKENS).trace.experts
    assert ids is not None and ids.unique(dim=1).flatten().tolist() == [0, 1, 0, 1]
    for layer in (1, 2):
        runtime.container.tensors[f"layers.{layer}.mlp.router.weight"].data.fill_(math.nan)  # type: ignore[union-attr]
    output = runtime.forward(TOKENS)
    assert output.trace.experts_per_token == 0.0
    assert bool(logits_of(output).isfinite().all())


def test_a_hundred_repeats_give_one_result() -> None:
    """On two threads, whose shares of the work differ from run to run."""
    runtime = runtime_of(spec_of(dtype="bfloat16"))
    torch.set_num_threads(2)
    first = logits_of(runtime.forward(TOKENS))
    assert all(torch.equal(logits_of(runtime.forward(TOKENS)), first) for _ in range(99))
