"""A request: what was asked (SamplingParams, policy), what has been produced, and how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Literal

import torch

from pyruntime.errors import InvalidInput
from pyruntime.gates.policy import ComputePolicy

if TYPE_CHECKING:
    from pyruntime.engine.detokenize import TextStream

FinishReason = Literal["stop", "length", "abort"]
_MAX_STOPS = 16
_GREEDY_BELOW = 1e-5


class InvalidRequest(InvalidInput):
    """A request that can never run; `field` is the argument at fault, for the server's `param`."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """vLLM's names and defaults. top_k 0 (or -1) and top_p 1 filter nothing.

    A temperature below 1e-5 is greedy: float32 logits divided by less are not finite.
    max_tokens None means whatever the context leaves. Raises InvalidRequest naming the field.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stops)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        _expect(self.n == 1, "n", "1, the only supported value", self.n)
        _expect(0 <= self.temperature < float("inf"), "temperature", "0 or more", self.temperature)
        _expect(self.top_k >= -1, "top_k", "-1, 0 (both: no limit) or more", self.top_k)
        _expect(0 < self.top_p <= 1, "top_p", "a number in (0, 1]", self.top_p)
        if self.max_tokens is not None:
            _expect(self.max_tokens >= 1, "max_tokens", "1 or more", self.max_tokens)
        if self.seed is not None:
            _expect(-(2**63) <= self.seed < 2**63, "seed", "a 64-bit signed integer", self.seed)
        _expect(len(stops) <= _MAX_STOPS, "stop", f"at most {_MAX_STOPS} strings", len(stops))
        _expect(
            all(isinstance(s, str) and s for s in stops), "stop", "non-empty strings", list(stops)
        )
        _expect(
            all(isinstance(t, int) and t >= 0 for t in self.stop_token_ids),
            "stop_token_ids",
            "token ids, 0 or more",
            list(self.stop_token_ids),
        )

    @property
    def greedy(self) -> bool:
        return self.temperature < _GREEDY_BELOW


def _expect(condition: bool, name: str, expected: str, actual: object) -> None:
    if not condition:
        raise InvalidRequest(name, f"expected {expected}, got {actual!r}")


@dataclass(slots=True, eq=False)
class Request:
    """The mutable state of one request; only the engine's own thread changes it once added.

    `tokens` is prompt then output; keys and values exist for the first `computed` of them.
    """

    id: str
    prompt: str | None
    prompt_token_ids: list[int]
    sampling: SamplingParams
    policy: ComputePolicy
    max_tokens: int
    stop_ids: frozenset[int]
    text: TextStream
    generator: torch.Generator | None = None
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    compute: list[float] = field(default_factory=list)
    rows: int = 0
    rows_compute: float = 0.0
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    last_step: int = 0

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.tokens[len(self.prompt_token_ids) :]

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.prompt_token_ids)

    @property
    def prefilling(self) -> bool:
        return self.computed < len(self.prompt_token_ids)

    @property
    def compute_mean(self) -> float:
        """Executed fraction of the dense compute over every row run so far, prompt included."""
        return self.rows_compute / self.rows if self.rows else 1.0


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step added to one request. A finished request has a finish_reason."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    compute: tuple[float, ...]
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    compute_mean: float


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """`compute[i]` is the fraction of the dense compute run to produce `token_ids[i]`."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    compute: list[float]


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """vLLM's shape, plus the policy that was applied and the executed fraction over all rows."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    policy: ComputePolicy
    compute_mean: float

    @classmethod
    def of(cls, request: Request) -> RequestOutput:
        completion = CompletionOutput(
            index=0,
            text=request.text.text,
            token_ids=request.output_token_ids,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            compute=list(request.compute),
        )
        return cls(
            request_id=request.id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[completion],
            finished=request.status is Status.FINISHED,
            policy=request.policy,
            compute_mean=request.compute_mean,
        )
