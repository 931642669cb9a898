"""The OpenAI wire format: what is accepted, what is refused by name, and what is answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

import orjson
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from pyruntime.engine.request import InvalidRequest, SamplingParams
from pyruntime.errors import InvalidInput
from pyruntime.gates.policy import ComputePolicy, ExpertPolicy

Mode = Literal["calibrated"]
# Fields clients send at a value that asks for nothing; any other value is refused by name.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType({
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none",),
    "store": (False,),
})  # fmt: skip


class BadRequest(Exception):
    """A refusal with its HTTP status and the OpenAI error fields."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    include_usage: bool = False


class Compute(_Strict):
    """How much of the model a request may use. Served requests are causal: `calibrated` only.

    `experts` is a number, or an object with some of `slots`, `gap` and `mass`.
    """

    budget: Annotated[float, Field(ge=0, le=1)] | None = None
    mode: Mode | None = None
    experts: ExpertPolicy | None = None

    @field_validator("experts", mode="before")
    @classmethod
    def _limits(cls, value: object) -> ExpertPolicy | None:
        return None if value is None else ExpertPolicy.of(value)

    def policy(self) -> ComputePolicy:
        return ComputePolicy(budget=self.budget, mode="calibrated", experts=self.experts)


class _Body(_Strict):
    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # accepted for its senders' sake; nothing here depends on it
    compute: Compute | None = None
    n: Any = None
    echo: Any = None
    logprobs: Any = None
    logit_bias: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    repetition_penalty: Any = None
    min_p: Any = None

    default_max_tokens: ClassVar[int | None] = None

    @model_validator(mode="after")
    def _refuse_what_is_not_implemented(self) -> _Body:
        for name, neutral in _NEUTRAL.items():
            value = getattr(self, name, None)
            if value is not None and not any(
                value == same and isinstance(value, bool) == isinstance(same, bool)
                for same in neutral
            ):
                raise InvalidRequest(name, f"not supported; only {neutral[0]!r} is accepted")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options", "only allowed when stream is true")
        return self

    @property
    def output_limit(self) -> int | None:
        return self.max_tokens if self.max_tokens is not None else self.default_max_tokens

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self) -> SamplingParams:
        """The engine's parameters. Raises InvalidRequest for a value out of range."""
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            max_tokens=self.output_limit,
            stop=self.stop or (),
            stop_token_ids=self.stop_token_ids or (),
            ignore_eos=self.ignore_eos,
        )


class CompletionBody(_Body):
    prompt: str | list[int] | list[str] | list[list[int]]
    best_of: Any = None
    suffix: Any = None

    default_max_tokens: ClassVar[int | None] = 16

    def one_prompt(self) -> str | list[int]:
        """The prompt; a list of one prompt counts as that prompt."""
        if isinstance(self.prompt, str):
            return self.prompt
        if not self.prompt or isinstance(self.prompt[0], int):
            return self.prompt  # type: ignore[return-value]
        if len(self.prompt) > 1:
            raise InvalidRequest(
                "prompt", f"expected one prompt per request, got {len(self.prompt)}"
            )
        return self.prompt[0]


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        message = {"role": self.role, "content": text}
        return message if self.name is None else message | {"name": self.name}


class ChatBody(_Body):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    top_logprobs: Any = None
    response_format: Any = None
    tools: Any = None
    tool_choice: Any = None
    store: Any = None

    @property
    def output_limit(self) -> int | None:
        newer = self.max_completion_tokens
        return newer if newer is not None else self.max_tokens


def parse(body: type[CompletionBody] | type[ChatBody], raw: bytes) -> CompletionBody | ChatBody:
    """A request body, checked. Raises BadRequest naming the field at fault."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadRequest(f"the body must be a JSON object, got {type(value).__name__}")
    try:
        return body.model_validate(value)
    except ValidationError as error:
        raise _named(error) from error


def _named(error: ValidationError) -> BadRequest:
    first = error.errors(include_url=False, include_input=False)[0]
    param = ".".join(str(part) for part in first["loc"][:2]) or None
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InvalidRequest):
        return BadRequest(str(cause), param=cause.field)
    if isinstance(cause, InvalidInput):
        return BadRequest(str(cause), param=param)
    if first["type"] == "extra_forbidden":
        return BadRequest(f"{param}: unknown field", param=param, code="unknown_field")
    return BadRequest(f"{param}: {first['msg']}", param=param)


def encode(value: object) -> bytes:
    return orjson.dumps(value)


def error_body(message: str, type: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


@dataclass(frozen=True, slots=True)
class Reply:
    """Builds every object of one response: same id, model and created time in all of them."""

    id: str
    model: str
    created: int
    chat: bool
    policy: ComputePolicy

    def whole(self, text: str, reason: str, usage: dict[str, int], mean: float) -> dict[str, Any]:
        message = {"message": {"role": "assistant", "content": text}}
        content: dict[str, object] = dict(message) if self.chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
        object_ = "chat.completion" if self.chat else "text_completion"
        return self._object(object_, [choice], usage=usage, compute=self._compute(mean))

    def first(self) -> dict[str, Any] | None:
        """The role, in a delta of its own; completions have none."""
        return self._chunk({"role": "assistant", "content": ""}, None) if self.chat else None

    def delta(self, text: str) -> dict[str, Any]:
        return self._chunk({"content": text} if self.chat else text, None)

    def last(self, reason: str, mean: float) -> dict[str, Any]:
        return self._chunk({} if self.chat else "", reason, compute=self._compute(mean))

    def usage(self, usage: dict[str, int], mean: float) -> dict[str, Any]:
        return self._object(self._chunk_name, [], usage=usage, compute=self._compute(mean))

    @property
    def _chunk_name(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(self, delta: object, reason: str | None, **extra: Any) -> dict[str, Any]:
        content = {"delta": delta} if self.chat else {"text": delta}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
        return self._object(self._chunk_name, [choice], **extra)

    def _object(self, name: str, choices: list[dict[str, Any]], **extra: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": name,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **extra,
        }

    def _compute(self, mean: float) -> dict[str, Any]:
        """What was applied, and the mean share of the dense compute that was run."""
        policy = self.policy
        applied: dict[str, Any] = {"budget": policy.budget, "mode": policy.mode, "mean": mean}
        if policy.expert_policy is not None:
            applied["experts"] = policy.expert_policy.limits
        return applied


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
