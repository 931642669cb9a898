from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyruntime.engine.engine import Engine, EngineConfig
from pyruntime.engine.llm import LLM
from pyruntime.engine.request import InvalidRequest, SamplingParams
from pyruntime.errors import InvalidInput
from pyruntime.gates.policy import ComputePolicy
from pyruntime.layers.kv import PagedKV
from tests.engine.fakes import BOOM, EOS, VOCAB, FakeModel, FakeRuntime, runtime_with_text

GREEDY = SamplingParams(temperature=0, max_tokens=12)


def alone(prompt: list[int], params: SamplingParams) -> list[int]:
    """The answer by the definition: the whole history, one token at a time, no engine."""
    model, tokens = FakeModel(), list(prompt)
    from types import SimpleNamespace

    while len(tokens) - len(prompt) < (params.max_tokens or 0):
        n = len(tokens)
        batch = SimpleNamespace(
            tokens=torch.tensor(tokens),
            slots=torch.arange(n),
            positions=torch.arange(n),
            seq_ids=torch.zeros(n, dtype=torch.int32),
            block_tables=torch.arange(n // 32 + 1)[None],
            logit_rows=torch.tensor([n - 1]),
        )
        tokens.append(int(model.forward(batch, None, None).argmax()))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


prompts = st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=80), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(prompts, st.integers(1, 5), st.sampled_from([5, 16, 512]))
def test_greedy_tokens_do_not_depend_on_batch_chunks_or_blocks(
    prompts: list[list[int]], seqs: int, step_tokens: int
) -> None:
    config = EngineConfig(max_num_seqs=seqs, max_step_tokens=step_tokens, max_model_len=128)
    llm = LLM(FakeRuntime(), config=config)  # type: ignore[arg-type]
    outputs = llm.generate(prompts, GREEDY)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.outputs[0].token_ids == alone(prompt, GREEDY)
        assert output.finished and output.outputs[0].finish_reason in ("stop", "length")
    llm.engine.scheduler.check()
    assert llm.engine.stats().free_blocks == llm.engine.stats().total_blocks


@settings(max_examples=40, deadline=None)
@given(prompts, st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40)), max_size=5))
def test_aborted_requests_disturb_nobody(
    prompts: list[list[int]], aborts: list[tuple[int, int]]
) -> None:
    engine = Engine(FakeRuntime(), EngineConfig(max_num_seqs=3, max_step_tokens=16))  # type: ignore[arg-type]
    requests = [engine.request(prompt, GREEDY) for prompt in prompts]
    for request in requests:
        engine.add_request(request)
    step = 0
    while engine.has_unfinished():
        for which, when in aborts:
            if when == step and which < len(requests):
                engine.abort(requests[which])
        engine.step()
        engine.scheduler.check()
        step += 1
    for request in requests:
        expected = alone(request.prompt_token_ids, GREEDY)
        assert request.output_token_ids == expected[: request.num_output]
        assert request.finish_reason == "abort" or request.num_output == len(expected)
    assert engine.stats().free_blocks == engine.stats().total_blocks


def test_seeded_sampling_does_not_depend_on_batch_mates() -> None:
    llm = LLM(FakeRuntime())  # type: ignore[arg-type]
    seeded = SamplingParams(temperature=1.5, seed=3, max_tokens=20)
    (single,) = llm.generate([[1, 2, 3]], seeded)
    mates = [SamplingParams(max_tokens=9), seeded, SamplingParams(temperature=0, max_tokens=30)]
    mixed = llm.generate([[9], [1, 2, 3], [7, 7]], mates)
    assert mixed[1].outputs[0].token_ids == single.outputs[0].token_ids


def text_llm(folder: Path, **config: int) -> LLM:
    return LLM(runtime_with_text(folder), config=EngineConfig(**config))  # type: ignore[arg-type]


def test_text_eos_and_stop(tmp_path: Path) -> None:
    llm = text_llm(tmp_path)
    params = SamplingParams(temperature=0, max_tokens=50)
    (output,) = llm.generate("hé, world<|echo|>", params)
    done = output.outputs[0]
    assert (done.text, done.finish_reason, done.stop_reason) == ("hé, world", "stop", None)
    assert done.token_ids[-1] == EOS and len(done.compute) == len(done.token_ids)
    cut = SamplingParams(temperature=0, max_tokens=50, stop=["wor", "zzz"])
    (output,) = llm.generate("hé, world<|echo|>", cut)
    done = output.outputs[0]
    assert (done.text, done.finish_reason, done.stop_reason) == ("hé, ", "stop", "wor")
    by_id = SamplingParams(temperature=0, max_tokens=50, stop_token_ids=[ord("w")])
    done = llm.generate("hé, world<|echo|>", by_id)[0].outputs[0]
    assert (done.text, done.finish_reason, done.stop_reason) == ("hé, ", "stop", ord("w"))


