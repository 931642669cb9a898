from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from tests.serve.processes import Server

ASK = {"model": "fake", "prompt": "x", "max_tokens": 15, "temperature": 0}


def test_a_full_queue_is_429_and_nobody_else_suffers(slow_server: Server) -> None:
    def ask(_: int) -> tuple[int, str | None]:
        response = slow_server.post("/v1/completions", ASK)
        return response.status_code, response.headers.get("retry-after")

    with ThreadPoolExecutor(8) as pool:
        answers = sorted(pool.map(ask, range(8)), key=str)
    assert {status for status, _ in answers} == {200, 429}
    assert 1 <= sum(status == 200 for status, _ in answers) <= 2  # one runs, one waits
    assert all(retry == "1" for status, retry in answers if status == 429)
    body = slow_server.wait_for(lambda r: r["in_flight"] == 0)
    assert body["free_blocks"] == body["total_blocks"]
    assert slow_server.post("/v1/completions", ASK).status_code == 200
