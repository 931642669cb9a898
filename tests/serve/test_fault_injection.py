"""An engine that fails answers everyone, says so, and takes the process down with a code."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.serve.processes import Server, started

ASK = {"model": "fake", "prompt": "x", "max_tokens": 2000, "temperature": 0}


def test_a_failing_step_fails_every_waiter_within_a_second() -> None:
    options = ("--step-seconds", "0.03", "--max-num-seqs", "4")
    with started(*options) as server, ThreadPoolExecutor(6) as pool:
        plain = [pool.submit(server.post, "/v1/completions", ASK) for _ in range(2)]
        streamed = pool.submit(stream, server)
        server.wait_for(lambda r: r["running"] == 3)
        began = time.monotonic()
        bad = server.post("/v1/completions", ASK | {"prompt": "<|boom|>"})
        for response in [bad, *(answer.result() for answer in plain)]:
            assert response.status_code == 500
            assert response.json()["error"]["code"] == "engine_dead"
        *_, last, done, end = streamed.result().split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
        assert (done, end) == ("data: [DONE]", "")
        assert time.monotonic() - began < 1.0
        ready = httpx.get(server.url + "/readyz")
        assert ready.status_code == 503 and ready.json()["reason"] == "engine_dead"
        assert server.post("/v1/completions", ASK).status_code == 503
        assert server.wait(10) == 1
        assert "injected fault" in server.log()


def stream(server: Server) -> str:
    url = server.url + "/v1/completions"
    with httpx.stream("POST", url, json=ASK | {"stream": True}, timeout=30) as response:
        return "".join(response.iter_text())
