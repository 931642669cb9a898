"""The bytes of a stream, not what a client makes of them."""

from __future__ import annotations

import json

import httpx

from tests.serve.processes import Server


def test_every_record_is_one_data_line_and_the_last_is_done(server: Server) -> None:
    body = {"model": "fake", "prompt": "a\nb<|echo|>", "temperature": 0, "stream": True}
    with httpx.stream("POST", server.url + "/v1/completions", json=body) as response:
        raw = b"".join(response.iter_raw())
        headers = response.headers
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["cache-control"] == "no-cache" and "content-length" not in headers
    records = raw.split(b"\n\n")
    assert records[-1] == b"" and records[-2] == b"data: [DONE]"
    chunks = [json.loads(r.removeprefix(b"data: ")) for r in records[:-2]]
    assert all(r.startswith(b"data: ") and b"\n" not in r for r in records[:-1])
    assert "".join(c["choices"][0]["text"] for c in chunks) == "a\nb"
    assert [c["choices"][0]["finish_reason"] for c in chunks][-1] == "stop"
    assert chunks[-1]["compute"] == {"budget": 1.0, "mode": "calibrated", "mean": 1.0}
    assert all("usage" not in c for c in chunks)


def test_a_refused_stream_is_a_plain_error(server: Server) -> None:
    response = server.post("/v1/completions", {"model": "fake", "prompt": "", "stream": True})
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/json"
