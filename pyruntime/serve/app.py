"""HTTP: routes, error objects, server-sent events, and what happens when a client hangs up."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from pyruntime.engine.engine import Engine
from pyruntime.engine.request import InvalidRequest
from pyruntime.engine.request import Request as EngineRequest
from pyruntime.errors import InvalidInput, PyRuntimeError
from pyruntime.serve.engine_thread import EngineDead, EngineThread, QueueFull, Stream
from pyruntime.serve.protocol import (
    BadRequest,
    ChatBody,
    CompletionBody,
    Compute,
    Reply,
    encode,
    error_body,
    parse,
    usage,
)

log = logging.getLogger("pyruntime.serve")
T = TypeVar("T")
# Tokenising a body larger than this takes longer than a step: it leaves the event loop.
_LONG_PROMPT = 8192
# An oversized body is read and thrown away up to this many limits: closing on unread data would
# reset the connection before the client has seen why.
_PATIENCE = 8
_GONE = 499  # the client hung up: nobody reads the answer, the number is for the log
_ERROR_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "service_unavailable_error"}


@dataclass(slots=True)
class State:
    """What the routes share: the engine's thread and whether the process is on its way out."""

    engine: EngineThread
    model: str
    body_limit: int
    stall_seconds: float
    created: int
    draining: bool = False


class _Disconnected(Exception):
    pass


def make_app(state: State) -> Starlette:
    def bound(endpoint: Callable[..., Awaitable[Response]]) -> Callable[..., Any]:
        async def call(request: Request) -> Response:
            return await endpoint(state, request)

        return call

    return Starlette(
        routes=[
            Route("/v1/completions", bound(partial(_generate, CompletionBody)), methods=["POST"]),
            Route("/v1/chat/completions", bound(partial(_generate, ChatBody)), methods=["POST"]),
            Route("/v1/models", bound(_models)),
            Route("/v1/models/{model:path}", bound(_models)),
            Route("/livez", bound(_livez)),
            Route("/readyz", bound(_readyz)),
        ],
        exception_handlers={
            BadRequest: _refused,
            InvalidInput: _invalid,
            PyRuntimeError: _unable,
            ClientDisconnect: _gone,
            HTTPException: _http_error,
            Exception: _bug,
        },
    )


# ---- generation ----


async def _generate(
    kind: type[CompletionBody] | type[ChatBody], state: State, request: Request
) -> Response:
    raw = await _read(request, state.body_limit)
    body = parse(kind, raw)
    engine = _ready_engine(state)
    if body.model != state.model:
        raise BadRequest(
            f"model: this server holds {state.model!r}, not {body.model!r}",
            status=404,
            param="model",
            code="model_not_found",
        )
    engine_request = await _engine_request(engine, body, len(raw))
    reply = Reply(
        id=engine_request.id,
        model=state.model,
        created=int(time.time()),
        chat=isinstance(body, ChatBody),
        policy=engine_request.policy,
    )
    if state.draining:  # it may have begun while a long prompt was tokenised
        raise BadRequest("the server is shutting down", status=503, code="draining")
    try:
        stream = state.engine.submit(engine_request)
    except QueueFull as error:
        raise BadRequest(f"overloaded: {error}", status=429, code="queue_full") from error
    except EngineDead as error:
        raise BadRequest(str(error), status=503, code="engine_dead") from error
    answer = _Answer(state.engine, stream, reply, streamed=body.stream, usage=body.include_usage)
    return await answer.response(request)


async def _engine_request(
    engine: Engine, body: CompletionBody | ChatBody, size: int
) -> EngineRequest:
    sampling = body.sampling()
    policy = (body.compute or Compute()).policy()
    try:
        engine.runtime.resolve(policy)
    except InvalidInput as error:
        raise BadRequest(str(error), param="compute") from error
    request_id = ("chatcmpl-" if isinstance(body, ChatBody) else "cmpl-") + uuid.uuid4().hex

    def build() -> EngineRequest:
        if isinstance(body, ChatBody):
            prompt: str | list[int] = engine.chat_tokens([m.for_template() for m in body.messages])
        else:
            prompt = body.one_prompt()
        return engine.request(prompt, sampling, policy, request_id=request_id)

    return build() if size < _LONG_PROMPT else await run_in_threadpool(build)


