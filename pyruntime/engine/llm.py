"""LLM(path).generate(prompts): the engine without a server, in vLLM's words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, cast, overload

from pyruntime.engine.engine import Engine, EngineConfig, Prompt
from pyruntime.engine.request import InvalidRequest, Request, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from pyruntime.engine.runtime import Runtime
    from pyruntime.gates.policy import ComputePolicy

T = TypeVar("T")


class LLM:
    """A model ready to generate. `path` is a runtime folder, or a Runtime already loaded."""

    def __init__(
        self,
        path: str | Path | Runtime,
        *,
        device: str = "cpu",
        verify: bool = True,
        config: EngineConfig = EngineConfig(),  # noqa: B008
    ) -> None:
        if isinstance(path, str | Path):
            from pyruntime.engine.runtime import load

            path = load(path, device=device, verify=verify)
        self.engine = Engine(path, config)

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        policy: ComputePolicy | Sequence[ComputePolicy] | None = None,
        *,
        stream: Literal[False] = False,
    ) -> list[RequestOutput]: ...

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        policy: ComputePolicy | Sequence[ComputePolicy] | None = None,
        *,
        stream: Literal[True],
    ) -> Iterator[RequestOutput]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        policy: ComputePolicy | Sequence[ComputePolicy] | None = None,
        *,
        stream: bool = False,
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        """One output per prompt, in order; with `stream`, an iterator of growing outputs.

        A prompt is text or a list of token ids. Parameters and policies are one for all, or one
        per prompt. Nothing runs unless every prompt is valid; raises InvalidInput otherwise.
        """
        each = _as_prompts(prompts)
        params = _per_prompt("sampling_params", sampling_params, len(each))
        policies = _per_prompt("policy", policy, len(each))
        requests = [
            self.engine.request(p, s, c) for p, s, c in zip(each, params, policies, strict=True)
        ]
        grown = self._run(requests)
        if stream:
            return (RequestOutput.of(request) for request in grown)
        for _ in grown:
            pass
        return [RequestOutput.of(request) for request in requests]

    def _run(self, requests: list[Request]) -> Iterator[Request]:
        """Yields a request each time it has grown."""
        by_id = {request.id: request for request in requests}
        try:
            for request in requests:
                self.engine.add_request(request)
            while self.engine.has_unfinished():
                for output in self.engine.step():
                    yield by_id[output.request_id]
        finally:
            # Also when the caller drops the iterator half way, or a step raises.
            for request in requests:
                self.engine.abort(request)


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [cast("Prompt", prompts)]
    return list(cast("Sequence[Prompt]", prompts))


def _per_prompt(name: str, value: T | Sequence[T] | None, count: int) -> list[T | None]:
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise InvalidRequest(name, f"expected one, or one for each of {count}, got {len(value)}")
    return list(value)
