"""A client that hangs up frees its place within one step, whatever it was waiting for."""

from __future__ import annotations

import time

import httpx
import pytest

from tests.serve.processes import Server

ASK = {"model": "fake", "prompt": "x", "max_tokens": 2000, "temperature": 0}
STEP = 0.05


def freed(server: Server) -> float:
    """Seconds until nothing runs, nothing waits and all blocks are back."""
    began = time.monotonic()
    body = server.wait_for(lambda r: r["running"] == r["waiting"] == r["in_flight"] == 0, 5)
    assert body["free_blocks"] == body["total_blocks"]
    return time.monotonic() - began


def test_in_the_middle_of_a_stream(slow_server: Server) -> None:
    with httpx.stream(
        "POST", slow_server.url + "/v1/completions", json=ASK | {"stream": True}
    ) as r:
        pieces = r.iter_raw()  # dropping the iterator would close the connection
        next(pieces)
        body = slow_server.wait_for(lambda ready: ready["running"] == 1)
        assert body["free_blocks"] < body["total_blocks"]
    before = slow_server.ready()["steps"]
    assert freed(slow_server) < 1.0
    assert slow_server.ready()["steps"] <= before + 3


def test_while_a_plain_answer_is_made(slow_server: Server) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(slow_server.url + "/v1/completions", json=ASK, timeout=0.5)
    before = slow_server.ready()["steps"]
    assert freed(slow_server) < 1.0
    assert slow_server.ready()["steps"] <= before + 3


@pytest.mark.parametrize("stream", [False, True])
def test_while_waiting_for_a_place(slow_server: Server, stream: bool) -> None:
    url = slow_server.url + "/v1/completions"
    with httpx.stream("POST", url, json=ASK | {"stream": True}) as first:
        pieces = first.iter_raw()
        next(pieces)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=ASK | {"stream": stream}, timeout=0.3)
        slow_server.wait_for(lambda r: (r["running"], r["waiting"], r["in_flight"]) == (1, 0, 1))
    assert freed(slow_server) < 1.0


def test_a_storm_of_random_fates_loses_nothing(server: Server) -> None:
    import random
    from concurrent.futures import ThreadPoolExecutor

    rng = random.Random(0)
    fates = [rng.choice(["finish", "stream", "drop", "drop-late"]) for _ in range(60)]

    def live(fate: str) -> bool:
        body = {"model": "fake", "prompt": "abc<|echo|>", "temperature": 0, "max_tokens": 30}
        if fate == "finish":
            done = server.post("/v1/completions", body)
            return done.status_code == 429 or done.json()["choices"][0]["text"] == "abc"
        url = server.url + "/v1/completions"
        with httpx.stream("POST", url, json=body | {"stream": True}, timeout=30) as response:
            if fate == "stream":
                text = "".join(response.iter_text())
                return response.status_code == 429 or text.endswith("data: [DONE]\n\n")
            if fate == "drop-late":
                next(response.iter_raw(), None)
        return True

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(live, fates))
    assert freed(server) < 5