class _Answer:
    """One response, from the first token to the log line. Frees its place however it ends."""

    def __init__(
        self, engine: EngineThread, stream: Stream, reply: Reply, *, streamed: bool, usage: bool
    ) -> None:
        self._engine = engine
        self._stream = stream
        self._reply = reply
        self._streamed = streamed
        self._usage = usage
        self._began = time.monotonic()
        self._first: float | None = None
        self._text: list[str] = []
        self._tokens = 0
        self._mean = 1.0
        self._reason: str | None = None
        self._closed = False

    async def response(self, request: Request) -> Response:
        """Waits for the first output (streamed) or all of them, so errors keep their status."""
        end: str | None = "error"
        try:
            text = await _unless_gone(request, self._more() if self._streamed else self._all())
            end = self._reason
        except _Disconnected:
            end = "disconnect"
            return Response(status_code=_GONE)
        except EngineDead as error:
            raise BadRequest(str(error), status=500, code="engine_dead") from error
        finally:
            if end is not None:
                self._close(end)
        if self._streamed:
            return _EventStream(self._events(text), request)
        whole = self._reply.whole(text, str(self._reason), self._counts(), self._mean)
        return _json(whole)

    async def _all(self) -> str:
        while self._reason is None:
            await self._more()
        return "".join(self._text)

    async def _more(self) -> str:
        """The text of the next outputs, merged."""
        outputs = await self._stream.next()
        if self._first is None:
            self._first = time.monotonic()
        text = "".join(output.text for output in outputs)
        self._text.append(text)
        self._tokens += sum(len(output.token_ids) for output in outputs)
        self._mean = outputs[-1].compute_mean
        self._reason = outputs[-1].finish_reason
        return text

    async def _events(self, text: str) -> AsyncGenerator[bytes, None]:
        end = "disconnect"
        try:
            if (first := self._reply.first()) is not None:
                yield _event(first)
            while True:
                if text:
                    yield _event(self._reply.delta(text))
                if self._reason is not None:
                    break
                text = await self._more()
            end = self._reason
            yield _event(self._reply.last(self._reason, self._mean))
            if self._usage:
                yield _event(self._reply.usage(self._counts(), self._mean))
        except EngineDead as error:
            end = "error"
            yield _event(error_body(str(error), "server_error", None, "engine_dead"))
        finally:
            self._close(end)
        yield b"data: [DONE]\n\n"

    def _counts(self) -> dict[str, int]:
        return usage(len(self._stream.request.prompt_token_ids), self._tokens)

    def _close(self, end: str) -> None:
        if self._closed:
            return
        self._closed = True
        self._engine.release(self._stream)
        policy = self._reply.policy
        log.info(
            "%s prompt=%d output=%d budget=%.3f mode=%s experts=%s kv_mode=%s compute=%.4f "
            "finish=%s first=%.3fs total=%.3fs",
            self._reply.id,
            len(self._stream.request.prompt_token_ids),
            self._tokens,
            policy.budget,
            policy.mode,
            policy.experts or "all",
            policy.kv_mode,
            self._mean,
            end,
            (self._first or time.monotonic()) - self._began,
            time.monotonic() - self._began,
        )


class _EventStream(Response):
    """Server-sent events. Starlette's own streaming response leaves the generator suspended after
    a disconnect until it is collected; this one closes it at once, which frees the request."""

    def __init__(self, events: AsyncGenerator[bytes, None], request: Request) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._events = events
        self._request = request

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await _unless_gone(self._request, self._send(send))
        except _Disconnected:
            pass

    async def _send(self, send: Any) -> None:
        try:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._events.aclose()


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of work; cancels it and raises _Disconnected when the client hangs up first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise _Disconnected
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _read(request: Request, limit: int) -> bytes:
    body = bytearray()
    seen = 0
    async for part in request.stream():
        seen += len(part)
        if seen <= limit:
            body += part
        elif seen > limit * _PATIENCE:
            break
    if seen > limit:
        raise BadRequest(
            f"the body is larger than {limit} bytes", status=413, code="body_too_large"
        )
    return bytes(body)


def _ready_engine(state: State) -> Engine:
    if state.draining:
        raise BadRequest("the server is shutting down", status=503, code="draining")
    if state.engine.error is not None:
        raise BadRequest("the engine has stopped", status=503, code="engine_dead")
    if state.engine.engine is None:
        raise BadRequest("the model is loading", status=503, code="loading")
    return state.engine.engine


# ---- the rest ----


async def _models(state: State, request: Request) -> Response:
    wanted = request.path_params.get("model")
    if wanted not in (None, state.model):
        raise BadRequest(
            f"model: this server holds {state.model!r}, not {wanted!r}",
            status=404,
            param="model",
            code="model_not_found",
        )
    card: dict[str, Any] = {
        "id": state.model,
        "object": "model",
        "created": state.created,
        "owned_by": "pyruntime",
    }
    if state.engine.engine is not None:
        card["max_model_len"] = state.engine.engine.max_model_len
    return _json(card if wanted else {"object": "list", "data": [card]})


async def _livez(state: State, request: Request) -> Response:
    return _json({"status": "ok"})


async def _readyz(state: State, request: Request) -> Response:
    engine = state.engine
    stalled = engine.busy and engine.step_age > state.stall_seconds
    reasons = {
        "engine_dead": engine.error is not None,
        "loading": engine.engine is None,
        "draining": state.draining,
        "stalled": stalled,
    }
    reason = next((name for name, holds in reasons.items() if holds), None)
    body = {
        "ready": reason is None,
        "reason": reason,
        "running": engine.stats.running,
        "waiting": engine.stats.waiting,
        "in_flight": engine.in_flight,
        "free_blocks": engine.stats.free_blocks,
        "total_blocks": engine.stats.total_blocks,
        "steps": engine.stats.steps,
        "last_step_age_seconds": round(engine.step_age, 3),
    }
    return _json(body, status=200 if reason is None else 503)


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + encode(value) + b"\n\n"


def _json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encode(value), status, headers, media_type="application/json")


def _error(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> Response:
    kind = _ERROR_TYPES.get(status, "invalid_request_error")
    headers = {"retry-after": "1"} if status in (429, 503) else None
    return _json(error_body(message, kind, param, code), status, headers)


async def _refused(request: Request, error: Exception) -> Response:
    refusal = error if isinstance(error, BadRequest) else BadRequest(str(error))
    return _error(refusal.status, str(refusal), refusal.param, refusal.code)


async def _invalid(request: Request, error: Exception) -> Response:
    param = error.field if isinstance(error, InvalidRequest) else None
    return _error(400, str(error), param)


async def _unable(request: Request, error: Exception) -> Response:
    log.error("%s %s: %s", request.method, request.url.path, error)
    return _error(500, str(error))


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=_GONE)


async def _http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    return _error(status, f"{request.method} {request.url.path}: {error}")


async def _bug(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _error(500, "internal error")
