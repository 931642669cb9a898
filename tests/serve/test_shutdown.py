"""SIGTERM: what is in flight finishes, what is new is refused, and nothing stays behind."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil

from tests.serve.processes import Server, started

ASK = {"model": "fake", "prompt": "x", "max_tokens": 30, "temperature": 0}


def test_drain_finishes_what_runs_and_refuses_what_is_new() -> None:
    with started("--step-seconds", "0.04") as server, ThreadPoolExecutor(4) as pool:
        children = psutil.Process(server.process.pid).children(recursive=True)
        plain = [pool.submit(server.post, "/v1/completions", ASK) for _ in range(2)]
        streamed = [pool.submit(stream, server) for _ in range(2)]
        server.wait_for(lambda r: r["running"] == 4)
        server.terminate()
        body = server.wait_for(lambda r: not r["ready"])
        assert body["reason"] == "draining"
        refused = server.post("/v1/completions", ASK)
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert httpx.get(server.url + "/livez").status_code == 200
        for answer in plain:
            assert answer.result().json()["usage"]["completion_tokens"] == 30
        for text in streamed:
            assert text.result().endswith("data: [DONE]\n\n")
        assert server.wait(10) == 0
        assert not any(child.is_running() for child in children)
        assert "finish=length" in server.log()


def stream(server: Server) -> str:
    url = server.url + "/v1/completions"
    with httpx.stream("POST", url, json=ASK | {"stream": True}, timeout=30) as response:
        return "".join(response.iter_text())


def test_what_does_not_finish_in_time_is_ended_as_abort() -> None:
    options = ("--step-seconds", "0.05", "--drain-seconds", "0.3")
    with started(*options) as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.post, "/v1/completions", ASK | {"max_tokens": 2000})
        server.wait_for(lambda r: r["running"] == 1)
        began = time.monotonic()
        server.terminate()
        assert answer.result().json()["choices"][0]["finish_reason"] == "abort"
        assert server.wait(10) == 0
        assert time.monotonic() - began < 4
