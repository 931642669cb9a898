"""Whatever the body, the answer is a 4xx that says why, or a completion; never a 5xx."""

from __future__ import annotations

import socket
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serve.processes import Server

FIELDS = [
    *("model", "prompt", "messages", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop"),
    *("stream", "stream_options", "n", "logprobs", "compute", "stop_token_ids", "user", "junk"),
]
json_values: Any = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*FIELDS, "role", "content", "type", "budget"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)
near_misses = st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4)
quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quick
@given(near_misses, st.sampled_from(["completions", "chat/completions"]))
def test_wrong_values_never_break_the_server(
    server: Server, fields: dict[str, Any], path: str
) -> None:
    good = {"model": "fake", "prompt": "x", "max_tokens": 2}
    if path != "completions":
        good = {"model": "fake", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    response = server.post(f"/v1/{path}", good | fields)
    assert response.status_code < 500
    if response.status_code >= 400:
        assert response.json()["error"]["message"]


@quick
@given(st.binary(max_size=200) | json_values.map(lambda v: repr(v).encode()))
def test_wrong_bytes_never_break_the_server(server: Server, raw: bytes) -> None:
    response = httpx.post(server.url + "/v1/completions", content=raw)
    assert response.status_code == 400 and response.json()["error"]["message"]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"model":"fake","prompt":"\\ud800"}',
        b'{"model":"fake","prompt":"\xff"}',
        b'{"model":"fake","prompt":"x","temperature":NaN}',
        b'{"model":"fake","prompt":"x","temperature":1e999}',
        b'{"model":"fake","prompt":"x","seed":' + b"9" * 400 + b"}",
    ],
)
def test_known_traps(server: Server, raw: bytes) -> None:
    response = httpx.post(server.url + "/v1/completions", content=raw)
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_a_body_over_the_limit_is_413(server: Server) -> None:
    response = httpx.post(server.url + "/v1/completions", content=b"x" * (3 << 20))
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"


def test_hanging_up_in_the_middle_of_a_body_is_harmless(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{"
        )
    assert server.ready()["ready"]
