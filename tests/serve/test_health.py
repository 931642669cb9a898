"""Readiness is the engine's heartbeat, not the event loop's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.serve.processes import Server, started

ASK = {"model": "fake", "prompt": "x", "max_tokens": 2}


def test_numbers_of_an_idle_server(server: Server) -> None:
    body = server.wait_for(lambda r: r["in_flight"] == 0)
    assert body["ready"] and body["reason"] is None
    assert body["running"] == body["waiting"] == 0
    assert body["free_blocks"] == body["total_blocks"] > 0
    assert httpx.get(server.url + "/livez").json() == {"status": "ok"}


def test_a_loading_or_stalled_engine_is_alive_but_not_ready() -> None:
    options = ("--load-seconds", "1.5", "--step-seconds", "1.0", "--stall-seconds", "0.4")
    with started(*options, ready=False) as server, ThreadPoolExecutor(1) as pool:
        assert httpx.get(server.url + "/livez").status_code == 200
        ready = httpx.get(server.url + "/readyz")
        assert ready.status_code == 503 and ready.json()["reason"] == "loading"
        refused = server.post("/v1/completions", ASK)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "loading"
        assert httpx.get(server.url + "/v1/models").json()["data"][0]["id"] == "fake"
        server.wait_ready()
        answer = pool.submit(server.post, "/v1/completions", ASK)
        body = server.wait_for(lambda r: r["reason"] == "stalled")
        assert body["last_step_age_seconds"] > 0.4
        assert httpx.get(server.url + "/livez").status_code == 200
        assert answer.result().status_code == 200
        assert server.wait_for(lambda r: r["ready"])["in_flight"] == 0


def test_a_busy_engine_is_ready(slow_server: Server) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(slow_server.post, "/v1/completions", ASK | {"max_tokens": 20})
        body = slow_server.wait_for(lambda r: r["running"] == 1)
        assert body["ready"] and body["last_step_age_seconds"] < 5
        assert answer.result().status_code == 200