def test_held_text_is_released_at_the_limit_and_ignore_eos(tmp_path: Path) -> None:
    llm = text_llm(tmp_path)
    params = SamplingParams(temperature=0, max_tokens=5, stop=["world!"])
    done = llm.generate("a worl<|echo|>", params)[0].outputs[0]
    assert (done.text, done.finish_reason) == ("a wor", "length")
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    done = llm.generate("ab<|echo|>", params)[0].outputs[0]
    assert done.token_ids == [97, 98, EOS, EOS, EOS] and done.finish_reason == "length"
    assert done.text == "ab"


def test_stream_grows_and_dropping_it_frees_everything(tmp_path: Path) -> None:
    llm = text_llm(tmp_path)
    params = SamplingParams(temperature=0, max_tokens=30)
    seen = [o.outputs[0].text for o in llm.generate("hello<|echo|>", params, stream=True)]
    assert seen == ["h", "he", "hel", "hell", "hello", "hello"]
    stream = llm.generate(["hello<|echo|>", "other<|echo|>"], params, stream=True)
    next(stream)
    assert llm.engine.stats().running == 2
    stream.close()  # type: ignore[attr-defined]
    stats = llm.engine.stats()
    assert (stats.running, stats.waiting, stats.free_blocks) == (0, 0, stats.total_blocks)


def test_abort_keeps_what_there_is(tmp_path: Path) -> None:
    engine = text_llm(tmp_path).engine
    request = engine.request("hello<|echo|>", SamplingParams(temperature=0, stop="lox"))
    engine.add_request(request)
    for _ in range(4):
        engine.step()
    output = engine.abort(request)
    assert output is not None
    assert (output.finish_reason, output.text, request.text.text) == ("abort", "l", "hell")
    assert engine.abort(request) is None and not engine.has_unfinished()
    engine.scheduler.check()


def test_a_failing_step_loses_no_blocks() -> None:
    llm = LLM(FakeRuntime())  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="injected fault"):
        llm.generate([[1], [BOOM]], GREEDY)
    assert llm.engine.stats().free_blocks == llm.engine.stats().total_blocks
    assert llm.generate([[1]], GREEDY)[0].finished


def test_the_policy_that_was_applied_is_in_the_output() -> None:
    llm = LLM(FakeRuntime())  # type: ignore[arg-type]
    policies = [ComputePolicy(), ComputePolicy(budget=0.25)]
    dense, cheap = llm.generate([[1, 2], [1, 2]], GREEDY, policies)
    assert dense.policy == ComputePolicy(budget=1.0, mode="calibrated", kv_mode="dense")
    assert dense.compute_mean == 1.0 and dense.outputs[0].compute == [1.0] * 12
    assert cheap.policy.budget == 0.25
    assert cheap.compute_mean == 0.25 and cheap.outputs[0].compute == [0.25] * 12


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], GREEDY, "prompt: expected at least one token"),
        ([VOCAB], GREEDY, f"prompt: expected token ids from 0 to {VOCAB - 1}, got {VOCAB}"),
        ([-1], GREEDY, "got -1"),
        ([1.5], GREEDY, "got 1.5"),
        ([1] * 512, GREEDY, "512 tokens leave no room for output in a context of 512"),
        ([1] * 510, GREEDY, r"max_tokens: expected at most 2 \(512 context - 510 prompt"),
        ("text", GREEDY, "prompt: this model has no tokenizer"),
        ("", GREEDY, "empty string"),
        ([1], SamplingParams(stop="x"), "stop: this model has no tokenizer"),
    ],
)
def test_requests_that_cannot_run_are_refused(
    prompt: list[int] | str, params: SamplingParams, message: str
) -> None:
    llm = LLM(FakeRuntime())  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=message):
        llm.generate([prompt], params)
    assert not llm.engine.has_unfinished()


def test_a_budget_outside_its_range_is_refused() -> None:
    with pytest.raises(InvalidInput, match="budget"):
        LLM(FakeRuntime()).generate([[1]], GREEDY, ComputePolicy(budget=1.5))  # type: ignore[arg-type]


def test_no_limit_means_the_rest_of_the_context() -> None:
    llm = LLM(FakeRuntime(), config=EngineConfig(max_model_len=40))  # type: ignore[arg-type]
    params = SamplingParams(temperature=0, max_tokens=None)
    assert len(llm.generate([[1] * 30], params)[0].outputs[0].token_ids) == 10


def test_one_parameter_set_per_prompt_is_checked() -> None:
    llm = LLM(FakeRuntime())  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="expected one, or one for each of 2, got 3"):
        llm.generate([[1], [2]], [GREEDY] * 3)
    assert llm.generate([], GREEDY) == []


def test_a_small_cache_shortens_the_context_and_a_tiny_one_is_refused() -> None:
    block = PagedKV.bytes_per_block(FakeRuntime().spec)
    engine = Engine(FakeRuntime(), EngineConfig(kv_bytes=3 * block))  # type: ignore[arg-type]
    assert engine.stats().total_blocks == 3 and engine.max_model_len == 96
    with pytest.raises(InvalidRequest, match="kv_bytes"):
        Engine(FakeRuntime(), EngineConfig(kv_bytes=10))  # type: ignore[arg-type]
