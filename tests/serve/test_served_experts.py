"""A mixture-of-experts model behind the server: experts per request."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pyruntime.engine.runtime import load
from pyruntime.format.load import write_calibration
from pyruntime.profile.calibrate import calibrate
from tests.profile.models import mixtral
from tests.profile.test_calibrate import corpus
from tests.serve.processes import Server, running

COMPUTE: list[dict[str, Any]] = [
    {},
    {"experts": 1},
    {"experts": {"mass": 0.7}},
    {"experts": {"slots": 2, "gap": 0.2}},
    {"budget": 0.75},
]


@pytest.fixture(scope="module")
def model_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = mixtral(tmp_path_factory.mktemp("experts"))
    write_calibration(folder, calibrate(load(folder), corpus(0, sequences=4)).record)
    with running([sys.executable, "-m", "tests.serve.model_server", str(folder)]) as server:
        server.wait_ready()
        yield server


def ask(server: Server, compute: dict[str, Any], **more: Any) -> Any:
    return server.client().completions.create(
        model="model",
        prompt="def f(x):",
        max_tokens=16,
        temperature=0,
        extra_body={"ignore_eos": True, "compute": compute},
        **more,
    )


def test_requests_with_different_experts_share_a_batch(model_server: Server) -> None:
    alone = [ask(model_server, compute) for compute in COMPUTE]
    with ThreadPoolExecutor(len(COMPUTE)) as pool:
        together = list(pool.map(lambda compute: ask(model_server, compute), COMPUTE))
    for one, other in zip(alone, together, strict=True):
        assert one.choices[0].text == other.choices[0].text
        assert one.compute["mean"] == pytest.approx(other.compute["mean"])
    full, single, *others = (done.compute["mean"] for done in together)
    assert full == 1.0
    assert all(single < mean < 1.0 for mean in others)


def test_the_reply_and_the_log_tell_what_was_applied(model_server: Server) -> None:
    done = ask(model_server, {"experts": 1})
    assert done.compute == {
        "budget": 1.0, "mode": "calibrated", "mean": done.compute["mean"], "experts": {"slots": 1},
    }  # fmt: skip
    (line,) = (line for line in model_server.log().splitlines() if done.id in line)
    assert "experts=slots=1 " in line
    chunks = list(ask(model_server, {"experts": {"mass": 0.7}}, stream=True))
    assert chunks[-1].compute["experts"] == {"mass": 0.7}


@pytest.mark.parametrize(
    ("compute", "words"),
    [
        ({"experts": 3}, ("experts", "3", "2")),
        ({"budget": 0.4}, ("budget 0.4", "smallest", "0.5")),
    ],
)
def test_what_the_model_cannot_honour_is_refused(
    model_server: Server, compute: dict[str, Any], words: tuple[str, ...]
) -> None:
    body = {"model": "model", "prompt": "x", "compute": compute}
    response = model_server.post("/v1/completions", body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == "compute"
    assert all(word in error["message"] for word in words)
