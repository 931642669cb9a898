"""The official client is the contract."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.serve.processes import Server


def test_models(server: Server) -> None:
    client = server.client()
    assert [m.id for m in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").owned_by == "pyruntime"
    with pytest.raises(openai.NotFoundError, match="this server holds 'fake', not 'gpt-9'"):
        client.models.retrieve("gpt-9")


def test_completion(server: Server) -> None:
    done = server.client().completions.create(
        model="fake", prompt="hé, world<|echo|>", temperature=0, max_tokens=50, user="me"
    )
    assert done.object == "text_completion" and done.id.startswith("cmpl-")
    assert (done.choices[0].text, done.choices[0].finish_reason) == ("hé, world", "stop")
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (11, 11)
    assert done.usage.total_tokens == 22
    assert done.compute == {"budget": 1.0, "mode": "calibrated", "mean": 1.0}  # type: ignore[attr-defined]


def test_chat(server: Server) -> None:
    messages: Any = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
    ]
    done = server.client().chat.completions.create(
        model="fake", messages=messages, temperature=0, max_completion_tokens=20, n=1
    )
    message = done.choices[0].message
    assert (message.role, message.content) == ("assistant", "abc")
    assert done.choices[0].finish_reason == "stop" and done.object == "chat.completion"


def test_chat_without_a_limit_may_use_the_context(server: Server) -> None:
    done = server.client().chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "x" * 100}], temperature=0
    )
    assert done.choices[0].message.content == "x" * 100


def test_chat_stream(server: Server) -> None:
    chunks = list(
        server.client().chat.completions.create(
            model="fake",
            messages=[{"role": "user", "content": "hé€!"}],
            temperature=0,
            max_tokens=50,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert {(c.id, c.created, c.model) for c in chunks} == {
        (chunks[0].id, chunks[0].created, "fake")
    }
    *deltas, last, usage = chunks
    assert deltas[0].choices[0].delta.role == "assistant"
    assert all(c.choices[0].delta.role is None for c in [*deltas[1:], last])
    assert "".join(c.choices[0].delta.content or "" for c in deltas) == "hé€!"
    assert not any("\ufffd" in (c.choices[0].delta.content or "") for c in deltas)
    assert last.choices[0].finish_reason == "stop" and not last.choices[0].delta.content
    assert all(c.choices[0].finish_reason is None for c in deltas)
    assert usage.choices == [] and usage.usage is not None
    assert usage.usage.completion_tokens == len("hé€!".encode()) + 1
    assert usage.compute["mean"] == 1.0  # type: ignore[attr-defined]


def test_completion_stream_equals_plain(server: Server) -> None:
    client = server.client()
    ask: Any = {"model": "fake", "prompt": "some prompt", "seed": 5, "max_tokens": 40}
    plain = client.completions.create(**ask)
    chunks = list(client.completions.create(**ask, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == plain.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_seed_and_extensions(server: Server) -> None:
    client = server.client()

    def ask(seed: int | None, **extra: Any) -> str:
        done = client.completions.create(
            model="fake", prompt=[1, 2, 3], seed=seed, max_tokens=30, extra_body=extra
        )
        return done.choices[0].text

    assert ask(1) == ask(1) != ask(2)
    assert ask(None) != ask(None)
    assert ask(None, top_k=1) == ask(1, top_k=1)
    ids = [*b"abc", 258]
    done = client.completions.create(
        model="fake", prompt=ids, temperature=0, max_tokens=6, extra_body={"ignore_eos": True}
    )
    assert done.usage is not None and done.usage.completion_tokens == 6
    done = client.completions.create(
        model="fake", prompt=ids, temperature=0, extra_body={"stop_token_ids": [98]}
    )
    assert (done.choices[0].text, done.choices[0].finish_reason) == ("a", "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(server: Server, stream: bool) -> None:
    client = server.client()
    ask: Any = {"model": "fake", "prompt": "one two three<|echo|>", "temperature": 0}
    ask |= {"max_tokens": 50, "stop": ["zebra", "o thr"]}
    if stream:
        chunks = list(client.completions.create(**ask, stream=True))
        text, reason = "".join(c.choices[0].text for c in chunks), chunks[-1].choices[0]
        assert (text, reason.finish_reason) == ("one tw", "stop")
    else:
        done = client.completions.create(**ask)
        assert (done.choices[0].text, done.choices[0].finish_reason) == ("one tw", "stop")


def test_greedy_does_not_depend_on_batch_mates(server: Server) -> None:
    client = server.client()

    def ask(i: int) -> str:
        done = client.completions.create(
            model="fake", prompt=f"prompt {i}", temperature=0, max_tokens=60
        )
        return done.choices[0].text

    alone = [ask(i) for i in range(12)]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(12))) == alone


UNSUPPORTED = [
    ("n", 2),
    ("best_of", 3),
    ("echo", True),
    ("suffix", "x"),
    ("logprobs", 1),
    ("logit_bias", {"5": 1}),
    ("presence_penalty", 0.5),
    ("frequency_penalty", -1),
    ("min_p", 0.1),
    ("guided_json", {}),
    ("max_token", 4),
    ("max_tokens", 0),
    ("max_tokens", "4"),
    ("max_tokens", 10**6),
    ("temperature", -0.1),
    ("top_p", 0),
    ("top_k", -7),
    ("stop", [""]),
    ("stop", 7),
    ("seed", 2**64 - 1),
    ("seed", 1.5),
    ("stream_options", {"include_usage": True}),
    ("prompt", ""),
    ("prompt", []),
    ("prompt", ["a", "b"]),
    ("prompt", [1, 10**9]),
    ("prompt", [1, "a"]),
    ("prompt", None),
]


@pytest.mark.parametrize(("field", "value"), UNSUPPORTED)
def test_a_field_that_cannot_be_honoured_is_named(server: Server, field: str, value: Any) -> None:
    body = {"model": "fake", "prompt": "x", "max_tokens": 3} | {field: value}
    response = server.post("/v1/completions", body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"].split(".")[0] == field and field in error["message"]
    assert error["type"] == "invalid_request_error" and set(error) == {
        "message",
        "type",
        "param",
        "code",
    }


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("compute", {"budget": 1.2}, "compute.budget"),
        ("compute", {"budget": "all"}, "compute.budget"),
        ("compute", {"mode": "batch_quantile"}, "compute.mode"),
        ("compute", {"depth": 3}, "compute.depth"),
        ("compute", {"experts": 0}, "compute.experts"),
        ("compute", {"experts": True}, "compute.experts"),
        ("compute", {"experts": "two"}, "compute.experts"),
        ("compute", {"experts": {}}, "compute.experts"),
        ("compute", {"experts": {"depth": 1}}, "compute.experts"),
        ("compute", {"experts": {"mass": 1.5}}, "compute.experts"),
        ("messages", [], "messages"),
        ("messages", [{"role": "wizard", "content": "x"}], "messages.0"),
        ("messages", [{"role": "user", "content": "x", "audio": 1}], "messages.0"),
        ("tools", [{"type": "function"}], "tools"),
        ("top_logprobs", 2, "top_logprobs"),
        ("response_format", {"type": "json_object"}, "response_format"),
        ("prompt", "x", "prompt"),
    ],
)
def test_chat_fields_are_named(server: Server, field: str, value: Any, param: str) -> None:
    body = {"model": "fake", "messages": [{"role": "user", "content": "x"}]} | {field: value}
    response = server.post("/v1/chat/completions", body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_neutral_values_are_accepted(server: Server) -> None:
    done = server.client().chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": "x"}],
        n=1,
        logprobs=False,
        presence_penalty=0.0,
        frequency_penalty=0,
        logit_bias={},
        response_format={"type": "text"},
        max_tokens=3,
        stop=None,
    )
    assert done.choices[0].message.content is not None


def test_errors_reach_the_client_as_its_own_classes(server: Server) -> None:
    client = server.client()
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="max_new_tokens: unknown field"):
        client.completions.create(model="fake", prompt="x", extra_body={"max_new_tokens": 1})
    assert server.post("/v1/nothing", {}).status_code == 404
    assert server.post("/v1/models", {}).json()["error"]["type"] == "invalid_request_error"
