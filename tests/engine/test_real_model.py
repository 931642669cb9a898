"""The engine on the real decoder: what a request gets is its own business (P1, P3)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import pyruntime.engine.runtime
from pyruntime.engine.engine import EngineConfig
from pyruntime.engine.llm import LLM
from pyruntime.engine.request import SamplingParams
from pyruntime.engine.runtime import Runtime
from pyruntime.errors import InvalidInput
from pyruntime.gates.policy import ComputePolicy
from tests.engine.real_model import gated_folder

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    # A model this small only waits at the barriers of a second thread.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield pyruntime.engine.runtime.load(gated_folder(tmp_path_factory.mktemp("gated")))
    torch.set_num_threads(threads)


def prompts(count: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(2)
    lengths = [40, 7, 83, 1, 32, 64, 19, 33]
    return [torch.randint(3, 259, (n,), generator=random).tolist() for n in lengths[:count]]


def reference(runtime: Runtime, prompt: list[int], policy: ComputePolicy) -> list[int]:
    """Greedy by the definition: a full forward pass for every token, no cache."""
    tokens = list(prompt)
    for _ in range(GREEDY.max_tokens or 0):
        logits = runtime.forward([tokens], policy).logits[0]
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("budget", [1.0, 0.6])
def test_greedy_is_the_uncached_model(runtime: Runtime, budget: float) -> None:
    policy = ComputePolicy(budget=budget)
    for prompt in prompts(3):
        (output,) = LLM(runtime).generate([prompt], GREEDY, policy)
        assert output.outputs[0].token_ids == reference(runtime, prompt, policy)


@pytest.mark.parametrize(("step_tokens", "packed_below"), [(8, 1.0), (33, 1.0), (512, 0.4)])
def test_tokens_and_compute_do_not_depend_on_batch_mates_or_chunks(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, step_tokens: int, packed_below: float
) -> None:
    monkeypatch.setattr(runtime.decisions, "packed_below", packed_below)
    each = prompts(8)
    policies = [ComputePolicy(budget=b) for b in (1.0, 0.6, 0.6, 0.3, 1.0, 0.75, 0.6, 0.0)]
    alone = [
        LLM(runtime).generate([prompt], GREEDY, policy)[0]
        for prompt, policy in zip(each, policies, strict=True)
    ]
    config = EngineConfig(max_num_seqs=5, max_step_tokens=step_tokens)
    together = LLM(runtime, config=config).generate(each, GREEDY, policies)
    for one, other in zip(alone, together, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        # Running all rows where packing would be slower is really executed, and counted: then,
        # and only then, what a request costs depends on who else is there.
        if packed_below == 1.0:
            assert one.outputs[0].compute == other.outputs[0].compute
            assert one.compute_mean == pytest.approx(other.compute_mean)


def test_less_budget_is_less_compute_and_it_is_counted(runtime: Runtime) -> None:
    policies = [ComputePolicy(budget=b) for b in (1.0, 0.75, 0.5, 0.25)]
    outputs = LLM(runtime).generate([prompts(1)[0]] * 4, GREEDY, policies)
    means = [output.compute_mean for output in outputs]
    assert means == sorted(means, reverse=True) and means[0] > means[-1] + 0.2


def test_seeded_sampling_on_the_model(runtime: Runtime) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=11, max_tokens=20)
    llm = LLM(runtime)
    (alone,) = llm.generate([prompts(1)[0]], params)
    mixed = llm.generate([*prompts(5)], params)
    assert mixed[0].outputs[0].token_ids == alone.outputs[0].token_ids


@pytest.mark.parametrize("mode", ["batch_quantile", "seq_quantile", "exact_k"])
def test_quantile_modes_run_whole_and_apart(runtime: Runtime, mode: str) -> None:
    """A published rule beside causal requests, in a step budget smaller than its prompt."""
    each = prompts(6)
    quantile = ComputePolicy(budget=0.5, mode=mode)
    policies = [quantile, ComputePolicy(), quantile, ComputePolicy(budget=0.6), quantile, None]
    config = EngineConfig(max_num_seqs=6, max_step_tokens=16)
    outputs = LLM(runtime, config=config).generate(each, GREEDY, policies)
    assert all(len(o.outputs[0].token_ids) == 24 for o in outputs)
    assert [o.policy.mode for o in outputs[:2]] == [mode, "calibrated"]
    causal = LLM(runtime).generate([each[3]], GREEDY, policies[3])
    assert causal[0].outputs[0].token_ids == outputs[3].outputs[0].token_ids


def test_batch_quantile_skips_nothing_when_it_decodes_alone(runtime: Runtime) -> None:
    """GateSkip: one row has no quantile, so batch-1 decode runs everything."""
    policy = ComputePolicy(budget=0.5, mode="batch_quantile")
    (output,) = LLM(runtime).generate([prompts(1)[0]], GREEDY, policy)
    (dense,) = LLM(runtime).generate([prompts(1)[0]], GREEDY, ComputePolicy(budget=1.0))
    assert output.outputs[0].compute[1:] == dense.outputs[0].compute[1:]


def test_copied_keys_take_their_own_steps(runtime: Runtime) -> None:
    each = prompts(4)
    copied = ComputePolicy(budget=0.5, kv_mode="copy")
    plain = ComputePolicy(budget=0.5)
    mixed = LLM(runtime).generate(each, GREEDY, [copied, plain, copied, plain])
    apart = LLM(runtime).generate(each[:1], GREEDY, copied)
    assert mixed[0].outputs[0].token_ids == apart[0].outputs[0].token_ids
    assert mixed[0].policy.kv_mode == "copy" and mixed[1].policy.kv_mode == "dense"


def test_text_in_text_out(runtime: Runtime) -> None:
    (output,) = LLM(runtime).generate("hello", SamplingParams(temperature=0, max_tokens=8))
    assert output.prompt == "hello" and isinstance(output.outputs[0].text, str)


def test_a_budget_the_model_cannot_honour_is_refused(runtime: Runtime) -> None:
    with pytest.raises(InvalidInput, match="budget"):
        LLM(runtime).generate([[5]], GREEDY, ComputePolicy(budget=1.5))
