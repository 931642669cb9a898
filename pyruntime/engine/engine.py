"""Schedule → run → append: the whole engine. One thread owns it; nothing here locks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pyruntime.engine.detokenize import TextStream
from pyruntime.engine.kv import BlockManager
from pyruntime.engine.request import (
    FinishReason,
    InvalidRequest,
    Request,
    SamplingParams,
    Status,
    StepOutput,
)
from pyruntime.engine.runner import Runner
from pyruntime.engine.sampling import make_generator
from pyruntime.engine.scheduler import Scheduler
from pyruntime.gates.policy import ComputePolicy
from pyruntime.layers.kv import BLOCK, PagedKV

if TYPE_CHECKING:
    from pyruntime.engine.runtime import Runtime
    from pyruntime.engine.tokenizer import Tokenizer

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of an engine. kv_bytes bounds the cache; max_model_len None means the model's own."""

    max_num_seqs: int = 64
    max_step_tokens: int = 512
    max_model_len: int | None = None
    kv_bytes: int = 1 << 30


@dataclass(frozen=True, slots=True)
class EngineStats:
    running: int
    waiting: int
    free_blocks: int
    total_blocks: int
    steps: int


class Engine:
    """Continuous batching over one model.

    `request` checks and builds a request and touches no engine state (any thread may call it);
    `add_request`, `step` and `abort` belong to one thread.
    """

    def __init__(self, runtime: Runtime, config: EngineConfig = EngineConfig()) -> None:
        self.runtime = runtime
        self.max_model_len = min(
            config.max_model_len or runtime.spec.max_positions, runtime.spec.max_positions
        )
        most = config.max_num_seqs * -(-self.max_model_len // BLOCK)
        fit = config.kv_bytes // PagedKV.bytes_per_block(runtime.spec)
        if fit < 1:
            raise InvalidRequest("kv_bytes", f"{config.kv_bytes} hold not one block of this model")
        blocks = BlockManager(min(most, fit))
        self.max_model_len = min(self.max_model_len, blocks.capacity)
        self.config = config
        self.scheduler = Scheduler(blocks, config.max_num_seqs, config.max_step_tokens)
        self.runner = Runner(runtime, blocks)
        self._ids = itertools.count()

    def request(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        policy: ComputePolicy | None = None,
        *,
        request_id: str | None = None,
    ) -> Request:
        """A request ready for add_request. Raises InvalidInput naming what is wrong."""
        sampling = sampling or SamplingParams()
        tokenizer = self.runtime.tokenizer
        ids = self._token_ids(prompt)
        if sampling.stop and tokenizer is None:
            raise InvalidRequest("stop", "this model has no tokenizer; use stop_token_ids")
        spec = self.runtime.spec
        eos = () if sampling.ignore_eos else spec.eos_token_ids
        return Request(
            id=request_id or f"request-{next(self._ids)}",
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=ids,
            sampling=sampling,
            policy=self._policy(policy or ComputePolicy()),
            max_tokens=self._max_tokens(len(ids), sampling.max_tokens),
            stop_ids=frozenset(eos) | frozenset(sampling.stop_token_ids),
            text=TextStream(tokenizer, tuple(sampling.stop)),
            generator=make_generator(sampling),
        )

    def chat_tokens(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a chat through the model's template. Raises InvalidInput."""
        return self._tokenizer("messages").encode_chat(messages)

    def add_request(self, request: Request) -> str:
        """Queues a request and returns its id. Raises InvalidRequest if it could never run."""
        self.scheduler.add(request)
        return request.id

    def step(self) -> list[StepOutput]:
        """Runs one step; what each sampling request gained, in schedule order."""
        slices = self.scheduler.schedule()
        if not slices:
            return []
        sampled = self.runner.run(slices)
        outputs = []
        for s, token in zip((s for s in slices if s.samples), sampled, strict=True):
            outputs.append(self._append(s.request, token))
        return outputs

    def abort(self, request: Request) -> StepOutput | None:
        """Ends a request and frees its place now; None when it had already finished."""
        if request.status is Status.FINISHED:
            return None
        text = request.text.flush()
        return self._finish(request, "abort", text, ())

    def has_unfinished(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running)

    def stats(self) -> EngineStats:
        scheduler = self.scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            free_blocks=scheduler.kv.num_free,
            total_blocks=scheduler.kv.num_blocks,
            steps=scheduler.steps,
        )

    def _append(self, request: Request, token: int) -> StepOutput:
        request.tokens.append(token)
        if token in request.stop_ids:
            if token not in self.runtime.spec.eos_token_ids:
                request.stop_reason = token
            return self._finish(request, "stop", request.text.flush(), (token,))
        text = request.text.push(token)
        if request.text.stopped is None and request.num_output == request.max_tokens:
            text += request.text.flush()
            if request.text.stopped is None:
                return self._finish(request, "length", text, (token,))
        if request.text.stopped is not None:
            request.stop_reason = request.text.stopped
            return self._finish(request, "stop", text, (token,))
        return _output(request, text, (token,))

    def _finish(
        self, request: Request, reason: FinishReason, text: str, tokens: tuple[int, ...]
    ) -> StepOutput:
        self.scheduler.finish(request, reason)
        return _output(request, text, tokens)

    def _token_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if not prompt:
                raise InvalidRequest("prompt", "expected text, got an empty string")
            ids = self._tokenizer("prompt").encode(prompt)
        else:
            ids = list(prompt)
        if not ids:
            raise InvalidRequest("prompt", "expected at least one token, got none")
        vocab = self.runtime.spec.vocab_size
        for token in ids:
            if not isinstance(token, int) or not 0 <= token < vocab:
                raise InvalidRequest(
                    "prompt", f"expected token ids from 0 to {vocab - 1}, got {token!r}"
                )
        return ids

    def _policy(self, policy: ComputePolicy) -> ComputePolicy:
        """The policy with nothing left open: what is logged and reported is what was applied."""
        mode, budget = self.runtime.resolve(policy)
        stored = self.runtime.gates.kv_mode if self.runtime.gates is not None else "dense"
        return replace(policy, mode=mode, budget=budget, kv_mode=policy.kv_mode or stored)

    def _tokenizer(self, field: str) -> Tokenizer:
        if self.runtime.tokenizer is None:
            raise InvalidRequest(field, "this model has no tokenizer; send a prompt of token ids")
        return self.runtime.tokenizer

    def _max_tokens(self, prompt: int, asked: int | None) -> int:
        room = self.max_model_len - prompt
        if room < 1:
            raise InvalidRequest(
                "prompt",
                f"{prompt} tokens leave no room for output in a context of {self.max_model_len}",
            )
        if asked is not None and asked > room:
            raise InvalidRequest(
                "max_tokens",
                f"expected at most {room} ({self.max_model_len} context - {prompt} prompt tokens), "
                f"got {asked}",
            )
        return asked or room


def _output(request: Request, text: str, tokens: tuple[int, ...]) -> StepOutput:
    return StepOutput(
        request_id=request.id,
        text=text,
        token_ids=tokens,
        compute=tuple(request.compute[len(request.compute) - len(tokens) :]),
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
        compute_mean=request.compute_mean,
    )
