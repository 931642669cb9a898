"""The whole way: a converted, calibrated folder behind the server, asked by the official client."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.engine.real_model import gated_folder
from tests.serve.processes import Server, running

PROMPTS = ["hello", "def f(x):\n    return", "naïve café", "a" * 70]


@pytest.fixture(scope="module")
def model_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = gated_folder(tmp_path_factory.mktemp("served"))
    with running([sys.executable, "-m", "tests.serve.model_server", str(folder)]) as server:
        server.wait_ready()
        yield server


def ask(server: Server, prompt: str, budget: float | None, **more: Any) -> Any:
    body: dict[str, Any] = {"ignore_eos": True}
    if budget is not None:
        body["compute"] = {"budget": budget}
    return server.client().completions.create(
        model="model", prompt=prompt, max_tokens=24, temperature=0, extra_body=body, **more
    )


def test_two_budgets_at_once_each_get_what_they_get_alone(model_server: Server) -> None:
    asked = [(prompt, budget) for prompt in PROMPTS for budget in (1.0, 0.5)]
    alone = [ask(model_server, *each) for each in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda each: ask(model_server, *each), asked))
    for (_, budget), one, other in zip(asked, alone, together, strict=True):
        assert one.choices[0].text == other.choices[0].text
        assert one.usage.completion_tokens == other.usage.completion_tokens == 24
        assert other.compute["budget"] == budget and other.compute["mode"] == "calibrated"
    for full, half in zip(alone[::2], alone[1::2], strict=True):
        assert half.compute["mean"] < full.compute["mean"] - 0.1


def test_no_budget_is_the_calibrated_default(model_server: Server) -> None:
    done = ask(model_server, "hello", None)
    assert done.compute["budget"] == 1.0
    assert done.choices[0].text == ask(model_server, "hello", 1.0).choices[0].text


def test_a_stream_says_the_same_and_reports_its_compute(model_server: Server) -> None:
    plain = ask(model_server, PROMPTS[1], 0.5)
    chunks = list(ask(model_server, PROMPTS[1], 0.5, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == plain.choices[0].text
    assert chunks[-1].compute["mean"] == pytest.approx(plain.compute["mean"])


def test_chat_uses_the_models_template(model_server: Server) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    done = model_server.client().chat.completions.create(
        model="model", messages=messages, max_tokens=5, temperature=0
    )
    assert done.usage is not None
    assert done.usage.prompt_tokens == len("user: hi\nassistant:")


def test_the_log_tells_budget_mode_and_compute(model_server: Server) -> None:
    done = ask(model_server, "hello", 0.5)
    (line,) = (line for line in model_server.log().splitlines() if done.id in line)
    for word in ("prompt=5", "output=24", "budget=0.500", "mode=calibrated", "kv_mode=dense"):
        assert word in line
    assert f"compute={done.compute['mean']:.4f}" in line and "finish=length" in line


def test_a_folder_that_is_not_a_model_ends_with_its_reason(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.serve.model_server", str(tmp_path)]
    with running(command) as server:
        assert server.wait(20) != 0
        assert "runtime.json" in server.log()


def test_an_idle_server_stops_at_once(model_server: Server) -> None:
    model_server.terminate()  # the last test of this file
    assert model_server.wait(5) == 0
